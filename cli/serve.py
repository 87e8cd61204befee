"""`drover serve`: start a deployment and keep it running."""

import argparse
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import DroverError
from cli.process_tree import adopt_orphans, end_descendants, reap

if TYPE_CHECKING:
    from cluster.config import DeploymentConfig

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TEARDOWN_S = 60.0
# Blocked signals stay blocked in a new process, and would in all of Ray's.
_UNBLOCK = """\
import os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execv(sys.argv[1], sys.argv[1:])
"""

DESCRIPTION = """\
Start the deployment that a YAML file describes. Serves until Ctrl-C or
`drover stop`.

The file must name a checkpoint. Every other key has a default;
deploy/local.yaml shows them all.

Exit codes: 0 stopped while it served, by Ctrl-C, SIGTERM or `drover stop`;
1 failed, stderr says why; 2 wrong usage; 130 stopped before it served.
Whatever the code, nothing that it started is left running.
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
    """Serve in the foreground, or start and return.

    Ray runs in a child (cli/serving.py), this process has none of it: signals are safe here at any
    moment, and whatever becomes of Ray, its processes are ended here.
    """
    from cluster.config import ConfigError, load_deployment

    config = load_deployment(args.config, args.overrides)
    if args.detach and config.ray.address == "local":
        raise ConfigError("--detach needs a running Ray cluster: a local Ray ends with this process; set ray.address")
    # Blocked, signals wait until sigwait takes them: none comes amid anything.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOPPING, signal.SIGCHLD})
    with serving(args.config, args.overrides, "detach" if args.detach else "stay") as (child, control):
        return _watch(child, control, config)


@contextmanager
def serving(
    config: Path, overrides: Sequence[str], how: str
) -> "Iterator[tuple[subprocess.Popen[bytes], socket.socket]]":
    """The process that serves (cli/serving.py), and the socket that tells what became of it, during the block.

    Afterwards nothing is left of what it had started, however it ended. how: see cli.serving.main.
    """
    from cluster.local_rays import forget_local_ray

    adopt_orphans()
    control, theirs = socket.socketpair()
    command = [sys.executable, "-m", "cli.serving", str(theirs.fileno()), how, str(config), *overrides]
    child = subprocess.Popen(
        [sys.executable, "-c", _UNBLOCK, *command],
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # the terminal's Ctrl-C is for this process alone
        env=os.environ | {"PYTHONPATH": _python_path()},
    )
    theirs.close()
    try:
        yield child, control
    finally:
        control.close()
        end_descendants()
        forget_local_ray(child.pid)


def _watch(child: "subprocess.Popen[bytes]", control: socket.socket, config: "DeploymentConfig") -> int:
    """Wait for the child, or for a signal that stops it. Returns the exit code."""
    while child.poll() is None:
        number = signal.sigwait({*_STOPPING, signal.SIGCHLD})
        reap(but=child.pid)
        if number in _STOPPING:
            served = _is_readable(control)
            print("stopping ...", flush=True)
            control.close()
            _stop(child, config)
            print("stopped", flush=True)
            return 0 if served else 128 + signal.SIGINT
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise DroverError(f"the process that serves was ended by {name}; everything it had started is ended, too")
    return child.returncode


def _stop(child: "subprocess.Popen[bytes]", config: "DeploymentConfig") -> None:
    """End what was started. A local Ray descends from this process; on a running one, parts must be removed."""
    if config.ray.address == "local":
        return
    try:
        child.wait(_TEARDOWN_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.returncode != 0:
        # Ray ended it before it could clean up. A new process can: it is `drover stop`.
        arguments = ["stop", "--namespace", config.ray.namespace]
        if config.ray.address != "auto":
            arguments += ["--ray-address", config.ray.address]
        subprocess.run(
            [sys.executable, "-c", _UNBLOCK, sys.executable, "-m", "cli.main", *arguments],
            timeout=_TEARDOWN_S,
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONPATH": _python_path()},
        )


def _is_readable(control: socket.socket) -> bool:
    return bool(select.select([control], [], [], 0)[0])


def _python_path() -> str:
    """PYTHONPATH with Drover's root in front, and without the working directory.

    An empty entry stands for the working directory. A `client.py` there would take the place of ours.
    """
    root = str(Path(__file__).resolve().parents[1])
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", ".", root)]
    return os.pathsep.join([root, *others])
