"""Names of a deployment's parts, and which actors exist now."""

import ray

CONTROLLER = "controller"
"""The actor name of the controller."""


def app_name(namespace: str) -> str:
    """Name of the Serve application and of the placement group.

    Ray's namespaces do not separate these.
    """
    return f"drover.{namespace}"


def actor_names(namespace: str) -> list[str]:
    """The deployment's named actors that exist now: the controller, routers, shards."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in listed if actor["namespace"] == namespace]
    return sorted(name for name in names if name == CONTROLLER or name.startswith(("router-", "shard-")))


def part_names(namespace: str) -> list[str]:
    """The deployment's routers and shards that exist now, routers first."""
    return [name for name in actor_names(namespace) if name != CONTROLLER]
