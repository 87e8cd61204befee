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


def name_of_link(router: str, incarnation: str, shard: str, generation: int) -> str:
    """What a link is called. incarnation: of the router's process, without a hyphen."""
    return f"{router}-{incarnation}--{shard}--{generation}"


def router_of_link(name: str) -> str:
    """The router whose link has this name.

    Example: of "router-1-c0ffee--shard-0--3" it is "router-1".
    """
    return name.partition("--")[0].rpartition("-")[0]
