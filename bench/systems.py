"""The systems that are compared: how each is started, and why it may be absent."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.closed import Asked
from bench.drover_server import ClusterShape, serving
from bench.errors import BenchError
from bench.process import ROOT, Worker, last_lines
from kernels.openmp import WAITING_THREADS

DROVER, ONE_PROCESS, LLAMA_CPP, VLLM = "drover", "drover-one-process", "llama.cpp", "vllm"
NAMES = (DROVER, ONE_PROCESS, LLAMA_CPP, VLLM)
PEERS = (LLAMA_CPP, VLLM)


@dataclass(frozen=True)
class Setting:
    """What all systems of a benchmark share. work: for logs, peers and what is made of the checkpoint."""

    checkpoint: Path
    work: Path
    shape: ClusterShape
    threads: int
    max_streams: int


class System(Protocol):
    """One of NAMES."""

    @property
    def name(self) -> str: ...

    @property
    def absent_reason(self) -> str | None:
        """None if it can run here; else a line that says why not, and what would help."""
        ...

    def running(self) -> AbstractContextManager[Asked]:
        """Start it; it has ended when the block is left. Raises BenchError."""
        ...


def make_systems(setting: Setting) -> dict[str, System]:
    """All systems, by name, none of them started."""
    checkpoint, threads, streams = str(setting.checkpoint), str(setting.threads), str(setting.max_streams)
    gguf = setting.work / f"{setting.checkpoint.name}.gguf"
    return {
        DROVER: Cluster(setting),
        ONE_PROCESS: InWorker(
            ONE_PROCESS,
            Path(sys.executable),
            ("bench.one_process", checkpoint, threads, streams),
            setting.work,
            WAITING_THREADS,
        ),
        LLAMA_CPP: LlamaCpp(
            LLAMA_CPP,
            setting.work / "venv-llama-cpp" / "bin" / "python",
            ("bench.peers.llama_cpp", str(gguf), threads),
            setting.work,
            checkpoint=setting.checkpoint,
            gguf=gguf,
        ),
        VLLM: InWorker(
            VLLM,
            setting.work / "venv-vllm" / "bin" / "python",
            ("bench.peers.vllm_cpu", checkpoint, streams),
            setting.work,
            {"OMP_NUM_THREADS": threads},
        ),
    }


@dataclass(frozen=True)
class Cluster:
    """Drover as users run it, through gRPC; the load generator is a process of its own."""

    setting: Setting
    name: str = DROVER
    absent_reason: None = None

    @contextmanager
    def running(self) -> Iterator[Asked]:
        setting = self.setting
        with (
            serving(setting.checkpoint, setting.shape, setting.max_streams, setting.work) as address,
            Worker(
                "the load generator", [sys.executable, "-m", "bench.load", address], setting.work / "load.log"
            ) as load,
        ):
            yield load


@dataclass(frozen=True)
class InWorker:
    """A system that is a worker (bench/worker.py) by itself. module: the module to run and its arguments."""

    name: str
    interpreter: Path
    module: tuple[str, ...]
    work: Path
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def absent_reason(self) -> str | None:
        if self.interpreter.exists():
            return None
        venv = self.interpreter.parents[1]
        return f"{self.name} is left out: it is not installed in {venv}; `make bench-peers` installs it"

    @contextmanager
    def running(self) -> Iterator[Asked]:
        command = [str(self.interpreter), "-m", *self.module]
        with Worker(self.name, command, self.work / f"{self.name}.log", self.env) as worker:
            yield worker


@dataclass(frozen=True)
class LlamaCpp(InWorker):
    """llama.cpp reads a format of its own, into which the checkpoint is converted first."""

    checkpoint: Path = Path()
    gguf: Path = Path()

    @contextmanager
    def running(self) -> Iterator[Asked]:
        self._convert()
        with super().running() as worker:
            yield worker

    def _convert(self) -> None:
        if self.gguf.exists() and self.gguf.stat().st_mtime >= (self.checkpoint / "config.json").stat().st_mtime:
            return
        log = self.work / "to_gguf.log"
        command = [str(self.interpreter), "-m", "bench.peers.to_gguf", str(self.checkpoint), str(self.gguf)]
        with log.open("wb") as output:
            done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False)
        if done.returncode:
            raise BenchError(f"{self.checkpoint} cannot be converted for {self.name}; {last_lines(log)}")
