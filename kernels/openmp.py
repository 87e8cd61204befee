"""How torch's threads wait for each other: to be set in the environment of a process before it imports torch."""

# Where several processes share the cores, an OpenMP thread that spins while it waits for another keeps that other from
# running: beside one busy process on 2 cores, a linear layer took 11 ms with libgomp's default, and 0.4 ms so. A spin
# of a few microseconds is worth having: without it, a step of 8 streams took 15.7 ms instead of 14.3.
WAITING_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
