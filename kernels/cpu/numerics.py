"""For compiled loops: bf16 conversion, a fast exponential, and products by AVX512-BF16.

bf16 is seen as uint16, as in kernels/arrays.py.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Sums may be reordered and fused; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def to_float(x):
    """In compiled code: fp32 of a bf16 or fp32 number."""
    raise AssertionError("compiled code only")


@overload(to_float, inline="always")
def _to_float(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def from_float(x, like):
    """In compiled code: fp32 to the type of `like`, to nearest, ties to even."""
    raise AssertionError("compiled code only")


@overload(from_float, inline="always")
def _from_float(x, like):
    if like == types.uint16:

        def to_bf16(x, like):
            bits = np.float32(x).view(np.uint32)
            if x != x:
                return np.uint16(0x7FC0)
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return to_bf16
    return lambda x, like: np.float32(x)


# 2^f for -1/2 <= f <= 1/2, Taylor's polynomial, highest power first; relative error 2e-7.
POWERS_OF_TWO = (
    1.5403530393381610e-4,
    1.3333558146428443e-3,
    9.6181291076284772e-3,
    5.5504108664821580e-2,
    2.4022650695910071e-1,
    6.9314718055994531e-1,
    1.0,
)
LOG2_E = 1.4426950408889634


@njit(fastmath=FAST, inline="always")
def exp_of_negative(x):
    """e^x for x <= 0, to about 2e-7 relative: 2^i * 2^f."""
    t = max(x, np.float32(-87.0)) * np.float32(LOG2_E)
    i = np.floor(t + np.float32(0.5))
    f = t - i
    p = np.float32(POWERS_OF_TWO[0])
    p = p * f + np.float32(POWERS_OF_TWO[1])
    p = p * f + np.float32(POWERS_OF_TWO[2])
    p = p * f + np.float32(POWERS_OF_TWO[3])
    p = p * f + np.float32(POWERS_OF_TWO[4])
    p = p * f + np.float32(POWERS_OF_TWO[5])
    p = p * f + np.float32(POWERS_OF_TWO[6])
    return np.int32((np.int32(i) + np.int32(127)) << np.int32(23)).view(np.float32) * p


@njit(fastmath=FAST, inline="always")
def silu(x):
    """x / (1 + e^-x)"""
    small = exp_of_negative(-abs(x))
    return x * ((np.float32(1) if x >= 0 else small) / (np.float32(1) + small))


# How far ahead weights are prefetched. The best of 0.5 to 16 KiB: 29 GB/s on 2 cores, 23 without
# prefetch.
PREFETCH_BYTES = 8192
_LINE = 64  # bytes, and outputs in a column of packed weights
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_F32X16, _I32X16 = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"

    def __str__(self):
        return "bfloat"


_BFloat._create_instance()
_BF16X32 = ir.VectorType(_BFloat(), 32)


def _column_product(num_rows):
    """An intrinsic: num_rows rows times one column of packed weights (64 outputs)."""

    @intrinsic
    def column_product(typing_context, weights, pairs, x, x_stride, out, out_stride):
        """Addresses and strides in bytes. out: 64 fp32 sums a row. pairs: inputs / 2.

        vdpbf16ps multiplies 16 pairs of bf16 and adds each pair's two products to one fp32 sum.
        """

        def generate(context, builder, signature, arguments):
            weights, pairs, x, x_stride, out, out_stride = arguments
            dot = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(_F32X16, [_F32X16, _BF16X32, _BF16X32]),
                "llvm.x86.avx512bf16.dpbf16ps.512",
            )
            byte_pointer = ir.IntType(8).as_pointer()
            prefetch = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [byte_pointer, _I32, _I32, _I32]),
                "llvm.prefetch.p0",
            )

            def address(base, stride, index, offset=0):
                return builder.add(builder.add(base, builder.mul(stride, index)), ir.Constant(_I64, offset))

            before = builder.block
            loop, after = builder.append_basic_block("pairs"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            pair = builder.phi(_I64)
            pair.add_incoming(ir.Constant(_I64, 0), before)
            sums = [[builder.phi(_F32X16) for _ in range(4)] for _ in range(num_rows)]
            lines = []
            for j in range(4):
                line = address(weights, ir.Constant(_I64, 4 * _LINE), pair, _LINE * j)
                load = builder.load(builder.inttoptr(line, _I32X16.as_pointer()))
                load.align = _LINE
                lines.append(builder.bitcast(load, _BF16X32))
                ahead = builder.inttoptr(builder.add(line, ir.Constant(_I64, PREFETCH_BYTES)), byte_pointer)
                read, to_l2, data = (ir.Constant(_I32, n) for n in (0, 2, 1))
                builder.call(prefetch, [ahead, read, to_l2, data])
            following = []
            for row in range(num_rows):
                from_row = address(x, x_stride, ir.Constant(_I64, row))
                source = builder.inttoptr(address(from_row, ir.Constant(_I64, 4), pair), _I32.as_pointer())
                load = builder.load(source)
                load.align = 4
                first = builder.insert_element(ir.Constant(_I32X16, ir.Undefined), load, ir.Constant(_I32, 0))
                same = builder.shuffle_vector(first, ir.Constant(_I32X16, ir.Undefined), ir.Constant(_I32X16, None))
                both = builder.bitcast(same, _BF16X32)
                following.append([builder.call(dot, [sums[row][j], lines[j], both]) for j in range(4)])
            next_pair = builder.add(pair, ir.Constant(_I64, 1))
            pair.add_incoming(next_pair, loop)
            for row_sums, row_following in zip(sums, following, strict=True):
                for total, next_total in zip(row_sums, row_following, strict=True):
                    total.add_incoming(ir.Constant(_F32X16, None), before)
                    total.add_incoming(next_total, loop)
            builder.cbranch(builder.icmp_signed("<", next_pair, pairs), loop, after)
            builder.position_at_end(after)
            for row in range(num_rows):
                for j in range(4):
                    target = address(out, out_stride, ir.Constant(_I64, row), _LINE * j)
                    store = builder.store(following[row][j], builder.inttoptr(target, _F32X16.as_pointer()))
                    store.align = 4
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return column_product


one_row, two_rows, four_rows = (_column_product(rows) for rows in (1, 2, 4))
