"""What the cluster's tests share: one local Ray, one deployment at a time, and the tiny reference models.

Processes are what these tests spend their time on: each imports Ray, and most import torch.
"""

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from cluster import ray_runtime
from tests.cluster.deployment import SharedRay
from tests.reference import Reference, make_served_reference


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[SharedRay]:
    """A deployment on it outlives the module that asked for it: the next may ask for the same."""
    try:
        yield SharedRay()
    finally:
        ray_runtime.disconnect()


@pytest.fixture(scope="session")
def reference_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Tiny reference checkpoints by the name of their model, each made once."""
    return cache(lambda name: make_served_reference(tmp_path_factory.mktemp(name), name))
