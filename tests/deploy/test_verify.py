import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgeprune.deploy.export import to_onnx
from edgeprune.deploy.verify import verify
from edgeprune.errors import VerificationError
from edgeprune.graph.lift import lift
from edgeprune.graph.network import Network


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return lift(net.eval(), [(1, 3, 8, 8)])


def test_a_right_file_passes_on_random_and_given_samples(network):
    given = [torch.rand(5, 3, 8, 8), (torch.rand(40, 3, 8, 8),)]
    result = verify(to_onnx(network).SerializeToString(), network, given)
    assert 0 < result.error <= 1e-6
    assert result.mean_error < result.error
    assert (result.cases, result.given, result.agreement) == (8 + 32, 32, 1.0)
    assert result.runtime.startswith("onnxruntime ")
    assert result.to_dict()["error"] == result.error


def test_a_changed_weight_is_named_with_its_figure(network):
    model = to_onnx(network)
    bias = next(t for t in model.graph.initializer if t.name == "4.bias")
    values = numpy_helper.to_array(bias) + np.float32([0, 0.01, 0, 0, 0])
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    with pytest.raises(VerificationError, match=r"differs from torch by 0\.0\d+ of its largest value"):
        verify(model, network)
    assert verify(model, network, tolerance=0.1).error > 1e-3


def test_a_difference_that_only_given_inputs_show_is_found(network):
    """Clipped at 50, which standard normal inputs do not reach."""
    model = to_onnx(network)
    bounds = [numpy_helper.from_array(np.float32(value), name) for name, value in (("low", 0), ("high", 50))]
    model.graph.initializer.extend(bounds)
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Clip"
            node.input.extend(["low", "high"])
    assert verify(model, network).error <= 1e-6
    with pytest.raises(VerificationError, match="differs from torch"):
        verify(model, network, [torch.full((1, 3, 8, 8), 1000.0)])


def test_bytes_that_are_no_model(network):
    with pytest.raises(VerificationError, match="not valid ONNX"):
        verify(b"not a model", network)


def test_a_file_the_runtime_refuses(network):
    model = to_onnx(network)
    model.graph.node[0].domain = "elsewhere"
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    with pytest.raises(VerificationError, match="onnxruntime refuses"):
        verify(model, network)


def test_other_input_shape(network):
    other = Network(network.module, ((1, 3, 9, 9),), "other")
    with pytest.raises(VerificationError, match=r"takes inputs of shape \[\(1, 3, 8, 8\)\]"):
        verify(to_onnx(network), other)


def test_other_number_of_outputs(network):
    model = to_onnx(network)
    model.graph.output.append(model.graph.value_info[0])
    with pytest.raises(VerificationError, match="has 2 outputs, the network 1"):
        verify(model, network)


def test_infinities_fail():
    net = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        net.weight.fill_(3e38)
    broken = lift(nn.Sequential(net, nn.Conv2d(1, 1, 1)).eval(), [(1, 1, 2, 2)])
    with pytest.raises(VerificationError, match="infinities or NaN"):
        verify(to_onnx(broken), broken)


def test_an_all_zero_output_is_compared_absolutely():
    net = nn.Linear(3, 2)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    zero = lift(net, [(1, 3)])
    assert verify(to_onnx(zero), zero).error == 0.0


def test_the_network_keeps_its_mode(network):
    network.module.train()
    try:
        assert verify(to_onnx(network), network).error <= 1e-6
        assert network.module.training
    finally:
        network.module.eval()
