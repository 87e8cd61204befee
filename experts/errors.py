"""What can go wrong between a router and an expert shard."""


class LinkDown(Exception):
    """No answer came over the link to a shard: it died, went silent, or took too long. The message says which."""


class ShardRefused(Exception):
    """A shard answered that it cannot compute what it was asked: not its expert, not its placement, or a failure."""
