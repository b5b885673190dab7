import pytest
import torch
from nets import images, small

from edgeprune.errors import DataError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.surgery import remove
from edgeprune.prune.program import Program, as_batches, divergence, outputs, run, sweep


@pytest.fixture(scope="module")
def network():
    return small()


def test_running_piecewise_gives_what_the_module_gives(network):
    x = images(100)
    batches = as_batches([x[:70], x[70:]], network)
    assert [len(b[0]) for b in batches] == [64, 36]
    with torch.no_grad():
        expected = network.module(x)
    torch.testing.assert_close(outputs(Program(network), batches)[0], expected)
    network.module.train()  # batch norms are evaluated whatever the mode
    torch.testing.assert_close(outputs(Program(network), batches)[0], expected)
    network.module.eval()


def test_known_values_are_not_computed_again(network):
    program = Program(network)
    batches = as_batches([images(10)], network)
    middle = find_blocks(network)[2].shortcut
    with torch.no_grad():
        values = run(program, batches, [middle, program.output.name])
    nodes = program.needed([program.output.name], [middle])
    assert len(nodes) < len(program.nodes) / 1.5
    start = {middle: [2 * v for v in values[middle]]}
    assert divergence(outputs(program, batches, start), outputs(program, batches)) > 1e-3
    start = {middle: values[middle]}
    assert divergence(outputs(program, batches, start), outputs(program, batches)) == 0


def test_bypassing_a_block_equals_removing_it(network):
    blocks = find_blocks(network)
    batches = as_batches([images(10)], network)
    view = Program(network).without(blocks[0]).without(blocks[1], blocks[3])
    with torch.no_grad():
        expected = remove(network, [blocks[0], blocks[1], blocks[3]]).module(images(10))
    torch.testing.assert_close(outputs(view, batches)[0], expected)


def test_exchanged_modules_are_used_and_the_network_is_untouched(network):
    program = Program(network)
    batches = as_batches([images(10)], network)
    before = outputs(program, batches)
    head = torch.nn.Linear(8, 5)
    changed = program.exchanged({"head": head})
    assert divergence(outputs(changed, batches), before) > 0.1
    assert divergence(outputs(program, batches), before) == 0


def test_sweep_sees_every_node_with_its_inputs_there(network):
    program = Program(network)
    batches = as_batches([images(80)], network)
    seen = []

    def before(node, values):
        for source in program.sources(node):
            assert len(values[source.name]) == 2
        seen.append(node.name)

    with torch.no_grad():
        result = sweep(program, batches, before)[program.output.name]
    assert seen == [n.name for n in program.nodes]
    torch.testing.assert_close(torch.cat([r[0] for r in result]), outputs(program, batches)[0])


def test_divergence_is_relative_to_the_spread_over_images():
    expected = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    assert divergence([expected + torch.tensor([1.0, 0.0])], [expected]) == pytest.approx(1.0)
    assert divergence([expected, expected * 2], [expected, expected]) == pytest.approx(0.5 * 210 / 2)
    constant = torch.full((2, 2), 2.0)  # no spread: relative to its own energy
    assert divergence([constant * 1.5], [constant]) == pytest.approx(0.25)


def test_labels_in_the_batches_are_ignored_and_no_image_is_an_error(network):
    batches = as_batches([(images(5), torch.zeros(5))], network, images=3)
    assert [len(b) for b in batches] == [1]
    assert len(batches[0][0]) == 3
    with pytest.raises(DataError, match="no image"):
        as_batches([], network)
