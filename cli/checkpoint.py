"""`drover checkpoint`: write a checkpoint with random weights, or inspect one."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.config import DTYPES, RopeScaling
from checkpoint.naming import ARCHITECTURES
from cli.arguments import real, whole

if TYPE_CHECKING:
    from checkpoint.inspect import Report

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# The names in checkpoint/shape.py, which imports torch.
SHAPES = ("demo", "maverick", "scout")

MAKE_DESCRIPTION = """\
Write a checkpoint with random weights: a complete Hugging Face Llama 4
directory with weights, configuration, tokenizer and chat template. It speaks
gibberish, but costs as much to serve as a real model of its shape. It is meant
for tests and measurements.

Start from a --shape and change what you like. Sizes in bfloat16:

  demo      55 MB   Maverick's layers, made small
  scout    216 GB   Llama 4 Scout
  maverick 800 GB   Llama 4 Maverick
"""
MAKE_EPILOG = """\
examples:
  drover checkpoint make /tmp/demo
  drover checkpoint make /tmp/mini --shape maverick --layers 8 \\
      --hidden-size 512 --heads 8 --kv-heads 2 --head-dim 64 \\
      --expert-size 1024 --dense-size 2048 --vocab-size 32000
"""
INSPECT_DESCRIPTION = """\
Show a checkpoint's shape, parameters, bytes by role and KV cache per token.
List everything that is missing, damaged or inconsistent. Reads no weights, so
it is fast. Exits with 1 if there are problems: serving would refuse it.
"""
INSPECT_EPILOG = """\
example:
  drover checkpoint inspect /models/Llama-4-Scout-17B-16E-Instruct
"""

EPILOG = """\
examples:
  drover checkpoint make /tmp/demo
  drover checkpoint inspect /tmp/demo
"""

# Flag, field of ModelShape (and of config.json), meaning.
_SIZES = (
    ("--layers", "num_hidden_layers", "transformer layers"),
    ("--hidden-size", "hidden_size", "width of the residual stream"),
    ("--heads", "num_attention_heads", "query heads, a multiple of --kv-heads"),
    ("--kv-heads", "num_key_value_heads", "key/value heads"),
    ("--head-dim", "head_dim", "width of a head, even"),
    ("--experts", "num_local_experts", "routed experts per MoE layer"),
    ("--experts-per-token", "num_experts_per_tok", "routed experts that a token uses"),
    ("--moe-every", "interleave_moe_layer_step", "every n-th layer is MoE: 1 in Scout, 2 in Maverick"),
    ("--expert-size", "intermediate_size", "width of one expert, and of the shared expert"),
    ("--dense-size", "intermediate_size_mlp", "width of the MLP of dense layers"),
    ("--vocab-size", "vocab_size", "number of tokens"),
    ("--chunk-size", "attention_chunk_size", "tokens per chunk of the layers with chunked attention"),
    ("--floor-scale", "floor_scale", "tokens after which attention temperature first rises"),
    ("--max-positions", "max_position_embeddings", "longest sequence, tokens"),
)


def add_parser(subparsers: "Subparsers") -> None:
    """Add `drover checkpoint make` and `drover checkpoint inspect` to the command line."""
    parser = subparsers.add_parser(
        "checkpoint",
        help="write a random checkpoint, or inspect one",
        description="Write a checkpoint with random weights, or inspect any checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_make(actions)
    inspect = actions.add_parser(
        "inspect",
        help="show what a checkpoint holds and what is wrong with it",
        description=INSPECT_DESCRIPTION,
        epilog=INSPECT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("directory", type=Path, metavar="DIR", help="a Hugging Face Llama 4 directory")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")


def _add_make(actions: "Subparsers") -> None:
    make = actions.add_parser(
        "make",
        help="write a checkpoint with random weights",
        description=MAKE_DESCRIPTION,
        epilog=MAKE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("directory", type=Path, metavar="OUT", help="new or empty directory")
    make.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUT holds")
    make.add_argument("--shape", choices=SHAPES, default="demo", help="the shape to start from; default: %(default)s")

    shape = make.add_argument_group("changes to --shape")
    for flag, field, meaning in _SIZES:
        shape.add_argument(flag, dest=field, type=whole(1), metavar="N", help=meaning)
    shape.add_argument(
        "--qk-norm",
        dest="use_qk_norm",
        action=argparse.BooleanOptionalAction,
        help="normalise queries and keys, as Scout does",
    )
    shape.add_argument(
        "--rope-scaling",
        type=_rope_scaling,
        metavar="F,LOW,HIGH,N",
        help="llama3 scaling: factor, low and high frequency factor, original context; Scout: 16,1,1,8192; or: none",
    )
    shape.add_argument(
        "--tie-word-embeddings", action=argparse.BooleanOptionalAction, help="use the embedding as output head"
    )

    weights = make.add_argument_group("weights and files")
    weights.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of weights; default: %(default)s")
    weights.add_argument(
        "--std",
        type=real(0, above=True),
        default=0.02,
        metavar="S",
        help="standard deviation of weights; default: %(default)s",
    )
    weights.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="the same seed gives the same weights; default: 0"
    )
    weights.add_argument(
        "--architecture",
        choices=tuple(ARCHITECTURES),
        default="Llama4ForCausalLM",
        help="the class in config.json; default: %(default)s",
    )
    weights.add_argument(
        "--max-file-mb", type=whole(1), default=5000, metavar="MB", help="start a new file at this size; default: 5000"
    )


def run(args: argparse.Namespace) -> int:
    """Make or inspect; 1 if an inspected checkpoint has problems."""
    return _make(args) if args.action == "make" else _inspect(args)


def _make(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from checkpoint.inspect import inspect_checkpoint
    from checkpoint.random_model import write_random_checkpoint
    from checkpoint.shape import SHAPES as shapes

    fields = [field for _, field, _ in _SIZES] + ["use_qk_norm", "tie_word_embeddings"]
    changes: dict[str, Any] = {field: getattr(args, field) for field in fields if getattr(args, field) is not None}
    if args.rope_scaling is not None:
        changes["rope_scaling"] = args.rope_scaling or None
    shape = replace(shapes[args.shape], **changes)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        write_random_checkpoint(
            args.directory,
            shape,
            dtype=args.dtype,
            std=args.std,
            seed=args.seed,
            architecture=args.architecture,
            max_file_bytes=args.max_file_mb * 1_000_000,
            overwrite=args.overwrite,
            on_progress=lambda written, total: progress.update(task, completed=written, total=total),
        )
    print(f"{args.directory}: {_summary(inspect_checkpoint(args.directory))}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from checkpoint.errors import CheckpointError
    from checkpoint.inspect import inspect_checkpoint
    from frontend.chat_template import ChatTemplate

    report = inspect_checkpoint(args.directory)
    try:
        ChatTemplate.open(args.directory)
    except CheckpointError as error:
        if str(error) not in report.problems:  # one in a file that the tokenizer has, too
            report = replace(report, problems=(*report.problems, str(error)))
    if args.json:
        print(report.to_json())
    else:
        _show(report)
    return 1 if report.problems else 0


def _show(report: "Report") -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{report.directory}: {_summary(report)}")
    table = Table.grid(padding=(0, 2))
    config = report.config
    if config is not None:
        moe, chunked = len(config.moe_layers), sum(layer.is_chunked for layer in config.layers)
        rope = f"rope scaled by {config.rope_scaling.factor:g}" if config.rope_scaling else "rope not scaled"
        table.add_row("layers", f"{config.num_layers}: {moe} MoE, {config.num_layers - moe} dense")
        experts = f"{config.num_experts} per MoE layer, {config.experts_per_token} per token, 1 shared"
        table.add_row("experts", experts if moe else "none: serve it with shards.count 0")
        table.add_row("widths", f"{config.hidden_size}, expert {config.intermediate_size}")
        table.add_row("attention", f"{config.num_heads} heads, {config.num_kv_heads} KV heads of {config.head_dim}")
        table.add_row("", f"{chunked} layers in chunks of {config.attention_chunk_size} tokens, the rest global")
        table.add_row("positions", f"{config.max_position_embeddings}, {rope}")
        table.add_row("vocabulary", f"{config.vocab_size} tokens")
    if report.kv_bytes_per_token is not None:
        table.add_row("KV cache", f"{report.kv_bytes_per_token} bytes per token in global layers")
        table.add_row("", f"{report.kv_bytes_per_token_in_chunk} more in chunked layers, for one chunk at most")
    table.add_row("stored as", ", ".join(report.dtypes) or "nothing")
    for role, nbytes in report.bytes_by_role.items():
        table.add_row("", f"{decimal(nbytes):>9}  {role}")
    table.add_row("tokenizer", "yes" if report.has_tokenizer else "no")
    table.add_row("chat template", "yes" if report.has_chat_template else "no: it cannot chat")
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow")
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red")
    if not report.problems:
        console.print("no problems", style="green")


def _summary(report: "Report") -> str:
    from rich.filesize import decimal

    files = "1 file" if report.num_files == 1 else f"{report.num_files} files"
    stored = f"{decimal(sum(report.bytes_by_role.values()))} in {files}"
    if report.total_parameters is None or report.active_parameters is None:
        return stored
    total, active = _count(report.total_parameters), _count(report.active_parameters)
    return f"{total} parameters, {active} active per token, {stored}"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _rope_scaling(text: str) -> RopeScaling | tuple[()]:
    """An argparse type. "none" gives (): None: the flag was not given."""
    if text == "none":
        return ()
    try:
        factor, low, high, positions = text.split(",")
        return RopeScaling(float(factor), float(low), float(high), int(positions))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither none nor like 16,1,1,8192") from None
