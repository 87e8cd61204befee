"""`python -m demo.compare`: is a mixture better than a dense model at a fixed training budget?

Two arms, the shipped shape and its dense twin of the same active parameters, and several seeds. The two arms of a seed
train at the same time, each on one core, on the same windows in the same order, with a constant learning rate (so that
any point of the curve is a fair end). Budgets are counted in processor time, which the other arm cannot take away; on a
GPU, whose time it does not count, compare the curves over tokens only.
Writes demo/comparison.json and demo/comparison.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from demo.command import at_least_one, exit_code
from demo.corpus import read_corpus
from demo.data import WINDOW, Windows
from demo.errors import DemoError
from demo.figures import draw_comparison
from demo.scoring import score
from demo.shapes import DENSE_TWIN, SHIPPED
from demo.sources import KINDS
from demo.train import WORK, prepared_text
from demo.training import BATCH, Run, Step

FOLDER = Path(__file__).parent
ARMS = {"mixture": SHIPPED, "dense": DENSE_TWIN}
SCORE_EVERY = 50  # steps
_SCORED_CHARACTERS = 40_000  # of each kind of validation text
_MOST_STEPS = 20_000  # the plan of windows is made for so many


def main() -> int:
    """Run every pair that has not been run yet, then compare."""
    parser = argparse.ArgumentParser(prog="python -m demo.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.0, help="processor time of each run; default: %(default)s")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="pairs of runs; default: %(default)s")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # one run, in a process of its own
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error("--minutes is above 0")
    if args.arm:
        run_arm(args.arm, args.seed, args.minutes * 60)
        return 0
    with Progress(console=Console(stderr=True)) as progress:
        prepared_text(progress)
        for seed in progress.track(range(args.seeds), description="pairs of runs"):
            _run_pair(seed, args.minutes)
    runs = [json.loads(_result(arm, seed, args.minutes * 60).read_text()) for seed in range(args.seeds) for arm in ARMS]
    draw_comparison(runs, FOLDER / "comparison.png")
    summary = {"minutes": args.minutes, "seeds": [compared(runs, seed) for seed in range(args.seeds)], "runs": runs}
    (FOLDER / "comparison.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(_table(summary["seeds"]))
    return 0


def run_arm(arm: str, seed: int, budget_s: float) -> None:
    """Train until the budget of processor time is spent, scoring on the way; the scoring is not counted."""
    torch.set_num_threads(1)
    with Progress(disable=True) as progress:
        text = prepared_text(progress)
    sample = validation_sample(read_corpus(WORK / "corpus" / "validation.jsonl"))
    run = Run(ARMS[arm], _MOST_STEPS, seed, None, decay=False)
    windows = Windows(text, _MOST_STEPS * BATCH, seed)
    run.warm_up(windows)
    curve: list[dict[str, float]] = []

    def on_step(step: Step) -> bool:
        over = step.cpu_s >= budget_s
        if over or step.number % SCORE_EVERY == 0:
            bits = score(run.model, text.tokenizer, sample).bits_per_byte
            tokens = step.number * BATCH * WINDOW
            curve.append({"tokens": tokens, "cpu_s": round(step.cpu_s, 1), "bits_per_byte": round(bits, 4)})
            print(
                f"{arm} seed {seed}: {step.cpu_s:.0f} s, {tokens / 1e6:.1f} M tokens, {bits:.4f} bits/byte", flush=True
            )
        return not over

    run.train(windows, on_step)
    if run.done == _MOST_STEPS:
        raise DemoError(f"{arm}: all {_MOST_STEPS} steps were done before the budget was; give fewer --minutes")
    parameters = sum(weight.numel() for weight in run.model.parameters())
    result = {"arm": arm, "seed": seed, "parameters": parameters, "curve": curve}
    path = _result(arm, seed, budget_s)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")


def validation_sample(documents: list[Any]) -> list[str]:
    """The beginning of the validation text, as much of each kind."""
    texts = []
    for kind in KINDS:
        joined = "\n\n".join(document.text for document in documents if document.kind == kind)
        texts.append(joined[:_SCORED_CHARACTERS])
    return texts


def compared(runs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """One seed's pair: bits per byte at the last count of tokens that both reached, and at the end of the budget."""
    mixture, dense = (next(run["curve"] for run in runs if (run["arm"], run["seed"]) == (arm, seed)) for arm in ARMS)
    by_tokens = {point["tokens"]: point["bits_per_byte"] for point in dense}
    both = max(point["tokens"] for point in mixture if point["tokens"] in by_tokens)
    at_tokens = next(point["bits_per_byte"] for point in mixture if point["tokens"] == both)
    return {
        "seed": seed,
        "equal_tokens": {"tokens": both, "mixture": at_tokens, "dense": by_tokens[both]},
        "equal_time": {
            arm: {
                "tokens": curve[-1]["tokens"],
                "cpu_s": curve[-1]["cpu_s"],
                "bits_per_byte": curve[-1]["bits_per_byte"],
            }
            for arm, curve in (("mixture", mixture), ("dense", dense))
        },
    }


def _run_pair(seed: int, minutes: float) -> None:
    missing = [arm for arm in ARMS if not _result(arm, seed, minutes * 60).exists()]
    command = [sys.executable, "-m", "demo.compare", "--minutes", str(minutes), "--seed", str(seed), "--arm"]
    runs = [subprocess.Popen([*command, arm]) for arm in missing]
    try:
        failed = [arm for arm, run in zip(missing, runs, strict=True) if run.wait() != 0]
    finally:
        for run in runs:
            run.terminate()
            run.wait()
    if failed:
        raise DemoError(f"seed {seed}: the {' and the '.join(failed)} run failed")


def _result(arm: str, seed: int, budget_s: float) -> Path:
    return WORK / "comparison" / f"{budget_s:g}-s" / f"{arm}-{seed}.json"


def _table(seeds: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | equal tokens | mixture | dense | equal time: mixture (tokens) | dense (tokens) |",
        "|---|---|---|---|---|---|",
    ]
    for pair in seeds:
        tokens, time = pair["equal_tokens"], pair["equal_time"]
        cells = [f"{time[arm]['bits_per_byte']:.3f} ({time[arm]['tokens'] / 1e6:.1f} M)" for arm in ARMS]
        lines.append(
            f"| {pair['seed']} | {tokens['tokens'] / 1e6:.1f} M | {tokens['mixture']:.3f} | {tokens['dense']:.3f} "
            f"| {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
