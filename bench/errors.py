"""What a user of the benchmark can mend."""

from checkpoint.errors import DroverError


class BenchError(DroverError):
    """The benchmark cannot go on; the message says why, and what would help."""
