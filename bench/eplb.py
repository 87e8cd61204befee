"""DeepSeek's load balancer, fetched at one commit and never part of this repository."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.errors import BenchError

COMMIT = "d52c72d5b2f2fb4c41afbf8eb21366820239913d"
URL = f"https://raw.githubusercontent.com/deepseek-ai/EPLB/{COMMIT}/eplb.py"
SHA256 = "25b37ccd83aef2369c68f2b4bb596608a4f289956d97d9a3504bfd3159459e29"
TIMEOUT_S = 30.0

Rebalance = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def source(cached: Path, given: Path | None) -> bytes:
    """The text of eplb.py: of the file that was given, of the cache, or of the web. Raises BenchError."""
    if given is not None:
        try:
            return _checked(given.read_bytes(), str(given))
        except OSError as error:
            raise BenchError(f"--eplb is {given}: {error.strerror or error}") from None
    if cached.exists():
        return _checked(cached.read_bytes(), f"{cached} (delete it to fetch it again)")
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as answer:
            text = _checked(answer.read(1 << 20), URL)
    except (urllib.error.URLError, OSError) as error:
        raise BenchError(f"{URL} cannot be read: {error}; give a copy of the file with --eplb FILE") from None
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(text)
    return text


def _checked(text: bytes, where: str) -> bytes:
    found = hashlib.sha256(text).hexdigest()
    if found != SHA256:
        raise BenchError(
            f"{where} is not eplb.py of commit {COMMIT[:10]}: its sha256 is {found[:12]}, not {SHA256[:12]}"
        )
    return text


class Eplb:
    """`rebalance_experts` for shards on one node."""

    def __init__(self, text: bytes) -> None:
        """text: as `source` returns it."""
        names: dict[str, Any] = {}
        exec(compile(text, "eplb.py", "exec"), names)
        self._rebalance: Rebalance = names["rebalance_experts"]

    def place(self, load_LE: npt.NDArray[np.float64], num_shards: int, slots: int) -> npt.NDArray[np.int64]:
        """count_LES: copies of each expert on each shard. All slots are filled, also with two of the same."""
        expert_LN, _, _ = self._rebalance(torch.from_numpy(load_LE), num_shards * slots, 1, 1, num_shards)
        count_LES = np.zeros((*load_LE.shape, num_shards), np.int64)
        for count_ES, expert_N in zip(count_LES, expert_LN.numpy(), strict=True):
            np.add.at(count_ES, (expert_N, np.arange(len(expert_N)) // slots), 1)
        return count_LES
