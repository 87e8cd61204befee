"""`python -m bench`: the benchmark's command line."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.workload import PARTS
from checkpoint.errors import DroverError

DESCRIPTION = """\
Measure Drover on this machine, beside llama.cpp and vLLM, in bf16 and on the same weights.

A Llama 4 of 862 M parameters with random weights (Maverick's shape, made on first use) decodes greedily: 128-token
prompts, 128 tokens of output, so many streams at once. `drover` is a real deployment through gRPC, its load generator a
process of its own; `drover-one-process` is the same model without Ray and gRPC; the peers run without a server.
"""
EPILOG = """\
parts:
  closed   every system at every concurrency; repeats alternate between the systems
  open     Drover with requests of mixed lengths at random times: how many meet their targets
  prefix   Drover with prompts that share a long prefix: what a prefix cache saves
  shards   Drover with 1, 2, 4 and 8 expert shards, 32 streams
  long     a small model: a prompt of 100,000 tokens beside 8 chats, and how much slower these become

A run of some parts leaves the other parts' figures in the file, unless closed is among them.

examples:
  python -m bench                                  # everything: about 25 minutes on 2 cores
  python -m bench --quick                          # 1 and 8 streams, one repeat: about 2 minutes
  python -m bench --systems drover,vllm --concurrency 32 --repeats 5 --parts closed
  python -m bench --router-threads 1 --shards 2 --shard-threads 1 --parts closed --systems drover
  python -m bench --checkpoint /models/my-llama4
"""
ROOT = Path(__file__).parents[1]
SYSTEMS = ("drover", "drover-one-process", "llama.cpp", "vllm")
MOST_STREAMS = 256


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--quick", action="store_true", help="a short run, to see that all works; --out is then not README's"
    )
    made.add_argument("--parts", type=_names("part", PARTS), default=None, metavar="A,B", help=f"of {','.join(PARTS)}")
    made.add_argument(
        "--systems", type=_names("system", SYSTEMS), default=SYSTEMS, metavar="A,B", help=f"of {','.join(SYSTEMS)}"
    )
    made.add_argument("--concurrency", type=_counts, default=None, metavar="N,N", help="streams; default: 1,8,32,64")
    made.add_argument("--repeats", type=_count, default=None, metavar="N", help="of the closed loop; default: 3")
    made.add_argument("--checkpoint", type=Path, metavar="DIR", help="another bf16 Llama 4, which no token must end")
    made.add_argument("--threads", type=_count, default=2, metavar="N", help="of every system but drover; default: 2")
    made.add_argument("--router-threads", type=_count, default=2, metavar="N", help="of drover; default: 2")
    made.add_argument("--shards", type=_count, default=1, metavar="N", help="of drover; default: 1")
    made.add_argument("--shard-threads", type=_count, default=2, metavar="N", help="of each shard; default: 2")
    made.add_argument("--rates", type=_rates, default=(1, 2, 4, 8, 16), metavar="R,R", help="open loop, requests/s")
    made.add_argument("--duration", type=_count, default=30, metavar="S", help="of arrivals at each rate; default: 30")
    made.add_argument("--lock", type=Path, metavar="FILE", help="on a shared machine: hold this lock while measuring")
    made.add_argument(
        "--out", type=Path, metavar="FILE", help="default: bench/results.json; with --quick .bench/quick.json"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 1 it did not work, 2 wrong usage, 130 Ctrl-C."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # systems are processes, and must be ended
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _run(args)
    except DroverError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench: stopped; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from bench import benchmark, results, table
    from bench.checkpoint import ensure_checkpoint
    from bench.drover_server import ClusterShape
    from bench.errors import BenchError
    from bench.systems import Setting
    from checkpoint.config import read_config

    say = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
    work = ROOT / ".bench"
    work.mkdir(exist_ok=True)
    out = args.out or (work / "quick.json" if args.quick else ROOT / "bench" / "results.json")
    if not out.absolute().parent.is_dir():
        raise BenchError(f"--out is {out}, whose folder does not exist")
    concurrency = args.concurrency or ((1, 8) if args.quick else (1, 8, 32, 64))
    if args.checkpoint is None:
        checkpoint = work / "maverick-mini"
        if not (checkpoint / "config.json").exists():
            say(f"writing the benchmark's checkpoint, 1.7 GB, to {checkpoint}")
        config = ensure_checkpoint(checkpoint)
    else:
        checkpoint = args.checkpoint.resolve()
        config = read_config(checkpoint)
    setting = Setting(
        checkpoint,
        work,
        ClusterShape(args.router_threads, args.shards, args.shard_threads),
        args.threads,
        max(benchmark.SHARD_STREAMS, 64, *concurrency),
    )
    plan = benchmark.Plan(
        setting=setting,
        parts=args.parts or (("closed",) if args.quick else PARTS),
        systems=args.systems,
        concurrency=concurrency,
        repeats=args.repeats or (1 if args.quick else 3),
        rates=args.rates,
        duration_s=args.duration,
        lock=args.lock,
    )
    say(f"drover: {setting.shape}; other systems: {setting.threads} threads")
    found = benchmark.with_parts_kept(out, benchmark.run(plan, config, say))
    results.write(out, found)
    table.show(found, Console(highlight=False, markup=False, width=160))
    say(f"written to {out}; `python -m bench.plot` draws it")
    return 0


def _names(kind: str, known: Sequence[str]) -> "_List":
    return _List(kind, known)


class _List:
    """An argparse type: names out of `known`, separated by commas."""

    def __init__(self, kind: str, known: Sequence[str]) -> None:
        self._kind, self._known = kind, known

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in self._known:
                raise argparse.ArgumentTypeError(f"{name!r} is no {self._kind}; known are {', '.join(self._known)}")
        return names


def _count(text: str) -> int:
    count = int(text) if text.strip().isdecimal() else 0
    if not 1 <= count <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 1000")
    return count


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(sorted({_count(part) for part in text.split(",")}))
    if counts[-1] > MOST_STREAMS:
        raise argparse.ArgumentTypeError(f"{counts[-1]} streams are more than {MOST_STREAMS}")
    return counts


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate <= 1000 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} are no rates above 0 and at most 1000, such as 1,2,4")
    return rates


if __name__ == "__main__":
    raise SystemExit(main())
