"""`drover serve`: start a deployment and keep it running."""

import argparse
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import DroverError
from cli.say import say

if TYPE_CHECKING:
    from cluster.config import DeploymentConfig

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_ROOT = str(Path(__file__).resolve().parents[1])
_TEARDOWN_S = 90.0
_FINISHED_S = 10.0
"""How long the child may take to see that requests have finished."""
# The child's first words. Blocked signals stay blocked in a new process, and would in all of Ray's. An interrupt that
# was ignored, as for a shell's background jobs, must be none. The first entry of sys.path is the working directory.
_SERVING = """\
import sys
sys.path[0] = {root!r}
import signal
signal.pthread_sigmask(signal.SIG_SETMASK, ())
signal.signal(signal.SIGINT, signal.default_int_handler)
from {module} import main
sys.exit(main(sys.argv[1:]))
"""

DESCRIPTION = """\
Start the deployment that a YAML file describes. Serves until Ctrl-C, SIGTERM
or `drover stop`.

After Ctrl-C or SIGTERM new requests are refused with UNAVAILABLE, and running
ones may finish, within frontend.grace_s; if none run, it ends at once. The same
again ends everything at once, and so does `drover stop`.

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
    stopping = {signal.SIGINT, signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        stopping.add(signal.SIGHUP)
    for number in stopping:
        signal.signal(number, signal.default_int_handler)
    # Blocked, signals wait until sigwait takes them: none comes amid anything.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*stopping, signal.SIGCHLD})
    from cluster.config import ConfigError
    from cluster.deployment_file import deployment_of, read_deployment

    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping)  # a pipe may never end
    text = read_deployment(args.config)
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    config = deployment_of(text, args.config, args.overrides)
    if args.detach and config.ray.address == "local":
        raise ConfigError("--detach needs a running Ray cluster: a local Ray ends with this process; set ray.address")
    with serving(config, "detach" if args.detach else "stay") as (child, control):
        while child.poll() is None:
            if signal.sigwait({*stopping, signal.SIGCHLD}) in stopping:
                return _stop(child, control, config, stopping)
        return exit_code(child)


@contextmanager
def serving(config: "DeploymentConfig", how: str) -> "Iterator[tuple[subprocess.Popen[bytes], socket.socket]]":
    """The process that serves (cli/serving.py), and the socket that tells what became of it, during the block.

    Afterwards nothing is left of what it had started, however it ended. how: see cli.serving.main.
    """
    from cluster.local_rays import forget_local_ray
    from cluster.marked_processes import VARIABLE, end_marked, mark_of_this_process

    control, theirs = socket.socketpair()
    mark = mark_of_this_process()
    child = subprocess.Popen(
        _python("cli.serving", str(theirs.fileno()), how, config.model_dump_json()),
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # the terminal's Ctrl-C is for this process alone
        env=_environment() | {VARIABLE: mark},
        cwd=_working_directory(),
    )
    theirs.close()
    try:
        yield child, control
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})  # a second Ctrl-C
        control.close()
        end_marked(mark, child.pid)
        child.wait()
        forget_local_ray(child.pid)


def _stop(
    child: "subprocess.Popen[bytes]",
    control: socket.socket,
    config: "DeploymentConfig",
    stopping: set[signal.Signals],
) -> int:
    """Stop at a signal; running requests finish first, unless another comes. Returns the exit code.

    A local Ray is ended by whoever ends what `serving` has started. On a running one, parts must be
    removed: by the child, or else, if Ray ended it first, by a `drover stop`. Raises DroverError.
    """
    has_served = _has_served(control)
    say("stopping ...")
    if has_served:
        _let_finish(child, control, stopping, config.frontend.grace_s + _FINISHED_S)
    if config.ray.address != "local":
        control.close()
        try:
            is_clean = child.wait(_TEARDOWN_S) == 0
        except subprocess.TimeoutExpired:
            is_clean = False
        if not is_clean and not _removed(config):
            namespace = config.ray.namespace
            raise DroverError(f"parts of it may still run; see drover status --namespace {namespace}, then drover stop")
    say("stopped")
    return 0 if has_served else 128 + signal.SIGINT


def _let_finish(
    child: "subprocess.Popen[bytes]", control: socket.socket, stopping: set[signal.Signals], timeout_s: float
) -> None:
    """Return once no request runs, the child has ended, or another signal comes; after timeout_s in any case."""
    lines, deadline_s = b"", time.monotonic() + timeout_s
    try:
        control.sendall(b"f")
        while (
            lines.count(b"\n") < 2 and child.poll() is None and time.monotonic() < deadline_s
        ):  # the first was sent when it began to serve
            if select.select([control], [], [], 0)[0]:
                piece = control.recv(4096)
                if not piece:
                    return
                lines += piece
            elif signal.sigtimedwait(stopping, 0.1) is not None:
                return
    except OSError:
        return  # it has just ended


def _removed(config: "DeploymentConfig") -> bool:
    """Remove the deployment by a new process; whether nothing of it is left."""
    arguments = ["stop", "--namespace", config.ray.namespace]
    if config.ray.address != "auto":
        arguments += ["--ray-address", config.ray.address]
    try:
        done = subprocess.run(
            _python("cli.main", *arguments), timeout=_TEARDOWN_S, capture_output=True, check=False, env=_environment()
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 or b"nothing runs" in done.stderr


def exit_code(child: "subprocess.Popen[bytes]") -> int:
    """What this command ends with, once the child has by itself. Raises DroverError if the child could not say why."""
    code: int = child.returncode
    if code in (0, 1):
        return code
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    raise DroverError(f"the process that serves was ended {how}; everything that it had started is ended, too")


def _has_served(control: socket.socket) -> bool:
    """Whether the child has said so; at the end of the stream it has not."""
    return bool(select.select([control], [], [], 0)[0]) and control.recv(1) != b""


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", _SERVING.format(root=_ROOT, module=module), *arguments]


def _working_directory() -> str:
    """This process's, unless it was deleted: oneMKL, for one, ends a process that has none."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _environment() -> dict[str, str]:
    """With Drover's root first in PYTHONPATH, for Ray's workers, and without the working directory."""
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", ".", _ROOT)]
    return os.environ | {"PYTHONPATH": os.pathsep.join([_ROOT, *others])}
