"""`python -m bench.chaos`: the fault bench's command line."""

import argparse
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from bench.chaos.schedule import ALLOWED, CYCLES, HOSTS, MODES, TARGETS
from bench.errors import BenchError
from checkpoint.errors import DroverError

ROOT = Path(__file__).parents[2]
DESCRIPTION = """\
Break a real deployment under load, and see what its streams notice.

An open loop at a fixed rate keeps at least 8 streams active. Each fault waits until all is well, comes at random or
at a named point of the code, and is healed. Then every token is compared: in fp32 with one process that computed the
same requests; in bf16 each token must be within 1e-2 of the best logit. A fault counts only if something rose that
recovers from it. The result is a table and bench/chaos.json; `python -m bench.chaos.plot` draws it.
"""
EPILOG = f"""\
modes:
{
    chr(10).join(
        f"  {name:15} {mode.help}{' (needs root)' if mode.layout == HOSTS or mode.needs_root else ''}"
        for name, mode in MODES.items()
    )
}

targets:
{chr(10).join(f"  {name:15} {text}" for name, text in TARGETS.items())}

examples:
  python -m bench.chaos                                       # everything: about 45 minutes for each dtype
  python -m bench.chaos --seed 7                              # other moments, points and victims
  python -m bench.chaos --modes crash --targets shard --cycles 1      # about 1 minute
  python -m bench.chaos --modes stop,deadlock --replicas 1 --dtype bfloat16
  python -m bench.chaos --modes random --cycles 100 --leaks   # 100 composed faults, then: does anything leak?
  make chaos SEED=7 CHAOS_ARGS="--modes crash"
"""


PAIRS = tuple(f"{mode}:{target}" for mode in MODES for target in ALLOWED[mode])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.chaos",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--seed", type=_count(0, 2**31), default=1, metavar="N", help="of the schedule; default: 1")
    made.add_argument("--modes", type=_names("mode", MODES), metavar="A,B", help="default: all that can run here")
    made.add_argument("--targets", type=_names("target", (*TARGETS, *PAIRS)), metavar="A,B",
                      help="of all modes, or of one as in crash:router; default: each mode's own")  # fmt: skip
    made.add_argument("--cycles", type=_count(1, 1000), default=CYCLES, metavar="N",
                      help="through a mode's targets; default: 3, or more until there are 9 faults")  # fmt: skip
    made.add_argument("--no-points", action="store_true", help="faults at random only, at no named point")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    made.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the embedded model; `benchmark`: the "
                      "benchmark's 862 M parameters, made on first use")  # fmt: skip
    made.add_argument("--shards", type=_count(1, 64), default=5, metavar="N", help="default: 5")
    made.add_argument("--replicas", type=_count(1, 8), default=2, metavar="N", help="of each expert; default: 2")
    made.add_argument("--routers", type=_count(1, 8), default=2, metavar="N", help="default: 2")
    made.add_argument("--frontends", type=_count(1, 8), default=2, metavar="N", help="replicas; default: 2")
    made.add_argument("--heal-s", type=_count(1, 600), default=60, metavar="S", help="the deployment's heal_s")
    made.add_argument("--rate", type=float, metavar="R", help="requests/s; default: measured, for about 12 streams")
    made.add_argument("--quiet-s", type=_count(1, 600), default=15, metavar="S", help="before the first fault")
    made.add_argument("--leaks", action="store_true", help="compare processes, descriptors, ports before and after")
    made.add_argument("--out", type=Path, default=ROOT / "bench" / "chaos.json", metavar="FILE",
                      help="default: bench/chaos.json")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 as expected, 1 losses or failure, 2 wrong usage, 130 Ctrl-C."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started must be ended
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _run(args)
    except DroverError as error:
        print(f"chaos: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nchaos: stopped; finished modes are in the file", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace) -> int:
    from bench.chaos.bench import Plan, run

    if not args.out.absolute().parent.is_dir():
        raise BenchError(f"--out is {args.out}, whose folder does not exist")
    return run(Plan.of(args))


def _count(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return parse


def _names(kind: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in known:
                plain = ", ".join(name for name in known if ":" not in name)
                raise argparse.ArgumentTypeError(f"{name!r} is no {kind}; known are {plain}")
        return names

    return parse


if __name__ == "__main__":
    raise SystemExit(main())
