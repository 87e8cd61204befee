"""Vector instructions for 16 queries side by side, one query in each lane, for compiled loops.

So no sum and no maximum ever crosses lanes. They are written in LLVM's vectors of 16, which the
processor holds in one register (AVX-512) or two (AVX2). Addresses and strides are in bytes.

Legend: Q = 16 queries, M rows and N columns of a matrix, P positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.numerics import LOG2_E, POWERS_OF_TWO

LANES = 16
LOWEST = -1e30
_F32, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (16, 32, 64))
_VECTOR, _INTEGERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_BYTES = 4 * LANES  # of a vector


class _Lanes:
    """Builds LLVM's instructions on vectors of 16."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def all(self, scalar: Any) -> Any:
        """The scalar in every lane."""
        vector = ir.VectorType(scalar.type, LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(_INTEGERS, None))

    def constant(self, value: float) -> Any:
        return ir.Constant(_VECTOR, [ir.Constant(_F32, value)] * LANES)

    def offset(self, address: Any, index: Any, stride: Any) -> Any:
        return self.builder.add(address, self.builder.mul(index, stride))

    def vector_at(self, address: Any, index: Any) -> Any:
        """The address of vector number `index` from `address` on."""
        return self.offset(address, index, ir.Constant(_I64, _BYTES))

    def load(self, address: Any, kind: Any = _VECTOR) -> Any:
        loaded = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        loaded.align = 2 if kind is _I16 else 4
        return loaded

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = 4

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c"""
        return self._call("llvm.fma.v16f32", _VECTOR, [a, b, c])

    def larger(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def power_of_e(self, x: Any) -> Any:
        """e^x for x <= 0, as kernels.cpu.numerics.exp_of_negative."""
        b = self.builder
        t = b.fmul(self.larger(x, self.constant(-87.0)), self.constant(LOG2_E))
        whole = self._call("llvm.floor.v16f32", _VECTOR, [b.fadd(t, self.constant(0.5))])
        rest = b.fsub(t, whole)
        power = self.constant(POWERS_OF_TWO[0])
        for factor in POWERS_OF_TWO[1:]:
            power = self.fused(power, rest, self.constant(factor))
        exponent = b.add(b.fptosi(whole, _INTEGERS), ir.Constant(_INTEGERS, [ir.Constant(_I32, 127)] * LANES))
        shifted = b.shl(exponent, ir.Constant(_INTEGERS, [ir.Constant(_I32, 23)] * LANES))
        return b.fmul(b.bitcast(shifted, _VECTOR), power)

    def as_bf16(self, x: Any) -> Any:
        """The bits of x rounded to bf16, ties to even, in the upper half. x must not be NaN."""
        b = self.builder

        def each(value: int) -> Any:
            return ir.Constant(_INTEGERS, [ir.Constant(_I32, value)] * LANES)

        bits = b.bitcast(x, _INTEGERS)
        odd = b.and_(b.lshr(bits, each(16)), each(1))
        return b.and_(b.add(b.add(bits, each(0x7FFF)), odd), each(-0x10000))

    def loop(
        self, count: Any, step: int, starts: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """for i in range(0, count, step), count above 0: the body makes of i and the vectors their
        next values."""
        b = self.builder
        before, block, after = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(block)
        b.position_at_end(block)
        index = b.phi(_I64)
        index.add_incoming(ir.Constant(_I64, 0), before)
        phis = [b.phi(start.type) for start in starts]
        values = body(index, list(phis))
        following = b.add(index, ir.Constant(_I64, step))
        index.add_incoming(following, b.block)
        for phi, start, value in zip(phis, starts, values, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, count), block, after)
        b.position_at_end(after)
        return values

    def _call(self, name: str, kind: Any, arguments: list[Any]) -> Any:
        function_type = ir.FunctionType(kind, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function_type, name), arguments)


@intrinsic
def weigh(typing_context, score, positions, seen, scale, highest, total, shrink):
    """Turn one block's scores into weights, in place: softmax with a running maximum.

    Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.

    score: address of fp32 [P, Q]. seen: of int32 [Q], how many of the block's positions each query
    sees; the weights of others are 0. highest, total: of fp32 [Q], each query's highest score and
    sum of weights so far, brought up to date.
    shrink: of fp32 [Q], what is to be multiplied with the weighted sums so far.
    """

    def generate(context, builder, signature, arguments):
        score, positions, seen, scale, highest, total, shrink = arguments
        lanes = _Lanes(builder)
        seen_Q, scale_Q, before_Q = lanes.load(seen, _INTEGERS), lanes.all(scale), lanes.load(highest)

        def is_seen(p):
            return builder.icmp_signed("<", lanes.all(builder.trunc(p, _I32)), seen_Q)

        def find_highest(p, values):
            address = lanes.vector_at(score, p)
            scaled = builder.fmul(lanes.load(address), scale_Q)
            masked = builder.select(is_seen(p), scaled, lanes.constant(LOWEST))
            lanes.store(masked, address)
            return [lanes.larger(masked, values[0])]

        (highest_Q,) = lanes.loop(positions, 1, [before_Q], find_highest)

        def make_weights(p, values):
            address = lanes.vector_at(score, p)
            weight = lanes.power_of_e(builder.fsub(lanes.load(address), highest_Q))
            weight = builder.select(is_seen(p), weight, lanes.constant(0.0))
            lanes.store(weight, address)
            return [builder.fadd(values[0], weight)]

        (added,) = lanes.loop(positions, 1, [lanes.constant(0.0)], make_weights)
        shrink_Q = lanes.power_of_e(builder.fsub(before_Q, highest_Q))
        lanes.store(highest_Q, highest)
        lanes.store(lanes.fused(lanes.load(total), shrink_Q, added), total)
        lanes.store(shrink_Q, shrink)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.float32, *[types.intp] * 3), generate


@intrinsic
def scale_rows(typing_context, x, rows, factor):
    """x *= factor. x: address of fp32 [M, Q]. factor: of fp32 [Q]."""

    def generate(context, builder, signature, arguments):
        x, rows, factor = arguments
        lanes = _Lanes(builder)
        factor_Q = lanes.load(factor)

        def body(m, values):
            address = lanes.vector_at(x, m)
            lanes.store(builder.fmul(lanes.load(address), factor_Q), address)
            return []

        lanes.loop(rows, 1, [], body)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def pair_rows(typing_context, x, rows, pairs):
    """fp32 [M, Q] at x, M even, to bf16 [M / 2, Q, 2] at pairs, as a tile of AMX takes it."""

    def generate(context, builder, signature, arguments):
        x, rows, pairs = arguments
        lanes = _Lanes(builder)

        def body(m, values):
            first = lanes.as_bf16(lanes.load(lanes.vector_at(x, m)))
            second = lanes.as_bf16(lanes.load(lanes.vector_at(x, builder.add(m, ir.Constant(_I64, 1)))))
            low = builder.lshr(first, ir.Constant(_INTEGERS, [ir.Constant(_I32, 16)] * LANES))
            lanes.store(builder.or_(low, second), lanes.vector_at(pairs, builder.lshr(m, ir.Constant(_I64, 1))))
            return []

        lanes.loop(rows, 2, [], body)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


def _product(rows: int) -> Callable[..., Any]:
    """An intrinsic: so many rows of a matrix times N rows of 16 lanes."""

    @intrinsic
    def product(typing_context, a, stride, columns, b, out, like):
        """out += a b.

        a: address of [rows, N], of the type of `like`, uint16 for bf16. b: of fp32 [N, Q].
        """
        kind = _I16 if like == types.uint16 else _F32
        size = 2 if like == types.uint16 else 4

        def generate(context, builder, signature, arguments):
            a, stride, columns, b, out, _ = arguments
            lanes = _Lanes(builder)
            addresses = [lanes.vector_at(out, ir.Constant(_I64, row)) for row in range(rows)]
            begins = [lanes.offset(a, ir.Constant(_I64, row), stride) for row in range(rows)]

            def body(n, sums):
                b_Q = lanes.load(lanes.vector_at(b, n))
                following = []
                for begin, total in zip(begins, sums, strict=True):
                    x = lanes.load(lanes.offset(begin, n, ir.Constant(_I64, size)), kind)
                    if kind is _I16:
                        x = builder.bitcast(builder.shl(builder.zext(x, _I32), ir.Constant(_I32, 16)), _F32)
                    following.append(lanes.fused(lanes.all(x), b_Q, total))
                return following

            sums = lanes.loop(columns, 1, [lanes.load(address) for address in addresses], body)
            for address, total in zip(addresses, sums, strict=True):
                lanes.store(total, address)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5, like), generate

    return product


product_of_one, product_of_eight = _product(1), _product(8)
