"""Systems as processes: what they speak, how they end, and the line of one that is absent."""

import sys
import time
from pathlib import Path

import pytest

from bench import benchmark
from bench.drover_server import ClusterShape
from bench.errors import BenchError
from bench.process import ROOT, Worker
from bench.systems import LLAMA_CPP, NAMES, VLLM, Setting, make_systems
from bench.worker import Request

ECHO = """
from bench.worker import Stream, serve_jobs
def start():
    print("chatter of a library", flush=True)
    return run
def run(requests):
    print("more of it", flush=True)
    return [Stream([0.5] * r.max_tokens, r.token_ids[: r.max_tokens]) for r in requests], {"experts_hit": 2.0}
serve_jobs(start)
"""


def setting(work: Path) -> Setting:
    return Setting(work / "mini", work, ClusterShape(), 1, 64)


def test_a_worker_answers_job_after_job(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Worker("echo", [sys.executable, "-c", ECHO], log) as worker:
        for ids in ([1, 2, 3], [4, 5, 6]):
            answer = worker.ask([Request(ids, 2)])
            assert (answer.streams[0].token_ids, answer.streams[0].token_s) == (ids[:2], [0.5, 0.5])
            assert answer.facts == {"experts_hit": 2.0}
    assert log.read_text() == "chatter of a library\nmore of it\nmore of it\n"


def test_a_worker_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    source = "import sys; sys.exit('no such model')"
    with pytest.raises(BenchError, match=r"vllm ended by itself.*\n  no such model"):
        Worker("vllm", [sys.executable, "-c", source], tmp_path / "log")


def test_a_worker_takes_along_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    source = (
        f"import subprocess; p = subprocess.Popen(['sleep', '1000']); open({str(child)!r}, 'w').write(str(p.pid))\n"
    )
    with Worker("echo", [sys.executable, "-c", source + ECHO], tmp_path / "log"):
        process = Path(f"/proc/{child.read_text()}")
        assert process.exists()
    deadline_s = time.monotonic() + 60.0
    while process.exists() and "Z" not in (process / "stat").read_text():  # nobody is told when a grandchild ends
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_importing_a_worker_takes_the_standard_library_only(tmp_path: Path) -> None:
    # The peers' interpreters run it, too: they have neither Drover's packages nor its folders' needs.
    source = "import sys, bench.worker, bench.peers; assert not {'torch', 'grpc', 'rich'} & set(sys.modules)\n" + ECHO
    with Worker("bare", [sys.executable, "-S", "-c", source], tmp_path / "log") as worker:
        assert worker.ask([Request([1], 1)]).streams[0].token_ids == [1]


def test_an_absent_peer_is_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    plan = benchmark.Plan(setting(tmp_path), ("closed",), NAMES, (1,), 1, (1.0,), 1)
    systems = benchmark.present(plan, said.append)
    assert [system.name for system in systems] == ["drover", "drover-one-process"]
    assert [line.split(" is left out: it is not installed in ")[0] for line in said] == [LLAMA_CPP, VLLM]
    assert all(line.endswith("`make bench-peers` installs it") for line in said)


def test_with_no_system_left_there_is_nothing_to_run(tmp_path: Path) -> None:
    plan = benchmark.Plan(setting(tmp_path), ("closed",), (VLLM,), (1,), 1, (1.0,), 1)
    with pytest.raises(BenchError, match="none of vllm can run here"):
        benchmark.present(plan, lambda line: None)


def test_the_peers_are_where_make_puts_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for system in (make_systems(setting(Path(".bench")))[name] for name in (LLAMA_CPP, VLLM)):
        assert system.absent_reason is None or Path(".bench").name in system.absent_reason
    assert "$(BENCH)/venv-llama-cpp/" in makefile
    assert "$(BENCH)/venv-vllm/" in makefile
