"""The flags of the commands that look for a running deployment on a Ray cluster."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add where to look; the defaults find what `drover serve` started on this machine."""
    parser.add_argument("--namespace", default="drover", help="ray.namespace of the deployment; default: %(default)s")
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="the Ray cluster; default: the local Ray that `drover serve` runs for the namespace, or else the cluster "
        "that `ray start` made on this machine",
    )


@contextmanager
def connected(args: argparse.Namespace) -> Iterator[bool]:
    """Connect to the Ray cluster for a while; gives False if none was named and there is none."""
    from cluster.local_rays import find_local_ray

    local = None if args.ray_address else find_local_ray(args.namespace)
    if local is not None:
        # A local Ray asks for the token that Ray keeps in the user's home; this must be known before Ray is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from cluster import ray_runtime
    from cluster.config import RayConfig

    address = args.ray_address or local or "auto"
    try:
        ray_runtime.connect(RayConfig(address=address, namespace=args.namespace))
    except ray_runtime.NoRay:
        if args.ray_address:
            raise
        yield False
        return
    try:
        yield True
    finally:
        ray_runtime.disconnect()
