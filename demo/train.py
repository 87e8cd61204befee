"""`python -m demo.train`: corpus, tokenizer, training; `demo.evaluate` and `demo.export` go on from its state."""

import argparse
import signal
import sys
import threading
from collections import deque
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from demo.command import at_least_one, exit_code
from demo.corpus import build_corpus
from demo.data import WINDOW, TrainingText, Windows, load_training_text
from demo.shapes import SHIPPED
from demo.training import BATCH, Run, Step, steps_for

DESCRIPTION = """\
Train the embedded model: fetch and clean the corpus, learn the tokenizer, train. What a stopped run has done is kept in
.demo/, and the same command goes on from there; remove .demo/training to begin anew.
"""
WORK = Path(__file__).parent.parent / ".demo"
TOKENS = 32_768_000  # 4,000 steps
SEED = 0


def main() -> int:
    """Train the shipped model, going on from where the last run was cut off."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=DESCRIPTION)
    parser.add_argument(
        "--tokens",
        type=at_least_one,
        default=TOKENS,
        help="to train on; another number than before redraws the rest of the plan; default: %(default)s",
    )
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with Progress(console=Console(stderr=True)) as progress:
        text = prepared_text(progress)
    run = Run(SHIPPED, steps_for(args.tokens), SEED, WORK / "training")
    if run.done >= run.steps:
        print(f"all {run.steps} steps are done; remove {WORK / 'training'} to begin anew", file=sys.stderr)
        return 0
    windows = Windows(text, run.steps * BATCH, SEED)
    stopping = stop_on_interrupt()
    with TrainingProgress(run) as show:
        run.train(windows, lambda step: show(step) and not stopping.is_set())
    if run.done < run.steps:
        print(f"stopped and saved after step {run.done}; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def stop_on_interrupt() -> threading.Event:
    """Set by the first Ctrl-C, so that the step at hand is finished and saved; the second one ends the process."""
    stopping = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, interrupt)
    return stopping


def prepared_text(progress: Progress) -> TrainingText:
    """Corpus, tokenizer and tokens, made where missing. Raises DemoError when a package cannot be fetched."""
    build_corpus(WORK / "corpus", progress)
    return load_training_text(WORK / "corpus", WORK / "tokenizer", progress)


class TrainingProgress:
    """A bar with the loss, the speed and the remaining time; lines instead where nobody watches."""

    def __init__(self, run: Run) -> None:
        console = Console(stderr=True)
        self._lines = not console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps  loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s  remaining"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bars = Progress(*columns, console=console, disable=self._lines, speed_estimate_period=120)
        self._task = self._bars.add_task("training", total=run.steps, completed=run.done, loss=0.0, speed=0.0)
        self._recent: deque[float] = deque(maxlen=50)

    def __enter__(self) -> "TrainingProgress":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def __call__(self, step: Step) -> bool:
        """Show a step; True, so that the run goes on."""
        self._recent.append(step.loss)
        loss = sum(self._recent) / len(self._recent)
        task = self._bars.tasks[self._task]
        speed = (task.speed or 0.0) * BATCH * WINDOW
        self._bars.update(self._task, completed=step.number, loss=loss, speed=speed)
        if self._lines and step.number % 50 == 0:
            left = "" if task.time_remaining is None else f"  remaining {task.time_remaining / 60:.0f} min"
            progress = f"step {step.number}/{task.total}  loss {loss:.3f}  balance {step.balance:.2f}"
            print(f"{progress}  {speed:,.0f} tokens/s{left}", flush=True)
        return True


if __name__ == "__main__":
    sys.exit(exit_code(main))
