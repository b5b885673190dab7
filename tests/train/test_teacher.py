"""Which answers are kept, and that kept answers are the ones that were given."""

import numpy as np
import torch
from torch import nn

from edgeprune.train.teacher import KEEP_BYTES, Teacher


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, x):
        self.asked += len(x)
        return x * 2, x.sum(1, keepdim=True)


def asked(teacher, x, view, positions):
    before = teacher.module.asked
    answers = teacher.answer(x[positions] + view, view, np.array(positions))
    np.testing.assert_allclose(answers[0], (x[positions] + view) * 2)
    np.testing.assert_allclose(answers[1], (x[positions] + view).sum(1, keepdim=True))
    return teacher.module.asked - before


def make(samples=10, views=2):
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(0))
    teacher = Teacher(Counting(), samples, (x * 2, x[:, :1]))
    teacher.remember(views)
    return teacher, x


def test_answers_are_asked_for_once_per_view():
    teacher, x = make()
    assert [teacher.view_of(e) for e in range(5)] == [0, 1, 0, 1, 0]
    assert asked(teacher, x, 0, [3, 1, 7]) == 3
    assert asked(teacher, x, 0, [7, 3]) == 0
    assert asked(teacher, x, 1, [7, 3]) == 2
    assert asked(teacher, x, 0, [7, 4]) == 2  # whole batches only
    assert asked(teacher, x, 0, [4]) == 0


def test_a_saved_memory_goes_on():
    teacher, x = make()
    asked(teacher, x, 0, [3, 1, 7])
    again, _ = make()
    again.load(teacher.state())
    assert asked(again, x, 0, [1, 3]) == 0
    assert asked(again, x, 0, [0, 2]) == 2


def test_without_memory_every_epoch_is_a_new_view():
    teacher, x = make(views=0)
    assert [teacher.view_of(e) for e in range(4)] == [0, 1, 2, 3]
    assert asked(teacher, x, 0, [3, 1]) == 2
    assert asked(teacher, x, 0, [3, 1]) == 2


def test_large_answers_are_not_kept():
    big = (torch.zeros(2, 1000),)

    def views(samples, wanted):
        teacher = Teacher(Counting(), samples, big)
        teacher.remember(wanted)
        return teacher.views

    fits = KEEP_BYTES // 4000  # samples of one view that fit
    assert views(fits // 10, 8) == 8
    assert views(fits // 10, 30) == 10
    assert views(fits // 2, 8) == 0  # two views would be learnt by heart
    assert views(fits // 2, 1) == 1
    assert views(fits + 1, 1) == 0
