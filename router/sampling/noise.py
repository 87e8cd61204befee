"""Random numbers as a pure function of (seed, position): the same on every router, in any order."""

_MASK64 = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): two rounds of splitmix64's finalizer."""
    mixed = _mix(_mix(seed) ^ (position * 0x9E3779B97F4A7C15 & _MASK64))
    return (mixed >> 11) / 2**53


def derived_seed(seed: int, index: int) -> int:
    """The seed of answer `index`: `seed` itself for answer 0, else mix(mix(seed) + index)."""
    return _mix((_mix(seed) + index) & _MASK64) if index else seed


def _mix(value: int) -> int:
    # The output function of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit integers.
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)
