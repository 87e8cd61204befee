"""Names of a deployment's parts, and which actors exist now."""

import ray


def router_name(router: int) -> str:
    """The actor name of router number `router`."""
    return f"router-{router}"


def shard_name(shard: int) -> str:
    """The actor name of shard number `shard`."""
    return f"shard-{shard}"


def app_name(namespace: str) -> str:
    """Name of the Serve application and of the placement group.

    Ray's namespaces do not separate these.
    """
    return f"drover.{namespace}"


def actor_names(namespace: str) -> list[str]:
    """The deployment's named actors that exist now, routers first."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in listed if actor["namespace"] == namespace]
    return sorted(name for name in names if name.startswith(("router-", "shard-")))
