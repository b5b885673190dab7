"""What names a run, so that another one does not go on with its files."""

import types

import numpy as np
import pytest

from edgeprune.pipeline.budget import parse_budget
from edgeprune.pipeline.job import Job, _options
from edgeprune.train.dataset import DataSet


def options(**changes):
    given = {"network": None, "budget": parse_budget("60%"), "target": None, "method": "cap", **changes}
    return _options(Job(**given), types.SimpleNamespace(fingerprint={"board": "here"}))


@pytest.mark.parametrize(
    "change", [{"budget": parse_budget("50%")}, {"method": "taylor"}, {"planner": "hbgs"}, {"images": 7}, {"seed": 3}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_everything_that_decides_the_shrunk_network_is_in_the_key(change):
    assert options(**change) != options()
    assert options() == options()


def test_what_figures_are_taken_on_is_not_in_the_key():
    """With other test images the same command goes on where it was."""
    x = np.zeros((4, 3, 8, 8), np.float32)
    assert options(test=DataSet.from_arrays(x, np.arange(4))) == options(test=DataSet.from_arrays(x[:2])) == options()
