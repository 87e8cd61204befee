"""`drover serve`: start a deployment and keep it running."""

import argparse
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.launch import Deployment

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Start the deployment that a YAML file describes. Serves until Ctrl-C or
`drover stop`.

The file must name a checkpoint. Every other key has a default;
deploy/local.yaml shows them all.
"""
EPILOG = """\
examples:
  drover serve deploy/local.yaml
  drover serve deploy/local.yaml --set checkpoint=/models/scout
  drover serve deploy/local.yaml --set shards.count=5 --set shards.cpus=0.2
  drover serve cluster.yaml --detach   # its ray.address is a running cluster
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover serve` to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="start a deployment",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file such as deploy/local.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of the file, such as shards.count=3; may be repeated",
    )
    parser.add_argument(
        "--detach", action="store_true", help="return once it serves; only with ray.address of a running Ray cluster"
    )


def run(args: argparse.Namespace) -> int:
    """Serve in the foreground, or start and return."""
    from cli.progress import StartProgress
    from cluster import launch, ray_runtime, teardown
    from cluster.config import ConfigError, load_deployment

    config = load_deployment(args.config, args.overrides)
    if args.detach and config.ray.address == "local":
        raise ConfigError("--detach needs a running Ray cluster: a local Ray ends with this process; set ray.address")
    ending = threading.Event()
    interrupt_on_signals(ending)
    try:
        with StartProgress() as progress:
            deployment = launch.start(config, progress)
        if args.detach:
            print(_served(deployment), flush=True)
            return 0
        try:
            interrupt_on_signals(ending)  # again: Ray has replaced the handlers
            print(_served(deployment), flush=True)
            print(f"Ctrl-C ends it, or: drover stop --namespace {config.ray.namespace}", flush=True)
            _wait_until_removed(config.ray.namespace)
            print("the deployment was stopped from elsewhere", file=sys.stderr)
        except KeyboardInterrupt:
            print("stopping ...", flush=True)
        ending.set()
        teardown.end(config)
        print("stopped", flush=True)
        return 0
    finally:
        ending.set()
        ray_runtime.disconnect()


def interrupt_on_signals(ending: threading.Event) -> None:
    """Make SIGTERM interrupt like Ctrl-C.

    Once `ending` is set, the clean-up runs and both are ignored.
    """

    def interrupt(number: int, frame: object) -> None:
        if not ending.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def _served(deployment: "Deployment") -> str:
    address = deployment.address
    return f"{deployment.config.name} is served on {address}; try: drover generate 'Hello' --address {address}"


def _wait_until_removed(namespace: str) -> None:
    from cluster.names import actor_names

    while actor_names(namespace):  # Ray sends no notification when an actor ends, so poll
        time.sleep(1.0)
