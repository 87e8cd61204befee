"""One running deployment, as clients meet it: bad input, health, reflection, cancellation, strangers."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from checkpoint.tokenizer import Tokenizer
from client import Client, DeadlineExceeded, InvalidRequest, NotFound, ResourceExhausted
from cluster.launch import Deployment
from cluster.metrics_reader import read_page
from cluster.reports import Batch
from protos.drover.v1 import inference_pb2 as pb
from protos.drover.v1 import inference_pb2_grpc
from router.counts.requests import EngineStats
from router.errors import AlreadyExists
from router.request import GenerationRequest, SamplingParams, TokenDelta
from tests.cluster.deployment import NAMESPACE, SCOUT, SharedRay, actor, http_get, router_stats
from tests.command import ROOT, drover, start
from tests.loopback import failure_of
from tests.processes import PATIENCE_S, wait_until
from tests.reference import Reference, prompt

HELLO = list(prompt(6))


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of(SCOUT[0])


@pytest.fixture(scope="module")
def deployment(shared_ray: SharedRay, reference: Reference) -> Deployment:
    return shared_ray.serve(reference.directory, **SCOUT[1])


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with Client(deployment.address) as client:
        yield client


def engine_stats() -> EngineStats:
    stats = router_stats().engine
    assert stats is not None
    return stats


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""  # gone


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "an empty prompt of text": ({"prompt": ""}, "prompt"),
    "an empty prompt of tokens": ({"prompt": []}, "prompt"),
    "a token id out of range": ({"prompt": [1, 400]}, "prompt.token_ids: contains 400"),
    "a prompt longer than the context": ({"prompt": HELLO * 84}, "prompt.token_ids: has at least 504 tokens"),
    "a prompt of 3 MB": ({"prompt": "many words " * 300_000}, "prompt.text"),
    "more tokens than the context holds": ({"max_tokens": 495}, "sampling.max_tokens: is 495"),
    "no tokens": ({"max_tokens": 0}, "sampling.max_tokens: is 0"),
    "a negative number of tokens": ({"max_tokens": -1}, "sampling.max_tokens: is -1"),
    "a negative temperature": ({"temperature": -0.5}, "sampling.temperature: is -0.5"),
    "a temperature that is no number": ({"temperature": float("nan")}, "sampling.temperature: is nan"),
    "an infinite temperature": ({"temperature": float("inf")}, "sampling.temperature: is inf"),
    "top_p of 0": ({"top_p": 0.0}, "sampling.top_p: is 0"),
    "top_p of 2": ({"top_p": 2.0}, "sampling.top_p: is 2"),
    "a negative top_k": ({"top_k": -1}, "sampling.top_k: is -1"),
    "too many logprobs": ({"logprobs": 21}, "sampling.logprobs: is 21"),
    "a stop token out of range": ({"stop_token_ids": [400]}, "sampling.stop_token_ids: contains 400"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_input_names_the_field_and_the_server_goes_on(name: str, client: Client) -> None:
    changes, message = BAD_REQUESTS[name]
    request: dict[str, Any] = {"prompt": HELLO, "max_tokens": 4} | changes
    with pytest.raises(InvalidRequest) as error:
        list(client.generate(request.pop("prompt"), **request))
    assert message in str(error.value)
    assert sum(len(delta.token_ids) for delta in client.generate(HELLO, max_tokens=4, temperature=0)) == 4


def test_an_unknown_model_is_not_found(client: Client) -> None:
    with pytest.raises(NotFound, match="tiny-scout"):
        list(client.generate(HELLO, model="gpt-2"))


def test_malformed_utf8_is_invalid_argument(deployment: Deployment) -> None:
    not_utf8 = b"\x12\x03ab\xff"  # GenerateRequest.text of three bytes, the last of which no UTF-8 has
    with grpc.insecure_channel(deployment.address) as channel:
        call = channel.unary_stream("/drover.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError) as error:
            list(call(not_utf8, timeout=PATIENCE_S))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt.text" in error.value.details() or "text: is not valid UTF-8" in error.value.details()


def test_a_replica_of_serve_has_the_limits_of_every_server(deployment: Deployment) -> None:
    """Serve has no setting for them; a Ray that no longer takes them from where they are put fails here."""
    with grpc.insecure_channel(deployment.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        too_large, compressed = pb.TokenizeRequest(text="x" * 5_000_000), pb.TokenizeRequest(text="x" * 1_000_000)
        error = failure_of(lambda: stub.Tokenize(too_large, timeout=PATIENCE_S))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in error.details()
        gzip = grpc.Compression.Gzip
        error = failure_of(lambda: stub.Tokenize(compressed, timeout=PATIENCE_S, compression=gzip))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_request_that_can_never_fit_is_refused(client: Client) -> None:
    with pytest.raises(ResourceExhausted, match=r"engine\.kv_bytes"):
        list(client.generate(HELLO, max_tokens=494))


def test_a_full_queue_refuses_and_loses_nothing(client: Client) -> None:
    """4 run, 12 wait, more are refused; those that were admitted are all answered."""
    outcomes: list[str] = []

    def ask() -> None:
        try:
            deltas = list(client.generate(HELLO, max_tokens=50, temperature=0, timeout_s=PATIENCE_S))
            outcomes.append(f"{sum(len(delta.token_ids) for delta in deltas)} tokens")
        except ResourceExhausted as error:
            outcomes.append("refused" if "engine.max_waiting" in str(error) else str(error))

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert set(outcomes) == {"50 tokens", "refused"}
    assert len(outcomes) == 40


def test_a_deadline_ends_the_request_and_frees_its_work(client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        list(client.generate(HELLO, max_tokens=300, timeout_s=0.05))
    wait_until(lambda: engine_stats().kv_bytes_used == 0)


def test_a_cancelled_request_frees_its_work(client: Client) -> None:
    stream = client.generate(HELLO, max_tokens=300)
    next(stream)
    assert engine_stats().running == 1
    stream.close()
    wait_until(lambda: engine_stats().running == 0)
    assert engine_stats().kv_bytes_used == 0


def endings(deployment: Deployment) -> dict[str, float]:
    """How many requests ended how, as the metrics page tells."""
    families = text_string_to_metric_families(http_get(deployment, "/metrics")[2])
    samples = [s for family in families for s in family.samples if s.name == "drover_request_success_total"]
    return {sample.labels["finished_reason"]: sample.value for sample in samples}


def test_a_request_is_counted_as_its_client_saw_it_end(client: Client, deployment: Deployment) -> None:
    tokenizer = Tokenizer.open(deployment.config.checkpoint)
    letters = dict.fromkeys(tokenizer.encode("abcdefghij ", add_bos=False), 60.0)  # it writes nothing else
    before = endings(deployment)
    *_, last = client.generate(HELLO, max_tokens=300, seed=5, logit_bias=letters, stop=["a"])
    assert (last.finish_reason, last.stop_string) == ("stop", "a")
    with client.generate(HELLO, max_tokens=300, seed=5, logit_bias=letters) as stream:
        next(stream)
    wait_until(lambda: engine_stats().running == 0)
    after = endings(deployment)
    more = {ending: after[ending] - before[ending] for ending in after}
    assert {ending: count for ending, count in more.items() if count} == {"stop": 1, "cancelled": 1}


def test_a_client_that_dies_frees_its_work(deployment: Deployment) -> None:
    arguments = ("generate", "hello", "--max-tokens", "300", "--address", deployment.address)
    with start(*arguments) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
    wait_until(lambda: engine_stats().running == 0)


def test_a_batch_of_tokens_that_was_lost_on_the_way_comes_again(deployment: Deployment, reference: Reference) -> None:
    """What a frontend does by hand: a batch is repeated until a pull names it as received."""
    router = actor("router-0")

    def pull(receipt: int) -> Batch:
        batch: Batch = ray.get(router.pull.remote("by hand", receipt), timeout=PATIENCE_S)
        return batch

    batches = [pull(-1)]
    assert batches[0].deltas == []
    request = GenerationRequest("lost-and-found", tuple(HELLO), SamplingParams(max_tokens=12, temperature=0))
    ray.get(router.submit.remote("by hand", [request]), timeout=PATIENCE_S)
    while not (batches[-1].deltas and batches[-1].deltas[-1].is_last):
        batch = pull(batches[-1].number)
        assert pull(batches[-1].number) == batch
        batches.append(batch)
    token_ids = [token_id for batch in batches for delta in batch.deltas for token_id in delta.token_ids]
    assert token_ids == reference.greedy(HELLO, 12)[0]
    assert len({batch.number for batch in batches}) == len(batches)


def test_an_id_that_comes_twice_is_adopted_from_its_own_frontend_and_refused_from_another(
    deployment: Deployment, reference: Reference
) -> None:
    router = actor("router-0")
    request = GenerationRequest("twice", tuple(HELLO), SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
    numbers = {"mine": -1, "another's": -1}

    def read_to_end(frontend_id: str) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        while not (deltas and deltas[-1].is_last):
            batch: Batch = ray.get(router.pull.remote(frontend_id, numbers[frontend_id]), timeout=PATIENCE_S)
            numbers[frontend_id] = batch.number
            deltas += batch.deltas
        return deltas

    for frontend_id in ("mine", "mine", "another's"):
        ray.get(router.submit.remote(frontend_id, [request]), timeout=PATIENCE_S)
    [refused] = read_to_end("another's")
    assert isinstance(refused.error, AlreadyExists)
    deltas = read_to_end("mine")
    assert [delta.first for delta in deltas] == [*range(200)]
    assert deltas[-1].error is None


def test_a_frontend_that_was_forgotten_while_idle_loses_no_token(client: Client, reference: Reference) -> None:
    list(client.generate(HELLO, max_tokens=1))
    wait_until(lambda: router_stats().frontends == 0)
    deltas = client.generate(HELLO, max_tokens=8, temperature=0, timeout_s=PATIENCE_S)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == reference.greedy(HELLO, 8)[0]


def metrics(deployment: Deployment) -> dict[str, float]:
    """The metrics of the deployment: sums over the label values of each."""
    status, content_type, text = http_get(deployment, "/metrics")
    assert status == 200, text
    assert content_type.startswith("text/plain; version=0.0.4")
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny-scout"
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def test_metrics_of_the_whole_deployment_on_one_page(deployment: Deployment, client: Client) -> None:
    before = metrics(deployment)
    for _ in range(3):
        assert sum(len(delta.token_ids) for delta in client.generate(HELLO, max_tokens=8, ignore_eos=True)) == 8
    now = metrics(deployment)
    more = {name: value - before.get(name, 0.0) for name, value in now.items()}
    assert now["drover_up"] == 4
    assert now["drover_shard_linked"] == 3
    assert more["drover_generation_tokens_total"] == 24
    assert more["drover_request_success_total"] == more["drover_time_to_first_token_seconds_count"] == 3
    assert more["drover_inter_token_latency_seconds_count"] == 21
    assert more["drover_step_phase_seconds_total"] == pytest.approx(more["drover_step_seconds_sum"])
    assert more["drover_shard_rows_total"] == more["drover_shard_rows_computed_total"] > 0
    assert now["drover_expert_balancedness"] > 0


def test_a_path_that_is_not_there_is_not_found(deployment: Deployment) -> None:
    status, _, text = http_get(deployment, "/metric")
    assert (status, text) == (404, "/metric is not here; /metrics is\n")


def test_metrics_of_a_router_that_is_away_come_in_time_and_say_so(deployment: Deployment) -> None:
    page = read_page("tiny-scout", ("router-9",), ("shard-0", "shard-9"), NAMESPACE, timeout_s=2.0).decode()
    assert page.startswith("# router-9 did not answer within 2 s\n")
    up = [s for family in text_string_to_metric_families(page) for s in family.samples if s.name == "drover_up"]
    assert [(s.labels["part"], s.value) for s in up] == [("router-9", 0), ("shard-0", 1), ("shard-9", 0)]


def test_the_frontend_loads_no_torch(deployment: Deployment) -> None:
    """Whatever Ray, Serve and the way that classes travel may import besides our own modules."""
    replica = f"ray::ServeReplica:drover.{NAMESPACE}"
    folders = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    maps = [(entry / "maps").read_text() for entry in folders if replica in command_line(entry)]
    assert maps
    assert [name for name in ("libtorch", "llvmlite") if any(name in text for text in maps)] == []


def test_health_follows_the_standard(client: Client) -> None:
    assert client.health("") == "SERVING"
    assert client.health("drover.v1.Inference") == "SERVING"
    with pytest.raises(NotFound):
        client.health("drover.v1.Nonsense")


STRANGER = (Path(__file__).parent / "stranger.py").read_text()


def test_a_stranger_with_reflection_alone_gets_the_reference_tokens(
    deployment: Deployment, reference: Reference, tmp_path: Path
) -> None:
    expected = reference.greedy(HELLO, 12)[0]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, deployment.address, json.dumps(HELLO)],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["token_ids"] == expected
    assert {"drover.v1.Inference", "grpc.health.v1.Health"} <= set(answer["services"])


def test_a_stranger_with_the_proto_alone_gets_the_reference_tokens(
    deployment: Deployment, reference: Reference, tmp_path: Path
) -> None:
    (tmp_path / "inference.proto").write_bytes((ROOT / "protos/drover/v1/inference.proto").read_bytes())
    compiled = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--grpc_python_out=."]
    subprocess.run([*compiled, "inference.proto"], cwd=tmp_path, check=True, timeout=PATIENCE_S)
    code = """
import sys; sys.path.insert(0, ".")
import grpc, inference_pb2 as pb, inference_pb2_grpc as rpc
stub = rpc.InferenceStub(grpc.insecure_channel(sys.argv[1]))
greedy = pb.SamplingParams(max_tokens=12, temperature=0)
request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=eval(sys.argv[2])), sampling=greedy)
print([t for response in stub.Generate(request, timeout=60) for t in response.token_ids])
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, deployment.address, json.dumps(HELLO)],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == reference.greedy(HELLO, 12)[0]


def test_the_command_line_answers_in_json(deployment: Deployment, reference: Reference) -> None:
    sampling = ("--max-tokens", "8", "--temperature", "0", "--logprobs", "5", "--json")
    done = drover("generate", "--token-ids", "1,2,3", *sampling, "--address", deployment.address)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["token_ids"] == reference.greedy([1, 2, 3], 8)[0]
    assert [len(entry["top"]) for entry in answer["logprobs"]] == [5] * 8
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "cached_tokens": 0}
