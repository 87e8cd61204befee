"""bf16 matrix products in the tile registers of Intel AMX, for compiled loops.

There are eight tiles of up to 16 rows of 64 bytes. tile_dot(c, a, b) computes c += a b:
- c: [rows, 16] fp32
- a: [rows, 32] bf16
- b: [16, 16, 2] bf16, a [32, 16] matrix whose rows 2i and 2i + 1 are interleaved.

A thread configures its tiles before use and restores the former configuration afterwards: oneDNN
keeps its own. Without AMX the functions compile to nothing. A loop may contain them behind a
branch that is not taken there.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18,
"Programming with Intel AMX".
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.processor import detect

ROWS = 16
_I8, _I64 = ir.IntType(8), ir.IntType(64)
_POINTER = _I8.as_pointer()


def configuration() -> np.ndarray:
    """What `tile_configure` takes, for eight tiles of 16 rows of 64 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1  # palette
    config[16:32:2] = 64  # two bytes a tile
    config[48:56] = ROWS
    return config


def _instruction(name, *operands):
    """An intrinsic of LLVM's instruction.

    operands: "tile" for a literal number, else LLVM's type.
    """

    def typed(*given):
        def generate(context, builder, signature, arguments):
            # Whatever DROVER_ISA says, for the compiled code is kept for later processes.
            if detect().amx:
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
