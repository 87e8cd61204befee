"""What goes wrong while making the embedded model, said to the person who runs it."""

from checkpoint.errors import DroverError


class DemoError(DroverError):
    """The corpus, the training run or the evaluation cannot be made as asked."""
