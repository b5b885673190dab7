import pytest
import torch
from nets import images, small
from support import relative_error
from torch import nn

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.fold import fold
from edgeprune.graph.lift import lift
from edgeprune.graph.surgery import cut, remove
from edgeprune.prune.aims import trace_channels
from edgeprune.prune.bn import reestimate
from edgeprune.prune.compensate import compensate
from edgeprune.prune.layer import choose_step
from edgeprune.prune.program import Program, as_batches, divergence, outputs, run


@pytest.fixture(scope="module")
def network():
    return small()


def error(original, network, seed=99):
    batches = as_batches([images(64, seed)], original)
    return divergence(outputs(Program(network), batches), outputs(Program(original), batches))


def test_an_uncut_network_stays_as_it_is(network):
    same = compensate(network, network, [images(64)])
    assert error(network, same) < 1e-9


def test_removed_blocks_are_made_up_for_on_images_not_seen(network):
    smaller = remove(network, [find_blocks(network)[i] for i in (1, 3)])
    before = error(network, smaller)
    repaired = compensate(network, smaller, [images(256)])
    assert before > 0.01
    assert error(network, repaired) < 0.3 * before
    assert error(network, smaller) == before  # what was given is untouched


def test_cut_channels_are_made_up_for(network):
    channels = analyse(network)
    keep = {g.name: range(g.size // 2) for g in channels.groups}
    smaller = cut(network, channels, keep)
    kept = trace_channels(network, lambda n: cut(n, channels, keep))
    before = error(network, smaller)
    with_kept = error(network, compensate(network, smaller, [images(256)], kept=kept))
    without = error(network, compensate(network, smaller, [images(256)]))
    assert with_kept < 0.5 * before
    assert without < before


def test_the_repaired_network_folds_and_keeps_its_function(network):
    smaller = remove(network, find_blocks(network)[1:2])
    repaired = compensate(network, smaller, [images(128)])
    x = images(16, 5)
    with torch.no_grad():
        assert relative_error(fold(repaired).module(x), repaired.module(x)) < 1e-5


def test_refitted_batch_norms_hold_the_statistics_of_the_new_weights(network):
    """So that training can start from the repaired function. (Estimated at the sampled positions.)"""
    smaller = remove(network, find_blocks(network)[1:2])
    data = images(256)
    repaired = compensate(network, smaller, [data])
    path = "blocks.0.bn2"  # before the gap
    norm, old = repaired.module.get_submodule(path), smaller.module.get_submodule(path)
    source = repaired.modules_called()[path][0].all_input_nodes[0].name
    y = torch.cat(run(Program(repaired), as_batches([data], network), [source])[source]).double()
    mean, std = y.mean((0, 2, 3)), y.std((0, 2, 3))
    assert float(((norm.running_mean - mean) / std).abs().max()) < 0.1
    torch.testing.assert_close(norm.running_var.double().sqrt(), std, rtol=0.1, atol=0)
    assert float((old.running_var.double().sqrt() / std - 1).abs().max()) > 0.1


def test_an_exact_repair_is_found():
    """A repeated filter was cut: its twin can take over exactly."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    with torch.no_grad():
        module[0].weight[5], module[0].bias[5] = module[0].weight[2], module[0].bias[2]
    network = lift(module, [(1, 3, 8, 8)])
    channels = analyse(network)
    smaller = cut(network, channels, {"0": range(5)})
    assert error(network, smaller) > 1e-3
    assert error(network, compensate(network, smaller, [images(128)])) < 1e-5


@pytest.mark.parametrize("groups", [2, 8])
def test_grouped_and_depthwise_layers_are_refitted(groups):
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False),
    ).eval()  # fmt: skip
    network = lift(module, [(1, 3, 8, 8)])
    damaged = network.copy()
    with torch.no_grad():
        damaged.module.get_submodule("2").weight.mul_(0.5)
        damaged.module.get_submodule("2").weight.add_(0.05)
        damaged.module.get_submodule("5").weight.mul_(1.5)
    assert error(network, damaged) > 0.05
    assert error(network, compensate(network, damaged, [images(128)])) < 1e-4


def test_a_projection_shortcut_is_handled():
    from cifar import lifted

    network = lifted(14, True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 3, 32, 32, generator=generator)
    smaller = remove(network, [b for b in find_blocks(network) if b.name in ("layer1.1", "layer2.1")])
    y = torch.randn(16, 3, 32, 32, generator=generator)
    with torch.no_grad():
        expected, before = network.module(y), smaller.module(y)
        after = compensate(network, smaller, [x]).module(y)
    assert divergence([after], [expected]) < 0.5 * divergence([before], [expected])


def test_noise_is_not_fitted():
    """Targets that the rows say nothing about: leaving the weights alone serves held-out images best."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(200, 60, generator=generator), torch.ones(200, 1)], 1)
    residual = torch.randn(200, 4, generator=generator)
    residual -= residual.mean(0)
    image = torch.arange(200) // 10
    step = choose_step(rows, residual, image)
    assert step is None or float((rows @ step).square().mean()) < 0.1


def test_behind_a_relu_only_what_it_lets_through_is_fitted():
    """The loss that the steps are said to minimise, against the plain least-squares step."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(800, 10, generator=generator), torch.ones(800, 1)], 1)
    aim = torch.randn(800, 3, generator=generator) + rows[:, :3] - 4 * rows[:, 3:6].relu()
    start = torch.zeros_like(aim)
    image = torch.arange(800) // 20
    plain, rectified = choose_step(rows, aim, image), choose_step(rows, aim, image, start)

    def loss(step):
        given = rows @ step
        return float(torch.where(aim > 0, given - aim, given.clamp_min(0)).square().mean())

    assert loss(rectified) < 0.8 * loss(plain)
    assert float((rows @ rectified - aim).square().mean()) > float((rows @ plain - aim).square().mean())


def test_running_means_of_reestimated_norms_are_those_of_the_data(network):
    changed = network.copy()
    with torch.no_grad():
        changed.module.get_submodule("stem").weight.mul_(3)
    data = images(100)
    fixed = reestimate(changed, [data[:30], data[30:]])
    with torch.no_grad():
        y = changed.module.get_submodule("stem")(data).double()
    norm = fixed.module.get_submodule("norm")
    torch.testing.assert_close(norm.running_mean, y.mean((0, 2, 3)).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, y.var((0, 2, 3), unbiased=False).float(), rtol=1e-5, atol=1e-6)
    assert error(network, fixed) < 0.1 * error(network, changed)
    kept = reestimate(changed, [data], keep_function=True)
    assert error(changed, kept) < 1e-9
    torch.testing.assert_close(kept.module.get_submodule("norm").running_mean, norm.running_mean, rtol=1e-4, atol=1e-5)
