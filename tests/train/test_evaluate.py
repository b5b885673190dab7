"""Accuracy, agreement and output error against plain numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import DataError
from edgeprune.train.dataset import DataSet
from edgeprune.train.evaluate import agreement, evaluate, output_error


class Table(nn.Module):
    """Sample i (its first number) -> row i of a table, and twice that row."""

    def __init__(self, table, both=False):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float32))
        self.both = both

    def forward(self, x):
        rows = self.table[x[:, 0].long()]
        return (rows, 2 * rows + 1) if self.both else rows


RNG = np.random.default_rng(0)
ONE, OTHER = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 6))
LABELS = RNG.integers(0, 6, 40)


def data(labelled=True):
    x = np.arange(40, dtype=np.float32)[:, None]
    return DataSet.from_arrays(x, LABELS if labelled else None)


@pytest.mark.parametrize("batch_size", [1, 7, 40, 250])
def test_top1(batch_size):
    assert evaluate(Table(ONE), data(), batch_size=batch_size) == np.mean(ONE.argmax(1) == LABELS)
    assert evaluate(Table(ONE), data(labelled=False)) is None


def test_agreement_and_error():
    same = float(np.mean(ONE.argmax(1) == OTHER.argmax(1)))
    assert agreement(Table(ONE), Table(OTHER), data(False), batch_size=9) == same
    error = ((ONE - OTHER) ** 2).sum() / (OTHER**2).sum()
    np.testing.assert_allclose(output_error(Table(ONE), Table(OTHER), data(), batch_size=9), error, rtol=1e-5)
    second = (4 * (ONE - OTHER) ** 2).sum() / ((2 * OTHER + 1) ** 2).sum()
    both = output_error(Table(ONE, True), Table(OTHER, True), data(False))
    np.testing.assert_allclose(both, (error + second) / 2, rtol=1e-5)
    assert output_error(Table(ONE), Table(ONE), data()) == 0


def test_a_limit_is_a_mixture_of_samples():
    """Data sorted by class is not judged by its first class."""
    order = np.argsort(LABELS)
    by_class = data().subset(order)
    seen = [int(i) for x, _ in by_class.batches(5, limit=20, shuffle_seed=0) for i in x[:, 0]]
    expected = np.mean(ONE.argmax(1)[seen] == LABELS[seen])
    assert evaluate(Table(ONE), by_class, limit=20) == expected
    assert len(set(LABELS[seen])) > 3


def test_outputs_that_are_no_scores():
    maps = Table(RNG.normal(size=(40, 2, 3)))
    assert evaluate(maps, data()) is None
    assert agreement(maps, maps, data()) is None


def test_the_mode_of_a_network_is_left_as_it_was():
    module = Table(ONE).train()
    evaluate(module, data())
    assert module.training


def test_a_network_that_cannot_take_the_batch():
    with pytest.raises(DataError, match="cannot take a batch of shape"):
        evaluate(nn.Linear(3, 2), data())
