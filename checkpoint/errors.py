"""The errors that a user can cause or should see.

    DroverError
    ├── CheckpointError      a checkpoint directory is missing something, damaged or inconsistent
    ├── ConfigError          a deployment file                                     (cluster/config.py)
    ├── StartError           the cluster could not be started                      (cluster/launch.py)
    ├── NoRoom               the KV cache does not fit beside the weights          (router/kv_budget.py)
    └── RequestError         one request cannot be answered                        (router/errors.py)

`str(error)` is a complete message for the user. It names the field or file, the value, and the
valid values. Broken invariants are assertions instead.
"""

from collections.abc import Sequence


class DroverError(Exception):
    """Root of every error whose text is meant for a user."""


class CheckpointError(DroverError):
    """A checkpoint directory is missing something, damaged or inconsistent."""


def listed(problems: Sequence[str]) -> str:
    """What follows the colon of a message: one problem in the same line, several in a line each."""
    return f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  {problem}" for problem in problems)
