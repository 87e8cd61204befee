"""What the cluster's tests share: one local Ray, one deployment at a time, and the tiny reference models.

Processes are what these tests spend their time on: each imports Ray, and most import torch.
"""

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from cluster import ray_runtime
from cluster.launch import Deployment
from tests.cluster.deployment import SharedRay
from tests.cluster.two_of_each import CHANGES, MODEL
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


@pytest.fixture(scope="module")
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    """The model of `two_of_each`. Modules with another model have their own."""
    return reference_of(MODEL)


@pytest.fixture(scope="module")
def two_of_each(shared_ray: SharedRay, reference: Reference) -> Deployment:
    return shared_ray.serve(reference.directory, **CHANGES)
