"""Counters that several threads share in compiled code: numpy arrays of int64."""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


@njit(inline="always")
def take(counter, index=0):
    """In compiled code: fetch and add one to counter[index], atomically."""
    return _add_one(counter.ctypes.data + 8 * index)


@njit(inline="always")
def wait_for(counter, index, count):
    """In compiled code: return once counter[index] is at least `count`.

    Writes before those increments are visible.
    """
    while _load(counter.ctypes.data + 8 * index) < count:
        _yield_core()


@intrinsic
def _add_one(typing_context, address):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.intp), generate


@intrinsic
def _load(typing_context, address):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.intp), generate


@intrinsic
def _yield_core(typing_context):
    """Yield the core to another thread that waits for it."""

    def generate(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield")
        return builder.call(function, [])

    return types.int32(), generate
