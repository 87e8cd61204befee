"""The model that the engine's tests share."""

import pytest

from router.model.llama4 import Model
from tests.local_model import load_model
from tests.reference import Reference, make_reference
from tests.router.engines import COMPANY, NUM_SHARDS


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """16 experts, attention chunks of 16 tokens."""
    return make_reference(tmp_path_factory.mktemp("scout"), "scout")


@pytest.fixture(scope="module")
def model(reference: Reference) -> Model:
    return load_model(reference.directory, num_shards=NUM_SHARDS)


@pytest.fixture(scope="module")
def greedy_tokens(reference: Reference) -> dict[str, list[int]]:
    """What transformers says to each request of COMPANY."""
    return {
        request.request_id: reference.greedy(list(request.prompt_token_ids), request.sampling.max_tokens)[0]
        for request in COMPANY
    }
