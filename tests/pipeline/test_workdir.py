"""What lets the same command go on: the shrunk network as it was, and for no other run."""

import pytest
import torch
from torch import nn

from edgeprune.errors import VerificationError
from edgeprune.graph.lift import lift
from edgeprune.pipeline import workdir
from edgeprune.pipeline.certificate import certify
from edgeprune.pipeline.shrink import Shrunk
from edgeprune.plan.problem import Plan, Recipe


def network(stride=1, size=16):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, stride=stride, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return lift(module.eval(), [(1, 3, size, size)])


def shrunk(original):
    from edgeprune.pipeline.apply import apply_recipe

    recipe = Recipe((Plan({"0": 5}, keep={"0": (0, 2, 3, 5, 7)}),))
    return Shrunk(recipe, apply_recipe(original, recipe), 1.0, 2.0, 1, ())


def test_a_kept_network_comes_back_with_the_biases_it_was_given(tmp_path):
    original = network()
    kept = shrunk(original)
    kept.network.module.get_submodule("0").bias = nn.Parameter(torch.arange(5.0))
    workdir.store(tmp_path, "key", kept)
    back = workdir.recall(tmp_path, "key", original)
    x = original.random_inputs(2)[0]
    torch.testing.assert_close(back.network.module(x), kept.network.module(x), rtol=0, atol=0)
    assert back.recipe == kept.recipe
    assert workdir.recall(tmp_path, "other", original) is None
    workdir.forget(tmp_path)
    assert workdir.recall(tmp_path, "key", original) is None


def test_a_torn_file_is_ignored(tmp_path):
    original = network()
    workdir.store(tmp_path, "key", shrunk(original))
    path = tmp_path / workdir.NAME
    path.write_bytes(path.read_bytes()[:100])
    assert workdir.recall(tmp_path, "key", original) is None


def test_blocks_taken_out_before_a_search_are_kept(tmp_path):
    assert workdir.recall_blocks(tmp_path, "key") is None
    for removed in (("a", "b"), ()):  # none is an answer too
        workdir.store_blocks(tmp_path, "key", removed)
        assert workdir.recall_blocks(tmp_path, "key") == removed
        assert workdir.recall_blocks(tmp_path, "other") is None
    (tmp_path / workdir.BLOCKS).write_text("{")
    assert workdir.recall_blocks(tmp_path, "key") is None
    workdir.store_blocks(tmp_path, "key", ("a",))
    workdir.forget(tmp_path)
    assert workdir.recall_blocks(tmp_path, "key") is None


def test_the_key_tells_apart_what_changes_the_result():
    keys = {
        workdir.digest(network(), {"budget": "60%"}, []),
        workdir.digest(network(stride=2), {"budget": "60%"}, []),
        workdir.digest(network(size=20), {"budget": "60%"}, []),
        workdir.digest(network(), {"budget": "50%"}, []),
        workdir.digest(network(), {"budget": "60%"}, [torch.ones(1, 3, 16, 16)]),
    }
    assert len(keys) == 5
    assert workdir.digest(network(), {"budget": "60%"}, []) in keys


def test_the_certificate_of_a_right_cut_is_tiny_and_of_a_broken_network_an_error():
    original = network()
    recipe = shrunk(original).recipe
    assert certify(original, recipe) < 1e-5
    with torch.no_grad():
        original.module.get_submodule("2").weight.fill_(float("nan"))
    with pytest.raises(VerificationError, match="step 1"):
        certify(original, recipe)
