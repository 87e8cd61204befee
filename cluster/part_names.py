"""What routers and shards are called: by their kind and number. Numbers may have gaps once parts have gone."""


def router_name(router: int) -> str:
    """The actor name of router number `router`."""
    return f"router-{router}"


def shard_name(shard: int) -> str:
    """The actor name of shard number `shard`."""
    return f"shard-{shard}"


def part_number(name: str) -> int:
    """The number in a part's name.

    Example: of "shard-12" it is 12.
    """
    return int(name.rpartition("-")[2])
