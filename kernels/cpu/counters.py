"""Counters that several threads share in compiled code: numpy arrays of int64."""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


@njit(inline="always")
def take(counter, place=0):
    """In compiled code: counter[place], which is then one more; no two threads get the same number."""
    return _add_one(counter.ctypes.data + 8 * place)


@njit(inline="always")
def wait_for(counter, place, count):
    """In compiled code: return once counter[place] is at least `count`; what was written before is then seen."""
    while _load(counter.ctypes.data + 8 * place) < count:
        _give_way()


@intrinsic
def _add_one(typing_context, address):
    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.intp), generate


@intrinsic
def _load(typing_context, address):
    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(types.intp), generate


@intrinsic
def _give_way(typing_context):
    """Let another thread have this core, should one wait for it."""

    def generate(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield")
        return builder.call(function, [])

    return types.int32(), generate
