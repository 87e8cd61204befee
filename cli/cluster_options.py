"""The flags of commands that work on a running deployment, and their connection to Ray."""

import argparse
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from checkpoint.errors import DroverError, quoted

if TYPE_CHECKING:
    from cluster.controller_client import ControllerClient


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that find the deployment.

    The defaults find what `drover serve` started on this machine.
    """
    parser.add_argument(
        "--namespace",
        type=_namespace,
        default="drover",
        metavar="NAME",
        help="ray.namespace of the deployment; default: %(default)s",
    )
    parser.add_argument(
        "--ray-address",
        type=_address,
        metavar="HOST:PORT",
        help="the Ray cluster to look in; default: the local Ray of a `drover serve` with this namespace, or else the "
        "cluster of `ray start` on this machine",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `tell` reads."""
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object")


def tell(args: argparse.Namespace, text: str, **outcome: object) -> None:
    """Print an outcome: in words, or for programs."""
    print(json.dumps(outcome) if args.json else text)


def _namespace(text: str) -> str:
    from cluster.addresses import NAMESPACE

    if not re.fullmatch(NAMESPACE, text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} must have from 1 to 100 letters, digits, - and _")
    return text


def _address(text: str) -> str:
    from cluster.addresses import split_address

    if text != "auto":
        try:
            split_address(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{quoted(text)}: {error}") from None
    return text


@contextmanager
def connected(args: argparse.Namespace) -> Iterator[bool]:
    """Connect to the Ray cluster during the block.

    Yields False if there is none and no address was given.
    """
    from cluster.local_rays import find_local_ray

    local = None if args.ray_address else find_local_ray(args.namespace)
    if local is not None:
        # A local Ray requires the token that Ray keeps in the user's home. Set this before Ray is
        # imported.
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


@contextmanager
def connected_controller(args: argparse.Namespace) -> Iterator["ControllerClient"]:
    """The way to the deployment's controller during the block. Raises DroverError if nothing runs."""
    with connected(args) as is_connected:
        if not is_connected:
            raise DroverError(f"nothing runs in namespace {args.namespace!r}")
        from cluster.controller_client import ControllerClient

        yield ControllerClient(args.namespace)
