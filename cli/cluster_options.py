"""The flags of the commands that look for a running deployment on a Ray cluster."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add where to look; the defaults find what `drover serve` started on this machine."""
    parser.add_argument(
        "--ray-address", default="auto", metavar="HOST:PORT", help="the Ray cluster; default: this machine's"
    )
    parser.add_argument("--namespace", default="drover", help="ray.namespace of the deployment; default: %(default)s")


@contextmanager
def connected(args: argparse.Namespace) -> Iterator[bool]:
    """Connect to the Ray cluster for a while; gives False if there is none."""
    from checkpoint.errors import DroverError
    from cluster import ray_runtime
    from cluster.config import RayConfig

    try:
        ray_runtime.connect(RayConfig(address=args.ray_address, namespace=args.namespace))
    except DroverError:
        if args.ray_address != "auto":
            raise
        yield False
        return
    try:
        yield True
    finally:
        ray_runtime.disconnect()
