"""Every way in: recognised by content, equal to the original, and nothing of a file ever runs."""

import io
import json
import os
import zipfile

import pytest
import torch
from broken import Payload, cases, members, small_net, sound_files, zipped
from load_worker import attempt
from support import relative_error
from torch import nn

from edgeprune.errors import EdgepruneError, ModelFileError, UnsupportedModelError, UsageError
from edgeprune.graph.factory import build
from edgeprune.graph.load import load, parse_input, save

SHAPE = [(1, 3, 16, 16)]


@pytest.fixture(scope="module")
def sound():
    return sound_files()


@pytest.fixture(scope="module")
def net():
    return small_net()


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "from broken import small_net as net\n\ndef number():\n    return 3\n\ndef bad():\n    return 1 / 0\n"
    )
    return str(path)


def written(tmp_path, content, name="model.xyz"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def assert_equal_to(network, net, sizes=((1, 16), (3, 16), (2, 24))):
    for batch, side in sizes:
        x = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            assert relative_error(network.module(x), net(x)) < 1e-6


@pytest.mark.parametrize("kind", ["exported", "traced"])
def test_files_that_know_their_input_shape(kind, sound, net, tmp_path):
    network = load(written(tmp_path, sound[kind]))
    assert network.input_shapes == ((1, 3, 16, 16),)
    assert_equal_to(network, net)
    assert {n for n, _ in network.module.named_parameters()} == {n for n, _ in net.named_parameters()}
    assert next(iter(network.module.graph.nodes)).name == "x"


def test_a_scripted_model_takes_its_shape_from_the_user(sound, net, tmp_path):
    path = written(tmp_path, sound["scripted"])
    with pytest.raises(UsageError, match=r"--input 1x3x224x224"):
        load(path)
    network = load(path, input_shapes=SHAPE)
    assert_equal_to(network, net)
    assert network.module.get_submodule("conv").weight.shape == (8, 3, 3, 3)


@pytest.mark.parametrize("kind", ["weights", "legacy", "checkpoint"])
def test_weights_go_into_the_network_of_a_factory(kind, sound, net, tmp_path, factory):
    path = written(tmp_path, sound[kind])
    with pytest.raises(UsageError, match="--factory package.module:function"):
        load(path, input_shapes=SHAPE)
    assert_equal_to(load(path, input_shapes=SHAPE, factory=f"{factory}:net"), net)
    assert_equal_to(load(path, input_shapes=SHAPE, factory="broken:small_net"), net)


def test_weights_without_num_batches_tracked(net, tmp_path):
    weights = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "w")
    assert_equal_to(load(tmp_path / "w", input_shapes=SHAPE, factory="broken:small_net"), net)


def test_weights_of_another_network_are_listed(net, tmp_path):
    weights = {**net.state_dict(), "extra.weight": torch.zeros(3), "fc.weight": torch.zeros(2, 32)}
    del weights["conv.bias"]
    torch.save(weights, tmp_path / "w")
    with pytest.raises(
        ModelFileError, match=r"1 missing \(conv.bias\); 1 unexpected \(extra.weight\); 1 of another shape"
    ):
        load(tmp_path / "w", input_shapes=SHAPE, factory="broken:small_net")


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("broken", "expected package.module:function"),
        ("no_such_package:net", "ModuleNotFoundError"),
        ("broken:no_such_function", "broken has no no_such_function"),
        ("no_such_file.py:net", "no file"),
        ("{file}:number", "returned a int"),
        ("{file}:bad", "ZeroDivisionError"),
    ],
)
def test_a_factory_that_does_not_work(factory, says, tmp_path):
    path = tmp_path / "nets.py"
    path.write_text("def number():\n    return 3\n\ndef bad():\n    return 1 / 0\n")
    with pytest.raises(UsageError, match=says):
        build(factory.replace("{file}", str(path)))


def test_a_pickled_module_is_refused_unless_trusted(sound, net, tmp_path):
    path = written(tmp_path, sound["module"])
    with pytest.raises(ModelFileError, match=r"pickled object \(broken.SmallNet\).*torch.export.save.*--trust"):
        load(path, input_shapes=SHAPE)
    assert_equal_to(load(path, input_shapes=SHAPE, trust=True), net)


def test_the_conversion_command_works(sound, net, tmp_path, monkeypatch):
    path = written(tmp_path, sound["module"], "m.pt")
    with pytest.raises(ModelFileError) as error:
        load(path, input_shapes=SHAPE)
    code = str(error.value).split('python -c "')[1].split('"')[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert_equal_to(load(tmp_path / "m.pt2"), net, ((1, 16), (3, 16)))


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        load(tmp_path / "missing.pt")
    with pytest.raises(ModelFileError, match="not a file"):
        load(tmp_path)
    with pytest.raises(ModelFileError, match="empty"):
        load(written(tmp_path, b""))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a file"):
        load(tmp_path / "pipe")


def test_an_onnx_file_is_recognised(net, tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="x" * 300), str(tmp_path / "m.pt"))
    with pytest.raises(ModelFileError, match="an ONNX model"):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("text", "shapes"),
    [("1x3x224x224", ((1, 3, 224, 224),)), ("8X3x32x32,1x4", ((1, 3, 32, 32), (1, 4))), ("2x10", ((1, 10),))],
)
def test_parse_input(text, shapes):
    assert parse_input(text) == shapes


@pytest.mark.parametrize("text", ["", "3", "1x3x", "1x3x-2x2", "1x0x2", "axb", "1x3x99999x99999"])
def test_parse_input_refuses(text):
    with pytest.raises(UsageError):
        parse_input(text)


def test_save_and_both_ways_back(sound, net, tmp_path):
    network = load(written(tmp_path, sound["traced"]))
    save(network, tmp_path / "out.pt2")
    assert b"stack_trace" not in (tmp_path / "out.pt2").read_bytes()
    assert_equal_to(load(tmp_path / "out.pt2"), net)
    module = torch.export.load(tmp_path / "out.pt2").module()
    x = torch.randn(3, 3, 16, 16)
    assert relative_error(module(x), net(x)) < 1e-6
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in net.named_parameters()}


def test_a_saved_network_can_be_trained_and_loaded_again(sound, tmp_path):
    save(load(written(tmp_path, sound["exported"])), tmp_path / "a.pt2")
    module = torch.export.load(tmp_path / "a.pt2").module()
    x, target = torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = nn.functional.cross_entropy(module(x), target)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), target).backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
    assert nn.functional.cross_entropy(module(x), target) < before
    again = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(again, tmp_path / "b.pt2")
    network = load(tmp_path / "b.pt2")
    assert relative_error(network.module(x), module(x)) < 1e-6
    assert "conv" in network.modules_called()


def test_an_archive_exported_at_a_fixed_batch(net, tmp_path):
    for batch in (1, 2):
        torch.export.save(torch.export.export(net, (torch.randn(batch, 3, 16, 16),)), tmp_path / "fixed.pt2")
        assert_equal_to(load(tmp_path / "fixed.pt2"), net, ((1, 16), (5, 16)))


def test_a_batch_that_cannot_be_freed(tmp_path):
    class Mixing(nn.Module):
        def forward(self, x):
            return x.reshape(2, -1).sum(1)

    torch.export.save(torch.export.export(Mixing(), (torch.randn(4, 6),)), tmp_path / "m.pt2")
    with pytest.raises(UnsupportedModelError, match="fixed batch of 4"):
        load(tmp_path / "m.pt2")


def test_half_precision_and_decompositions(net, tmp_path):
    auto = torch.export.Dim.AUTO
    x = torch.randn(2, 3, 16, 16)
    half = torch.export.export(small_net().half(), (x.half(),), dynamic_shapes=({0: auto},))
    torch.export.save(half, tmp_path / "half.pt2")
    network = load(tmp_path / "half.pt2")
    assert all(p.dtype == torch.float32 for p in network.module.parameters())
    with torch.no_grad():
        assert relative_error(network.module(x), net(x)) < 1e-2
    core = torch.export.export(net, (x,), dynamic_shapes=({0: auto},)).run_decompositions()
    torch.export.save(core, tmp_path / "core.pt2")
    network = load(tmp_path / "core.pt2")
    assert_equal_to(network, net, ((1, 16), (3, 16)))
    assert set(network.modules_called()) == {"conv", "bn", "up", "fc"}


def test_parts_under_a_context(tmp_path):
    class Contexts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            with torch.no_grad():
                y = torch.relu(self.a(x))
                z = y + 1
            with torch.autocast("cpu", enabled=False):
                return self.b(y) * z

    model = Contexts().eval()
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "m.pt2")
    network = load(tmp_path / "m.pt2")
    assert_equal_to(network, model, ((3, 8),))
    assert set(network.modules_called()) == {"a", "b"}


def test_the_layout_of_older_torch(sound, net, tmp_path):
    parts = {n.split("/", 1)[1]: c for n, c in members(sound["exported"]).items()}
    weights = io.BytesIO()
    torch.save(dict(net.state_dict()), weights)
    old = {"serialized_exported_program.json": parts["models/model.json"], "serialized_constants.pt": b""}
    path = written(tmp_path, zipped({**old, "serialized_state_dict.pt": weights.getvalue(), "version": b"8.1"}))
    assert_equal_to(load(path), net)


def test_payloads_are_live_and_never_run(sound, tmp_path):
    """The same bytes run when torch is told to trust them: what the other tests rely on."""
    sentinel = tmp_path / "sentinel"
    torch.save({"w": Payload(sentinel)}, tmp_path / "evil.pt")
    with pytest.raises(ModelFileError, match="posix.system|nt.system"):
        load(tmp_path / "evil.pt")
    assert not sentinel.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert sentinel.exists()


def test_pickles_inside_an_exported_archive_are_not_opened(sound, net, tmp_path):
    sentinel = tmp_path / "sentinel"
    stream = io.BytesIO()
    torch.save(Payload(sentinel), stream)
    parts = members(sound["exported"])
    inputs = next(n for n in parts if "sample_inputs" in n)
    path = written(tmp_path, zipped({**parts, inputs: stream.getvalue()}), "m.pt2")
    assert_equal_to(load(path), net)
    assert not sentinel.exists()


def test_compressed_archives_are_read_and_bombs_are_not(sound, net, tmp_path):
    packed = zipped(members(sound["exported"]), zipfile.ZIP_DEFLATED)
    assert_equal_to(load(written(tmp_path, packed)), net)
    parts = members(sound["exported"])
    weight = next(n for n in parts if n.endswith("weight_0"))
    bomb = zipped({**parts, weight: bytes(100 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelFileError, match="far more than its own size"):
        load(written(tmp_path, bomb))


def test_custom_operators_are_named(sound, tmp_path):
    parts = members(sound["exported"])
    path = next(n for n in parts if n.endswith("models/model.json"))
    doc = json.loads(parts[path])
    doc["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.torchvision.nms.default"
    with pytest.raises(UnsupportedModelError, match="torchvision.nms"):
        load(written(tmp_path, zipped({**parts, path: json.dumps(doc).encode()})))


def test_a_sample_of_broken_files(tmp_path):
    """tools/fuzz_load does this with hundreds and with a time limit."""
    sentinel = tmp_path / "sentinel"
    for what, content in cases(seed=1, sentinel=sentinel, count=60):
        answer = attempt(str(written(tmp_path, content, "broken.pt")))
        assert answer["outcome"] in ("refused", "loaded"), f"{what}: {answer}"
        assert not sentinel.exists(), what


def test_errors_are_one_line_and_name_the_file(tmp_path):
    path = written(tmp_path, b"PK\x03\x04 nonsense\n")
    with pytest.raises(EdgepruneError) as error:
        load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 3
