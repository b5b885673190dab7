"""The training objective against its formulas."""

import math

import numpy as np
import pytest
import torch

from edgeprune.errors import DataError, UsageError
from edgeprune.train.config import TrainConfig
from edgeprune.train.loss import Objective, is_probabilities, is_scores


def scores(seed, rows=16, classes=5):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 3


def objective(sample, labelled=False, distil=True, **config):
    return Objective(TrainConfig(**config), sample, labelled, distil, "data")


def kl(teacher, student, temperature):
    """The definition, in numpy and float64."""
    q, p = (np.exp(z.double().numpy() / temperature) for z in (teacher, student))
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    return temperature**2 * float((q * np.log(q / p)).sum(1).mean())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_of_scores(temperature):
    t, s = scores(0), scores(1)
    loss = objective((t,), temperature=temperature)
    np.testing.assert_allclose(float(loss((s,), (t,), None)), kl(t, s, temperature), rtol=1e-5)
    np.testing.assert_allclose(float(loss((t,), (t,), None)), 0, atol=1e-6)


def test_labels_are_mixed_in():
    t, s, y = scores(0), scores(1), torch.arange(16) % 5
    loss = objective((t,), labelled=True, label_weight=0.3, temperature=2.0)
    entropy = float((s.logsumexp(1) - s[torch.arange(16), y]).mean())
    np.testing.assert_allclose(float(loss((s,), (t,), y)), 0.7 * kl(t, s, 2.0) + 0.3 * entropy, rtol=1e-5)
    alone = objective((t,), labelled=True, distil=False)
    np.testing.assert_allclose(float(alone((s,), None, y)), entropy, rtol=1e-5)


def test_probabilities_are_taken_back_to_scores():
    t, s, y = scores(0), scores(1), torch.arange(16) % 5
    loss = objective((t.softmax(1),), labelled=True, label_weight=0.5)
    plain = objective((t,), labelled=True, label_weight=0.5)
    got, expected = loss((s.softmax(1),), (t.softmax(1),), y), plain((s,), (t,), y)
    np.testing.assert_allclose(float(got), float(expected), rtol=1e-4)


def test_maps_are_matched_by_relative_error_and_weighted():
    g = torch.Generator().manual_seed(0)
    t = (torch.randn(2, 3, 4, 4, generator=g), 100 * torch.randn(2, 7, generator=g)[:, None].expand(2, 2, 7))
    s = (t[0] * 1.5, t[1] * 0.9)
    np.testing.assert_allclose(float(objective(t)(s, t, None)), (0.25 + 0.01) / 2, rtol=1e-5)
    loss = objective(t, output_weights=(3.0, 1.0))
    np.testing.assert_allclose(float(loss(s, t, None)), 0.75 * 0.25 + 0.25 * 0.01, rtol=1e-5)


def test_what_looks_like_scores():
    raw = scores(0)
    assert is_scores(raw)
    assert is_scores(raw.softmax(1))
    assert is_probabilities(raw.softmax(1))
    assert not is_probabilities(raw)
    assert not is_scores(raw / raw.norm(dim=1, keepdim=True))
    assert not is_scores(raw[:, :1])
    assert not is_scores(raw[:, :, None])


def test_a_constant_answer_is_the_measure_of_divergence():
    t = scores(0)
    mean = t.mean(0, keepdim=True).expand_as(t)
    np.testing.assert_allclose(objective((t,)).of_constant((t,), None), kl(t, mean, 4.0), rtol=1e-4)
    assert objective((t,), labelled=True, distil=False).of_constant((t,), [0]) == math.log(5)


def test_nothing_to_learn_from():
    with pytest.raises(DataError, match="no class labels"):
        objective((scores(0),), distil=False)
    with pytest.raises(DataError, match="no class labels"):
        objective((torch.randn(2, 3, 4, 4),), labelled=True, distil=False)


def test_settings_that_do_not_fit_the_outputs():
    with pytest.raises(UsageError, match="2 output weights"):
        objective((scores(0),), output_weights=(1.0, 1.0))
    with pytest.raises(UsageError, match="needs outputs of shape"):
        objective((torch.randn(2, 3, 4, 4),), loss="scores")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1, "minutes": 2}, "epochs and minutes"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": -1}, "lr"),
        ({"label_weight": 2}, "label_weight"),
        ({"loss": "mse"}, "expected one of auto, scores, values"),
        ({"batch_norm": "off"}, "batch_norm"),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)
