"""`drover serve`: start a deployment and keep it running."""

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Start what a deployment file describes, and serve until Ctrl-C or `drover stop`.

The file names a checkpoint; every other key has a default. deploy/local.yaml shows them all.
"""
EPILOG = """\
examples:
  drover serve deploy/local.yaml
  drover serve deploy/local.yaml --set shards.count=5 --set shards.cpus=0.2 --set checkpoint=/models/scout
  drover serve cluster.yaml --detach        # with ray.address of a running Ray cluster
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
        help="replace one key of the file; may be repeated",
    )
    parser.add_argument(
        "--detach", action="store_true", help="return once it serves; only on a running Ray cluster (ray.address)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve in the foreground, or start and return."""
    from cli.progress import StartProgress
    from cluster import launch, ray_runtime
    from cluster.config import ConfigError, load_deployment

    config = load_deployment(args.config, args.overrides)
    if args.detach and config.ray.address == "local":
        raise ConfigError("--detach needs a running Ray cluster: a local Ray ends with this process; set ray.address")
    stop_asked = threading.Event()
    stop_on_signals(stop_asked)
    try:
        with StartProgress() as progress:
            deployment = launch.start(config, progress)
        stop_on_signals(stop_asked)  # again: Ray has put in handlers of its own
        print(f"{config.name} is served on {deployment.address} (gRPC drover.v1.Inference)", flush=True)
        if args.detach:
            return 0
        print(
            "Ctrl-C or `drover stop` ends it. Try: drover generate 'Hello' --address " + deployment.address, flush=True
        )
        exit_code = _serve_until(stop_asked, config.ray.namespace)
        launch.end(config)
        print("stopped", flush=True)
        return exit_code
    finally:
        ray_runtime.disconnect()


def stop_on_signals(asked: threading.Event) -> None:
    """From now on SIGTERM interrupts like Ctrl-C. `asked` is set by the first; later ones leave the clean-up alone."""

    def interrupt(number: int, frame: object) -> None:
        if asked.is_set():
            return  # the clean-up is under way already
        asked.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def _serve_until(stop_asked: threading.Event, namespace: str) -> int:
    """Wait for a signal, or for the deployment to be removed from elsewhere."""
    from cluster import launch

    try:
        while not stop_asked.wait(1.0):
            if not launch.actor_names(namespace):
                print("the deployment was stopped from elsewhere", file=sys.stderr)
                return 0
    except KeyboardInterrupt:
        print("stopping ...", flush=True)
    return 0
