"""`drover simulate`: what would a deployment do, with other parts, other traffic, other limits?"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.errors import DroverError

if TYPE_CHECKING:
    from cluster.simulation.scenario import Scenario

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DESCRIPTION = """\
Compute how a deployment would behave, without running it. Schedulers, replica
choice, placement and autoscaling are the real ones; the time that computing,
links and loading take is modelled. Hundreds of shards fit on a laptop.

Prints how tokens per second, the gaps between a stream's tokens, balance,
copies of experts and bytes moved develop. docs/simulation.md has the formulas,
and how far the simulator is off the live cluster.

SCENARIO is a YAML file; deploy/simulation.yaml shows every key with its default.
Without one, all keys have their defaults: the embedded model on 4 shards, each
on a machine of round numbers. The same scenario and seed give the same figures,
bit for bit.

Exit codes: 0 done; 1 failed, stderr says why; 2 wrong usage; 130 Ctrl-C.
"""
EPILOG = """\
examples:
  drover simulate
  drover simulate deploy/simulation.yaml --plot scaling.png
  drover simulate --set shards.count=16 --set traffic.requests_per_s=40
  drover simulate --set traffic.shape=closed --set traffic.streams=32   # no arrivals: 32 streams at once
  drover simulate --set routing.source=trace --set 'routing.kinds=[chat]'
  drover simulate --set 'routing.hot=[{experts: 4, share: 0.6}]'        # 4 experts get hot for a minute
  drover simulate --costs bench/simulation.json                         # of a machine that was measured
  drover simulate --set 'faults=[{shard: 1, at_s: 30}]' --json result.json
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover simulate` to the command line."""
    parser = subparsers.add_parser(
        "simulate",
        help="compute how a deployment would behave",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", type=Path, nargs="?", metavar="SCENARIO", help="a YAML file; default: all defaults")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of the file, such as shards.count=16; may be repeated",
    )
    parser.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="take the section costs from there; bench/simulation.json has measured ones",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write scenario, summary, rows and decisions there; - is stdout"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw them; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    """Simulate, print, write, draw."""
    from cluster.simulation.scenario_file import load_scenario

    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise DroverError(f"{option} is {path}, whose folder does not exist")
    if args.plot is not None:
        from cluster.simulation import plot

        plot.check()
    result = _simulated(load_scenario(args.scenario, args.overrides, args.costs))
    if args.json is not None:
        text = json.dumps(result, indent=1)
        if str(args.json) == "-":
            print(text)
        else:
            _write(args.json, text + "\n")
    if args.plot is not None:
        plot.draw(result, args.plot)
    if str(args.json) != "-":
        from rich.console import Console

        from cli.simulate_tables import tables

        console = Console(highlight=False, markup=False)
        for table in tables(result):
            console.print(table)
    return 0


def _simulated(scenario: "Scenario") -> dict[str, Any]:
    """The result; meanwhile a bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from cluster.simulation.simulation import Simulation

    simulation = Simulation(scenario)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=scenario.duration_s)
        try:
            return simulation.run(lambda now_s: progress.update(task, completed=now_s))
        except KeyboardInterrupt:
            progress.stop()
            of = f"{simulation.now_s:.0f} s of {scenario.duration_s:.0f} s"
            print(f"\nstopped after {of}; nothing was written", file=sys.stderr)
            raise


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise DroverError(f"--json is {path}, which cannot be written: {error.strerror}") from None
