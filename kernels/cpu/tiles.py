"""Products of small matrices of bf16 in a processor's tile registers (Intel AMX), for compiled loops.

There are eight tiles of up to 16 rows of 64 bytes. tile_dot(c, a, b) adds to tile c, [rows, 16] fp32, the product of
tile a, [rows, 32] bf16, and tile b, [16, 16, 2] bf16: of 32 x 16 numbers, the two of each consecutive pair of rows side
by side. Every thread configures its tiles before it uses them, and puts back what was configured before, because
others (oneDNN) keep theirs.

On a processor without AMX these compile to nothing, so that a function may contain them that does not come there.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18, "Programming with Intel AMX".
"""

import ctypes
import sys
from functools import cache

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 16
# Linux lets a process use tiles once it has asked: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA).
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18
_I8, _I64 = ir.IntType(8), ir.IntType(64)
_POINTER = _I8.as_pointer()


@cache
def _has_tiles() -> bool:
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this system
        return False
    return sys.platform == "linux" and bool(features.get("amx-tile")) and bool(features.get("amx-bf16"))


@cache
def is_supported() -> bool:
    """Whether this process may use tiles."""
    return _has_tiles() and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0


def configuration() -> np.ndarray:
    """What `tile_configure` takes, for eight tiles of 16 rows of 64 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1  # palette
    config[16:32:2] = 64  # two bytes a tile
    config[48:56] = ROWS
    return config


def _instruction(name, *operands):
    """An intrinsic of LLVM's instruction; operands: "tile" for a literal number, else LLVM's type."""

    def typed(*given):
        def generate(context, builder, signature, arguments):
            if _has_tiles():
                values = []
                for operand, kind, argument in zip(operands, given, arguments, strict=True):
                    if operand == "tile":
                        values.append(ir.Constant(_I8, kind.literal_value))
                    else:
                        values.append(builder.inttoptr(argument, operand) if operand is _POINTER else argument)
                function_type = ir.FunctionType(ir.VoidType(), [value.type for value in values])
                function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.x86.{name}")
                builder.call(function, values)
            return context.get_dummy_value()

        kinds = [kind if operand == "tile" else types.intp for operand, kind in zip(operands, given, strict=True)]
        return types.void(*kinds), generate

    # Numba counts an intrinsic's parameters.
    by_count = {1: lambda context, a: typed(a), 3: lambda context, a, b, c: typed(a, b, c)}
    return intrinsic(prefer_literal=True)(by_count[len(operands)])


tile_configure = _instruction("ldtilecfg", _POINTER)
"""tile_configure(address of a configuration)"""
tile_configured = _instruction("sttilecfg", _POINTER)
"""tile_configured(address): stores the present configuration there, 64 bytes."""
tile_zero = _instruction("tilezero", "tile")
tile_load = _instruction("tileloadd64", "tile", _POINTER, _I64)
"""tile_load(tile, address, bytes from row to row)"""
tile_store = _instruction("tilestored64", "tile", _POINTER, _I64)
tile_dot = _instruction("tdpbf16ps", "tile", "tile", "tile")
