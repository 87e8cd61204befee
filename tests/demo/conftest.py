"""Which tests are of the training, outside `make test`; and a small tokenizer, made once for each file of tests."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.demo.tiny import byte_tokenizer

HERE = Path(__file__).parent
# What users get: the checkpoint in the repository, as it is served.
SHIPPED = HERE / "test_shipped.py"


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.path != SHIPPED:
            item.add_marker(pytest.mark.training)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return byte_tokenizer(folder)
