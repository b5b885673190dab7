"""The form that factors are learnt in: the same function at the start, and back to the plain form at the end."""

import pytest
import torch
from folding import network
from support import relative_error
from torch import nn
from torch.nn import functional as F

from edgeprune.graph.network import check
from edgeprune.graph.resconv import factors, instrument
from edgeprune.graph.resconv_mix import carried, mix, unmix


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.same, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.bare = nn.Conv2d(6, 6, 1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.same(x)))
        x = F.max_pool2d(F.relu(self.bare(x)), 2)
        return x + self.branch(x)


@pytest.fixture
def net():
    return instrument(network(Net(), 3, 8, 8))


def outputs(net, x):
    with torch.no_grad():
        return net.module(x)


def test_carried_is_what_a_layer_gives_over_what_comes_in(net):
    batches = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 3)]
    found = carried(net, batches)
    model, x = Net().eval(), torch.cat(batches)
    model.load_state_dict(net.module.state_dict(), strict=False)
    with torch.no_grad():
        before = F.relu(model.stem(x))
        after = model.norm(model.same(before))
        bare = model.bare(F.relu(after))
    expected = {"same": after.square().mean() / before.square().mean()}
    expected["bare"] = bare.square().mean() / F.relu(after).square().mean()
    assert found.keys() == expected.keys()  # the branch's shortcut has no factor
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.sqrt().item(), rel=1e-5)


def test_mixing_changes_nothing_at_first(net):
    x = net.random_inputs(4)[0]
    mixed = mix(net, {"same": 1.3, "bare": 0.4})
    check(mixed)
    assert torch.equal(outputs(mixed, x), outputs(net, x))
    assert net.module.get_parameter("same_res.m").item() == 0.0


def test_what_the_factor_gives_up_the_shortcut_takes_over(net):
    x = net.random_inputs(4)[0]
    mixed = mix(net, {"same": 1.3, "bare": 0.4})
    with torch.no_grad():
        for factor, lam in zip(factors(net), (0.25, 0.0, 0.6), strict=True):
            mixed.module.get_parameter(factor.lam).fill_(lam)
    plain = unmix(mixed, net)
    assert plain.module.get_parameter("same_res.m").item() == pytest.approx(1.3)
    assert plain.module.get_parameter("bare_res.m").item() == pytest.approx(0.4)
    assert [n.name for n in plain.module.graph.nodes] == [n.name for n in net.module.graph.nodes]
    assert relative_error(outputs(mixed, x), outputs(plain, x)) <= 1e-6
    assert relative_error(outputs(mixed, x), outputs(net, x)) > 0.05


def test_a_batch_norm_that_hides_a_channel_keeps_its_share(net):
    with torch.no_grad():
        net.module.get_parameter("norm.weight")[2] = 1e-9
    x = net.random_inputs(4)[0]
    mixed = mix(net, {"same": 1.3, "bare": 0.4})
    with torch.no_grad():
        mixed.module.get_parameter("same_res.lam").fill_(0.25)
    plain = unmix(mixed, net)
    assert plain.module.get_parameter("same_res.m").item() == pytest.approx(0.75 * 1.3)
    assert relative_error(outputs(mixed, x), outputs(plain, x)) <= 1e-6


def test_a_layer_that_does_what_its_shortcut_does_gives_nothing_any_more(net):
    """So without the layer nothing changes."""
    with torch.no_grad():
        nn.init.dirac_(net.module.get_parameter("bare.weight"))
        net.module.get_parameter("bare.bias").zero_()
    mixed = mix(net, {"same": 1.3, "bare": 1.0})
    with torch.no_grad():
        mixed.module.get_parameter("bare_res.lam").fill_(0.8)
    assert not unmix(mixed, net).module.get_parameter("bare.weight").any()


def test_all_parameters_get_gradients(net):
    mixed = mix(net, {"same": 1.3, "bare": 0.4})
    with torch.no_grad():
        for factor in factors(net):
            mixed.module.get_parameter(factor.lam).fill_(0.5)
    mixed.module(*mixed.random_inputs(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixed.module.parameters())
