"""A small tokenizer, made once for each file of tests."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.demo.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return byte_tokenizer(folder)
