import pytest
import torch
from cifar import lifted
from support import relative_error
from torch import nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.lift import lift
from edgeprune.graph.resolution import at_resolution, resolutions, size_of, stride_of


def network(*layers, shape=(1, 3, 32, 32)):
    torch.manual_seed(0)
    return lift(nn.Sequential(*layers).eval(), [shape])


class Baked(nn.Module):
    """A size of the input written down: with -1 for the batch it takes four small samples for one."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.conv, self.head = batch, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.reshape(self.batch(x), 4, 32 * 32).mean(2))


def test_the_network_computes_what_the_module_does_at_that_size():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(8, 5)).eval()
    small = at_resolution(lift(module, [(1, 3, 32, 32)]), (24, 20))
    assert size_of(small) == (24, 20)
    (x,) = small.random_inputs(3)
    with torch.no_grad():
        assert relative_error(small.module(x), module(x)) < 1e-6


def test_its_own_size_is_itself():
    assert at_resolution(lifted(20), (32, 32)) is lifted(20)


def test_sizes_worth_trying_are_multiples_of_the_stride():
    assert stride_of(lifted(20)) == 4
    assert resolutions(lifted(20)) == [(28, 28), (24, 24), (20, 20), (16, 16)]
    deep = network(*(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(5)), nn.AdaptiveAvgPool2d(1), shape=(1, 3, 224, 160))
    assert stride_of(deep) == 32
    assert resolutions(deep) == [(192, 128), (160, 128), (128, 96)]
    assert all(h % 32 == w % 32 == 0 for h, w in resolutions(deep))


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)], "baked in"),
        ([nn.Conv2d(3, 4, 3), nn.AvgPool2d(30), nn.Flatten(), nn.Linear(4, 2)], "baked in"),
        ([nn.Conv2d(3, 4, 3, padding=1)], "output becomes 4x16x16 instead of 4x32x32"),
    ],
)
def test_a_network_tied_to_its_size_is_refused_and_told_why(layers, says):
    with pytest.raises(UnsupportedModelError, match=says) as error:
        at_resolution(network(*layers), (16, 16))
    assert "--resolution" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UnsupportedModelError, match=says.split(" instead")[0].replace("16x16", "28x28")):
        resolutions(network(*layers))


@pytest.mark.parametrize("batch", [lambda x: x.shape[0], lambda x: -1])
def test_a_baked_view_is_refused_even_where_it_would_run(batch):
    baked = lift(Baked(batch).eval(), [(1, 3, 32, 32)])
    for size in ((16, 16), (64, 64), (32, 16)):
        with pytest.raises(UnsupportedModelError, match="baked in"):
            at_resolution(baked, size)


def test_only_images_have_a_resolution():
    flat = lift(nn.Linear(4, 2).eval(), [(1, 4)])
    with pytest.raises(UnsupportedModelError, match="one input of 4 dimensions"):
        at_resolution(flat, (2, 2))
