"""Anchoring changes what training starts from, and not what the network computes."""

import numpy as np
import torch
from torch import nn

from edgeprune.graph.lift import lift
from edgeprune.train.anchor import anchor, norms
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.finetune import finetune


class Shared(nn.Module):
    """A residual network with batch norms of wrong statistics, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.a, self.b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.a(self.one(x)))
        y = torch.relu(self.b(self.two(x)))
        return self.linear(torch.relu(self.b(self.two(y)) + x).mean((2, 3)))


def network(seed=0):
    torch.manual_seed(seed)
    module = Shared()
    for norm in norms(module):
        for tensor, low in (
            (norm.running_mean, -1),
            (norm.running_var, 0.2),
            (norm.weight.data, 0.5),
            (norm.bias.data, -1),
        ):
            tensor.uniform_(low, low + 2)
    module.one.weight.data[3] = 0  # a dead channel
    module.one.bias.data[3] = 0.25
    return lift(module, [(1, 3, 12, 12)]).module


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 3, 12, 12, generator=generator) for _ in range(count)]


def test_evaluation_computes_what_it_did():
    module = network()
    x = torch.randn(32, 3, 12, 12)
    with torch.no_grad():
        before = module(x)
        anchor(module, batches())
        torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)


def test_the_statistics_become_those_of_the_data():
    module, seen = network(), {}
    anchor(module, batches())
    handles = [
        norm.register_forward_pre_hook(lambda m, i: seen.setdefault(m, []).append(i[0].double()))
        for norm in norms(module)
    ]
    with torch.no_grad():
        for x in batches():
            module(x)
    assert sorted(len(v) for v in seen.values()) == [6, 12]
    for norm, inputs in seen.items():
        every = torch.cat(inputs)
        np.testing.assert_allclose(norm.running_mean, every.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.running_var, every.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-6)
    assert not any(h.remove() for h in handles)


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def single():
    torch.manual_seed(0)
    module = Single().eval()
    module.norm.running_mean.uniform_(-1, 1)
    return module


def apart(module, trained):
    """Relative distance of what training computes from ``trained``, what evaluation computed."""
    for norm in norms(module):
        norm.train()
    with torch.no_grad():
        return float((module(torch.cat(batches())) - trained).norm() / trained.norm())


def test_training_starts_from_the_function_of_evaluation():
    module = single()
    with torch.no_grad():
        target = module(torch.cat(batches()))
    assert apart(single(), target) > 0.02
    anchor(module, batches())
    assert apart(module, target) < 1e-3


def first_loss(student, teacher):
    data, losses = DataSet.from_arrays(torch.cat(batches()).numpy()), []
    settings = TrainConfig(steps=1, lr=1e-9, batch_size=384, augment="none", loss="values")
    finetune(student, teacher, data, settings, None, lambda p: losses.append(p.loss))
    return losses[0]


def test_a_refitted_student_is_anchored_and_a_broken_one_repaired():
    """The student is its teacher. Where its statistics do not fit the data, but its function is right, it starts at no
    loss; where its statistics are what is wrong, those of the batch mend it."""
    assert first_loss(single(), single()) < 1e-5
    teacher, broken = single(), single()
    anchor(teacher, batches())
    broken.load_state_dict(teacher.state_dict())
    broken.norm.running_mean += 1
    assert first_loss(broken, teacher) < 1e-5
