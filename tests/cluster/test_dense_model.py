"""A dense Llama 4, such as Llama Guard 4, on a cluster: there are no experts, so there are no shards."""

from pathlib import Path

import pytest

from client import Client
from cluster.config import ConfigError
from tests.cluster.deployment import SharedRay
from tests.reference import Reference, make_served_reference, prompt


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory: Path = tmp_path_factory.mktemp("dense")
    return make_served_reference(directory, "maverick-4-experts", interleave_moe_layer_step=0, moe_layers=[])


def test_a_dense_model_is_served_without_shards(shared_ray: SharedRay, dense: Reference) -> None:
    deployment = shared_ray.serve(dense.directory, shards={"count": 0})
    tokens = list(prompt(11))
    with Client(deployment.address) as client:
        assert client.health("drover.v1.Inference") == "SERVING"
        stream = client.generate(tokens, max_tokens=15, temperature=0)
        assert [token_id for delta in stream for token_id in delta.token_ids] == dense.greedy(tokens, 15)[0]


def test_shards_for_a_dense_model_are_refused_with_the_fix(shared_ray: SharedRay, dense: Reference) -> None:
    shared_ray.clear()
    with pytest.raises(ConfigError, match=r"shards\.count is 2; this model is dense, .*: set it to 0"):
        shared_ray.serve(dense.directory, shards={"count": 2})
