"""Records a real terminal: `drover chat` above; below a shard is killed, or one is added, and the answer goes on.

python -m bench.chaos.recording failover|resize [OUT]     # needs tmux

It writes OUT.cast (asciinema) and OUT.svg, by default docs/failover or docs/resize.

A tmux of its own shows both halves. What it draws is the recording: nothing is made up or cut.
"""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.chaos.bench import EMBEDDED
from bench.chaos.system import Shape, System
from bench.chaos.terminal_svg import Frame, svg
from bench.errors import BenchError
from bench.process import ROOT
from checkpoint.errors import DroverError

COLUMNS, ROWS, SHELL_ROWS = 96, 36, 16
FRAME_S, KEY_S = 0.1, 0.03
ANSWER_S = 60.0
QUESTION = "What is a transformer?"
CHAT = "drover chat --address {address} --temperature 0.7 --seed 7 --min-tokens 330 --max-tokens 330"
QUESTIONS = (QUESTION, "What is an expert?", "What is attention?", "What is a router?", "What is a token?")
PROMPT = "\n>"


@dataclass(frozen=True)
class Scene:
    """play: what is typed, and what is waited for. highlight: lines with it stand out."""

    title: str
    shape: Shape
    highlight: str
    play: Callable[["Terminal", System], None]


class Terminal:
    """A tmux server of its own with two panes, attached to a pseudo terminal that is recorded."""

    def __init__(self, folder: Path, commands: Path) -> None:
        """commands: a folder with the `drover` command."""
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self._shell = ["env", f"PATH={commands}:{os.environ['PATH']}", "PS1=$ ", f"PYTHONPATH={ROOT}", "bash", "--norc"]
        self.began_s = time.monotonic()
        self.events: list[tuple[float, str]] = []
        self.frames: list[Frame] = []
        self._ended = threading.Event()

    def __enter__(self) -> "Terminal":
        self.tmux("new-session", "-d", "-s", "main", "-x", str(COLUMNS), "-y", str(ROWS), *self._shell)
        self.tmux("set", "-g", "status", "off")
        self.tmux("split-window", "-v", "-l", str(SHELL_ROWS), "-t", "main", *self._shell)
        pid, self._fd = pty.fork()
        if pid == 0:
            os.environ["TERM"] = "xterm-256color"
            os.execvp("tmux", [*self._tmux, "attach", "-t", "main"])
        self._pid = pid
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._record, self._watch)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads[1].join()
        self.tmux("kill-server")
        self._threads[0].join()
        os.waitpid(self._pid, 0)
        os.close(self._fd)

    def type(self, pane: int, text: str) -> None:
        """Type a line, key by key, as a person does."""
        for key in text:
            self.tmux("send-keys", "-t", f"main.{pane}", "-l", key)
            time.sleep(KEY_S)  # the speed of a person who types
        self.tmux("send-keys", "-t", f"main.{pane}", "Enter")

    def screen(self, pane: int) -> list[str]:
        return self.tmux("capture-pane", "-p", "-t", f"main.{pane}").split("\n")[:-1]

    def wait_for(self, holds: Callable[[str], bool], pane: int, what: str) -> None:
        """Until the pane's text is so. Raises BenchError."""
        deadline_s = time.monotonic() + ANSWER_S
        while not holds("\n".join(self.screen(pane))):
            if time.monotonic() > deadline_s:
                raise BenchError(f"{what} did not come within {ANSWER_S:.0f} s; the screen: {self.screen(pane)}")
            time.sleep(FRAME_S)  # a screen tells nobody that it changes

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"tmux {arguments[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def _record(self) -> None:
        while True:
            select.select([self._fd], [], [])
            try:
                piece = os.read(self._fd, 1 << 16)
            except OSError:
                return  # the terminal is closed
            if not piece:
                return
            self.events.append((time.monotonic() - self.began_s, piece.decode(errors="replace")))

    def _watch(self) -> None:
        while not self._ended.wait(FRAME_S):
            above, below = self.screen(0), self.screen(1)
            lines = [*above, "─" * COLUMNS, *below]
            self.frames.append((time.monotonic() - self.began_s, lines))


def record(scene: Scene, out: Path) -> None:
    """Start a deployment, play, and write OUT.cast and OUT.svg. Raises BenchError."""
    if shutil.which("tmux") is None:
        raise BenchError("tmux is not installed")
    work = ROOT / ".bench" / "chaos"
    work.mkdir(parents=True, exist_ok=True)
    with (
        System(EMBEDDED, scene.shape, work) as system,
        tempfile.TemporaryDirectory() as folder,
        Terminal(Path(folder), Path(sys.executable).parent) as terminal,
    ):
        scene.play(terminal, system)
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": scene.title}
    lines = [header, *([round(at_s, 3), "o", text] for at_s, text in terminal.events)]
    out.with_suffix(".cast").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out.with_suffix(".svg").write_text(svg(terminal.frames, COLUMNS, ROWS, scene.highlight))


def _kill(terminal: Terminal, system: System) -> None:
    terminal.type(0, CHAT.format(address=system.address))
    terminal.wait_for(lambda text: "is listening" in text, 0, "the chat")
    terminal.type(0, QUESTION)
    # Typed before, so that it strikes amid the answer, which takes a few seconds.
    victim = system.actors()["shard-1"]
    terminal.wait_for(lambda text: len(text.split(QUESTION)[-1].split()) > 30, 0, "an answer")
    terminal.type(1, f"kill -9 {victim}    # shard-1")
    terminal.wait_for(lambda text: text.rstrip().endswith(">") or "tokens/s" in text, 0, "the end of the answer")
    terminal.type(1, f"drover status --namespace {system.namespace}")
    terminal.wait_for(lambda text: text.rstrip().endswith("\n$") and "shard-2" in text, 1, "the status")
    time.sleep(1.0)  # so long the recording shows its last screen


def _resize(terminal: Terminal, system: System) -> None:
    terminal.type(0, CHAT.format(address=system.address))
    terminal.wait_for(lambda text: "is listening" in text, 0, "the chat")
    terminal.type(0, QUESTIONS[0])
    terminal.wait_for(lambda text: len(text.split(QUESTIONS[0])[-1].split()) > 10, 0, "an answer")
    terminal.type(1, f"drover resize --shards 3 --namespace {system.namespace}")
    for question in QUESTIONS[1:]:  # an answer takes a few seconds, a new shard more
        terminal.wait_for(lambda text: text.rstrip().endswith(PROMPT), 0, "the end of the answer")
        if "done after" in "\n".join(terminal.screen(1)):
            break
        terminal.type(0, question)
    terminal.wait_for(lambda text: "done after" in text, 1, "the end of the resize")
    terminal.type(1, f"drover events --last 8 --namespace {system.namespace}")
    terminal.wait_for(lambda text: text.rstrip().endswith("\n$") and "operation " in text, 1, "the events")
    time.sleep(2.0)  # so long the recording shows its last screen


SCENES = {
    "failover": Scene(
        "kill -9 of an expert shard amid an answer",
        Shape(shards=3, replicas=2, routers=1, frontends=1),
        "kill -9",
        _kill,
    ),
    "resize": Scene(
        "drover resize --shards 3 amid answers",
        Shape(shards=2, replicas=1, routers=1, frontends=1),
        "drover resize",
        _resize,
    ),
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in SCENES:
        print(f"recording: error: name a scene: {', '.join(SCENES)}", file=sys.stderr)
        return 2
    name = sys.argv[1]
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / name
    try:
        record(SCENES[name], out)
    except DroverError as error:
        print(f"recording: error: {error}", file=sys.stderr)
        return 1
    print(f"written to {out.with_suffix('.cast')} and {out.with_suffix('.svg')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
