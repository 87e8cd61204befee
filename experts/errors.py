"""What can go wrong between a router and an expert shard."""


class LinkDown(Exception):
    """The link to a shard is gone: the shard died, went silent, or answered too late. The message says which."""


class NotMine(Exception):
    """A shard was asked for an expert that it does not hold, or under a placement that it does not serve."""
