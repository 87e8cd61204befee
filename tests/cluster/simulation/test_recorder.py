"""What is written down of a simulation."""

import doctest

import numpy as np

from cluster.simulation import recorder


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(recorder) == (0, 1)


def test_shards_without_experts_do_not_count_and_layers_without_rows_neither() -> None:
    rows_LS = np.array([[4, 2, 0, 0], [0, 0, 0, 0]])
    assert recorder.imbalance(rows_LS, [0, 1]) == 4 / 3
    assert recorder.imbalance(rows_LS[1:], [0, 1]) is None
