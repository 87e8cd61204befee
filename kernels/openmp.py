"""Environment variables that set how torch's threads wait for each other.

Set them before importing torch.
"""

# An OpenMP thread spins while it waits. Where processes share the cores, that can keep the awaited
# thread from running. Beside one busy process on 2 cores, a linear layer took 11 ms with libgomp's
# default, and 0.4 ms with these values. A spin of a few microseconds pays: without any, a step of
# 8 streams took 15.7 ms instead of 14.3.
WAITING_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
