"""The process that holds Ray and a deployment, for `drover serve`. See cli/serve.py, which starts it.

Signals never reach it: Ray has handlers of its own, which end the process amid anything. Its
control socket says when to end: when the other end is closed, on purpose or because that process
was killed. A byte that comes before lets running requests finish first.
"""

import _thread
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from checkpoint.errors import DroverError
from cli.say import say

if TYPE_CHECKING:
    from cluster.config import DeploymentConfig
    from cluster.launch import Deployment

# For removing what was started on a running cluster, which may no longer answer.
GIVE_UP_S = 60.0
LOOK_S = 1.0


def main(argv: Sequence[str]) -> NoReturn:
    """Serve. argv: the control socket's descriptor, how, the deployment as JSON.

    how: "stay" until the deployment ends; "quietly", the same without a word on stdout; "detach".
    Once it serves, a line of JSON goes over the control socket: name, address and start_s. Another
    line, once it was asked to finish and has done so.
    """
    descriptor, how, deployment_json = argv
    control = socket.socket(fileno=int(descriptor))
    from cli.progress import StartProgress
    from cluster import launch, ray_runtime
    from cluster.config import DeploymentConfig

    config = DeploymentConfig.model_validate_json(deployment_json)
    try:
        asked_to_finish = threading.Event()
        ending = (control, asked_to_finish, config.ray.address == "local")
        threading.Thread(target=_end_with, args=ending, daemon=True).start()
        with StartProgress() as progress:
            deployment = launch.start(config, progress)
        served = {"name": config.name, "address": deployment.address, "start_s": deployment.start_s}
        control.sendall(json.dumps(served).encode() + b"\n")
        if how != "quietly":
            say(_served(deployment))
        if how == "detach":
            ray_runtime.disconnect()
            _end(0)
        if how == "stay":
            say(f"Ctrl-C ends it, or: drover stop --namespace {config.ray.namespace}")
        _end(_stay(config, control, asked_to_finish))
    except DroverError as error:
        print(f"drover: error: {error}", file=sys.stderr)
        _end(1)


def _end(exit_code: int) -> NoReturn:
    """End at once: what is left of a local Ray is the parent's to end; Ray's own way out takes seconds, or aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _stay(config: "DeploymentConfig", control: socket.socket, asked_to_finish: threading.Event) -> int:
    """Return once the deployment is gone, was asked to end, or Ray has died."""
    from cluster import ray_runtime, teardown
    from cluster.finish import finish_requests
    from cluster.head_watch import HeadWatch
    from cluster.names import part_names

    watch, was_away = HeadWatch(config.ray.address == "local"), False
    try:
        while True:  # Ray tells nobody when an actor ends
            away = watch.look()
            if away:
                print(away, file=sys.stderr, flush=True)
            elif away is None and not part_names(config.ray.namespace):
                if was_away:
                    raise DroverError(f"Ray's head has come back without its records, and so without {config.name}")
                print("the deployment was stopped from elsewhere", file=sys.stderr)
                return 0
            was_away = away is not None
            if asked_to_finish.wait(LOOK_S):
                finish_requests(config, lambda text: print(text, file=sys.stderr, flush=True))
                control.sendall(b"finished\n")
                asked_to_finish.clear()
    except KeyboardInterrupt:
        teardown.end(config)
        ray_runtime.disconnect()
        return 0


def _end_with(control: socket.socket, asked_to_finish: threading.Event, is_local: bool) -> None:
    """Pass on the byte that asks to finish; once the other end of `control` is closed, end this process."""
    from cluster.local_rays import forget_local_ray
    from cluster.marked_processes import VARIABLE, end_marked

    with suppress(OSError):
        while control.recv(1):
            asked_to_finish.set()
    if is_local:  # all of Ray has this process's mark
        end_marked(os.environ[VARIABLE], os.getpid())
        forget_local_ray()
        os._exit(0)
    _thread.interrupt_main()  # removes from the cluster what was started there
    time.sleep(GIVE_UP_S)  # the main thread ends the process, unless it hangs in Ray
    os._exit(1)


def _served(deployment: "Deployment") -> str:
    address = deployment.address
    return f"{deployment.config.name} is served on {address}; try: drover generate 'Hello' --address {address}"
