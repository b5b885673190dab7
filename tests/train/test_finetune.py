"""Fine-tuning: it learns, it obeys its settings, it survives a learning rate that is too large."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from training_job import fingerprint, network, samples

from edgeprune.errors import DataError, EdgepruneError
from edgeprune.graph.lift import lift
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.evaluate import agreement, evaluate, output_error
from edgeprune.train.finetune import finetune
from edgeprune.train.modules import place

QUICK = {"batch_size": 16, "lr": 0.05, "augment": "none"}


def trained_teacher():
    teacher = network(12, 0)
    finetune(teacher, None, samples(400, 0), TrainConfig(epochs=4, **QUICK))
    return teacher


@pytest.fixture(scope="module")
def teacher():
    return trained_teacher()


def unlabelled(data):
    return DataSet(type(data.source)(data.source.x, None), data.input_shape, data.normalisation, data.name)


def test_labels_alone_teach(teacher):
    assert evaluate(teacher, samples(200, 5)) > 0.95
    assert not teacher.training


def test_the_original_alone_teaches(teacher):
    student, test = network(6, 1), samples(200, 5)
    before = output_error(student, teacher, test)
    teacher_before = fingerprint(teacher)
    history = finetune(student, teacher, unlabelled(samples(400, 0)), TrainConfig(epochs=6, **QUICK))
    assert output_error(student, teacher, test) < 0.3 * before
    assert agreement(student, teacher, test) > 0.9
    assert fingerprint(teacher) == teacher_before
    assert (history.steps, history.epochs, history.rollbacks) == (150, 6.0, 0)
    assert history.losses[-1][1] < 0.3 * history.losses[0][1]
    assert not history.validation


def test_outputs_that_are_maps(teacher):
    class Maps(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body = nn.Conv2d(3, width, 3, padding=1)
            self.one, self.two = nn.Conv2d(width, 2, 1), nn.Conv2d(width, 1, 1)

        def forward(self, x):
            x = torch.relu(self.body(x))
            return self.one(x), 50 * self.two(x)

    torch.manual_seed(0)
    big, small = (lift(Maps(w), [(1, 3, 16, 16)]).module for w in (8, 6))
    data = unlabelled(samples(200, 0))
    before = output_error(small, big, data)
    finetune(small, big, data, TrainConfig(epochs=6, batch_size=16, lr=0.1))
    assert output_error(small, big, data) < 0.1 * before
    assert agreement(small, big, data) is None


def test_the_best_weights_on_validation_are_kept(teacher):
    student, held_out = network(6, 1), samples(100, 9)
    history = finetune(student, teacher, samples(200, 0), TrainConfig(epochs=3, **QUICK), validation=held_out)
    steps, accuracies = zip(*history.validation, strict=True)
    assert (steps[0], steps[-1], len(steps)) == (0, history.steps, 6)
    assert evaluate(student, held_out) == max(accuracies)
    assert dict(history.validation)[history.selected_step] == max(accuracies)


def test_training_never_ends_below_where_it_began(teacher):
    student, held_out = trained_teacher(), samples(100, 9)
    before = fingerprint(student)
    # ten steps of learning the wrong labels, at a rate that does harm
    wrong = samples(200, 0)
    wrong = DataSet(
        type(wrong.source)(wrong.source.x, (wrong.labels + 1) % 4), wrong.input_shape, wrong.normalisation, ""
    )
    settings = TrainConfig(steps=40, batch_size=16, lr=0.2, augment="none")
    history = finetune(student, None, wrong, settings, validation=held_out)
    assert history.selected_step == 0
    assert fingerprint(student) == before


def test_frozen_batch_norm_keeps_its_statistics(teacher):
    for mode, moved in (("frozen", False), ("train", True)):
        student = network(6, 1)
        norm = next(m for m in student.modules() if isinstance(m, nn.BatchNorm2d))
        mean, weight = norm.running_mean.clone(), norm.weight.detach().clone()
        finetune(student, teacher, samples(100, 0), TrainConfig(steps=5, batch_norm=mode, **QUICK))
        assert torch.equal(norm.running_mean, mean) != moved
        assert not torch.equal(norm.weight, weight)


def test_weight_decay_leaves_norms_and_biases_alone(teacher):
    def moved(weight_decay):
        student = network(6, 1)
        # a tiny rate: after few steps the difference between two decays is the decay itself
        finetune(
            student, teacher, samples(64, 0), TrainConfig(steps=1, lr=1e-4, weight_decay=weight_decay, batch_size=64)
        )
        return {n: p.detach() for n, p in student.named_parameters()}

    without, with_decay = moved(0.0), moved(1.0)
    for name, p in without.items():
        assert torch.equal(p, with_decay[name]) == (p.dim() < 2), name


def test_a_rate_that_is_too_large_is_halved(teacher):
    student = network(6, 1)
    settings = TrainConfig(epochs=4, batch_size=16, lr=40.0, clip_norm=1e9, warmup=0.0, augment="none")
    history = finetune(student, teacher, unlabelled(samples(200, 0)), settings)
    assert history.rollbacks > 0
    assert history.notes[0].startswith("diverged at step")
    assert all(torch.isfinite(t).all() for t in student.state_dict().values())
    assert math.isfinite(output_error(student, teacher, samples(50, 5)))


def test_no_rate_is_small_enough(teacher):
    settings = TrainConfig(epochs=4, batch_size=16, lr=1e30, clip_norm=1e30, warmup=0.0, augment="none")
    with pytest.raises(EdgepruneError, match="diverged 9 times"):
        finetune(network(6, 1), teacher, unlabelled(samples(200, 0)), settings)


@pytest.mark.parametrize("where", [0, 150])
def test_numbers_that_are_not_finite_are_the_datas_fault(teacher, where):
    x = np.random.default_rng(0).normal(size=(160, 3, 16, 16)).astype(np.float32)
    x[where:] = np.nan
    with pytest.raises(DataError, match="not finite"):
        finetune(network(6, 1), teacher, DataSet.from_arrays(x), TrainConfig(epochs=2, **QUICK))


def test_labels_beyond_the_classes(teacher):
    data = samples(50, 0)
    data.source.labels[3] = 4
    with pytest.raises(DataError, match="labels go up to 4, the network tells 4 classes apart"):
        finetune(network(6, 1), teacher, data, TrainConfig(steps=2, **QUICK))
    with pytest.raises(DataError, match="labels go up to 4"):
        evaluate(teacher, data)


def test_a_time_limit_is_kept(teacher):
    ticks = []
    history = finetune(
        network(6, 1), teacher, samples(400, 0), TrainConfig(minutes=0.05, **QUICK), None, ticks.append, samples(50, 1)
    )
    assert 0.4 * 3 < history.seconds < 1.3 * 3
    assert [t.step for t in ticks] == list(range(1, history.steps + 1))
    assert ticks[-1].left_s == 0
    assert ticks[-1].lr < 0.02 * max(t.lr for t in ticks)


def test_a_machine_that_turns_slow_shortens_the_run(teacher):
    import time

    data = unlabelled(samples(400, 0))
    read, calls = data.source.read, []

    def slow(indices):
        calls.append(1)
        if len(calls) > 30:
            time.sleep(0.03)
        return read(indices)

    data.source.read = slow
    history = finetune(network(6, 1), teacher, data, TrainConfig(minutes=0.05, **QUICK))
    assert "became slower" in history.notes[0]
    assert history.seconds < 1.5 * 3


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_samples_than_a_batch(teacher, count):
    history = finetune(network(6, 1), teacher, samples(count, 0), TrainConfig(epochs=3))
    assert (history.steps, history.epochs) == (3, 3.0)


def test_the_teachers_kept_answers_change_nothing(teacher):
    """With one view, remembered answers are those that would be given again."""
    results = []
    for keep in (64 << 20, 0):
        import edgeprune.train.teacher as module

        student, original = network(6, 1), module.KEEP_BYTES
        module.KEEP_BYTES = keep
        try:
            finetune(student, teacher, samples(64, 0), TrainConfig(epochs=3, **QUICK))
        finally:
            module.KEEP_BYTES = original
        results.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_the_users_random_state_is_left_alone(teacher):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    finetune(network(6, 1), teacher, samples(50, 0), TrainConfig(steps=2, **QUICK))
    assert torch.equal(torch.rand(1), expected)


def test_devices_baked_into_a_graph_are_moved():
    class Made(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1], device=x.device)

    module = lift(Made(), [(1, 4)]).module
    place(module, torch.device("meta"), torch.contiguous_format)
    assert module(torch.empty(2, 4, device="meta")).device.type == "meta"
