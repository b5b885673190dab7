"""The agent as a real process with the real runtime, and agents that crash, hang and talk nonsense."""

import ast
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeprune.device import device as protocol
from edgeprune.device import pipe as module
from edgeprune.device.connect import connect
from edgeprune.device.device import (
    AgentStartError,
    DeviceChangedError,
    DeviceLostError,
    Job,
    agent_sha256,
    agent_source,
)
from edgeprune.device.pipe import PipeDevice
from edgeprune.device.target import Runtime, Target
from edgeprune.errors import DeviceError

TARGET = Target("cpu")


def tiny_model(size: int = 4) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, size])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def device():
    with connect(TARGET) as opened:
        yield opened


def run_tiny(device: PipeDevice) -> np.ndarray:
    x = np.array([[-1, 2, -3, 4]], np.float32)
    result = device.run(Job("run", {"inputs": [["x", "float32", [1, 4]]]}, [tiny_model(), x.tobytes()]))
    assert result.ok, result.error
    assert result.fields["outputs"] == [["y", "float32", [1, 4]]]
    return np.frombuffer(result.blobs[0], np.float32)


def test_outputs_come_back(device):
    np.testing.assert_array_equal(run_tiny(device), [0, 2, 0, 4])


def test_fingerprint_says_what_it_ran_on(device):
    import onnxruntime

    fingerprint = device.fingerprint
    assert fingerprint.runtime_version == onnxruntime.__version__
    assert fingerprint.threads == 1
    assert fingerprint.machine
    with connect(TARGET.with_threads(2)) as other:
        assert other.fingerprint.digest() != fingerprint.digest()


def test_optimised_graph_comes_back(device):
    result = device.run(Job("optimize", {}, [tiny_model()]))
    assert result.ok, result.error
    assert [node.op_type for node in onnx.load_from_string(result.blobs[0]).graph.node] == ["Relu"]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("nonsense", {}), "nonsense"),
        (Job("run", {"inputs": []}, [b"not a model"]), "INVALID_PROTOBUF"),
        (Job("run", {"inputs": []}, []), "IndexError"),
        (Job("networks", {}, [tiny_model()]), "KeyError"),
    ],
)
def test_a_failed_job_is_a_value(device, job, message):
    result = device.run(job)
    assert not result.ok
    assert message in result.error
    assert "\n" not in result.error
    np.testing.assert_array_equal(run_tiny(device), [0, 2, 0, 4])


def test_missing_runtime_is_one_line():
    source = agent_source().replace("import onnxruntime as ort", "import no_such_runtime as ort")
    with PipeDevice(TARGET, source=source) as device, pytest.raises(DeviceError, match="install onnxruntime"):
        device.fingerprint  # noqa: B018


def test_stray_prints_do_not_reach_the_protocol():
    noise = "def serve(source, sink, jobs):\n    print('stray'); os.write(1, b'EPA1 {}\\n'); os.system('echo noise')\n"
    source = agent_source().replace("def serve(source, sink, jobs):\n", noise)
    with PipeDevice(TARGET, source=source) as device:
        np.testing.assert_array_equal(run_tiny(device), [0, 2, 0, 4])


def test_a_banner_before_the_first_answer_is_skipped():
    banner = agent_source().replace(
        "    protocol = os", "    os.write(1, b'Welcome to the board\\n\\n')\n    protocol = os"
    )
    with PipeDevice(TARGET, source=banner) as device:
        np.testing.assert_array_equal(run_tiny(device), [0, 2, 0, 4])


BAD_AGENTS = {
    "dies at once": "raise SystemExit(3)",
    "dies reading": "import sys; sys.stdin.buffer.readline(); sys.exit('out of memory')",
    "is killed": "import sys, os; sys.stdin.buffer.readline(); os.kill(os.getpid(), 9)",
    "hangs": "import sys, time; sys.stdin.buffer.readline(); time.sleep(60)",
    "hangs and does not read": "import time; time.sleep(60)",
    "answers no json": "import os, sys; sys.stdin.buffer.readline(); os.write(1, b'EPA1 {not json\\n'); input()",
    "answers a list": "import os, sys; sys.stdin.buffer.readline(); os.write(1, b'EPA1 []\\n'); input()",
    "answers another job": """import os, sys; sys.stdin.buffer.readline()
os.write(1, b'EPA1 {"id": 9, "sizes": []}\\n'); import time; time.sleep(60)""",
    "promises more than it sends": """import os, sys; sys.stdin.buffer.readline()
os.write(1, b'EPA1 {"id": 1, "ok": true, "sizes": [100]}\\nfew')""",
    "sends garbage": "import os, sys; sys.stdin.buffer.readline(); os.write(1, bytes(range(256)) * 100)",
    "is no python": "this is no python",
}


@pytest.mark.parametrize("name", BAD_AGENTS)
def test_bad_agents_are_one_line_and_soon(name):
    blob = bytes(3_000_000)  # more than a pipe holds
    with PipeDevice(TARGET, source=BAD_AGENTS[name]) as device:
        start = time.monotonic()
        with pytest.raises(DeviceLostError) as error:
            device.run(Job("run", {}, [blob], timeout_s=1.5))
        assert time.monotonic() - start < 10
        assert "\n" not in str(error.value)
        assert "target cpu" in str(error.value)
        assert isinstance(error.value, AgentStartError)  # none of them shook hands
        assert device._process is None


def test_the_last_words_are_in_the_message():
    source = BAD_AGENTS["dies reading"]
    with PipeDevice(TARGET, source=source) as device, pytest.raises(DeviceLostError, match="out of memory"):
        device.run(Job("hello", {}, timeout_s=5))


def test_the_next_job_starts_a_fresh_agent(tmp_path):
    once = f"""import os, sys
if not os.path.exists({str(tmp_path / "died")!r}):
    open({str(tmp_path / "died")!r}, "w").close()
    sys.exit(1)
"""
    with PipeDevice(TARGET, source=once + agent_source()) as device:
        with pytest.raises(DeviceLostError):
            device.run(Job("hello", {}, timeout_s=20))
        np.testing.assert_array_equal(run_tiny(device), [0, 2, 0, 4])


def test_endless_header_is_cut_off(monkeypatch):
    monkeypatch.setattr(module, "HEADER_LIMIT", 1 << 20)
    endless = "import os, sys; sys.stdin.buffer.readline()\nwhile True: os.write(1, b'EPA1 ' + b'x' * 60000)"
    with PipeDevice(TARGET, source=endless) as device, pytest.raises(DeviceLostError, match="without end"):
        device.run(Job("hello", {}, timeout_s=30))


def test_no_interpreter_is_a_device_error():
    with PipeDevice(TARGET, argv=["/no/such/python", "-c"]) as device, pytest.raises(DeviceError, match="cannot start"):
        device.run(Job("hello", {}))


def test_unknown_connection_is_refused():
    with pytest.raises(DeviceError, match="'pigeon'"):
        connect(Target("x", device="pigeon"))


STRANGE = """
def power_mode(count=[0]):
    count[0] += 1
    return %s
"""


@pytest.mark.parametrize("modes", ["'15W' if count[0] < 7 else 'MAXN'", "'15W' if count[0] < 8 else 'MAXN'"])
def test_a_change_of_the_power_mode_is_told_and_its_answer_not_taken(modes):
    """In hello and in each job the mode is read twice: it changes before, or within, the third job."""
    strange = agent_source().replace("\nmain(JOBS)", STRANGE % modes + "\nmain(JOBS)")
    with PipeDevice(TARGET, source=strange) as device:
        assert device.fingerprint.power == "15W"
        run_tiny(device)
        run_tiny(device)
        with pytest.raises(DeviceChangedError, match="'15W' and '.*MAXN'; set it back") as error:
            run_tiny(device)
        assert not isinstance(error.value, DeviceLostError)
        run_tiny(device)  # a fresh agent finds it set back
        device._end()
        device.source = agent_source()
        with pytest.raises(DeviceChangedError, match="power '15W' and ''"):
            run_tiny(device)


def test_a_hang_up_ends_a_running_job_and_clears_up():
    endless = agent_source().replace("JOBS = {", "JOBS = {'spin': lambda job, blobs: sum(iter(int, 1)),")
    with PipeDevice(TARGET, source=endless) as device:
        run_tiny(device)
        agent = device._process
        (folder,) = Path(tempfile.gettempdir()).glob(f"edgeprune-agent-{agent.pid}-*")
        with pytest.raises(DeviceLostError, match="no answer in time"):
            device.run(Job("spin", {}, timeout_s=0.3))
        run_tiny(device)
        agent = device._process
        os.write(device._to, b'EPA1 {"op": "spin", "id": 0, "sizes": []}\n')
        time.sleep(0.3)
        agent.stdin.close()  # all that a lost link does to an agent
        assert agent.wait(5) == -9
        deadline = time.monotonic() + 5
        while list(Path(tempfile.gettempdir()).glob(f"edgeprune-agent-{agent.pid}-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list(Path(tempfile.gettempdir()).glob(f"edgeprune-agent-{agent.pid}-*"))
        assert not folder.exists()


def test_closing_ends_the_process(device):
    with connect(TARGET) as opened:
        run_tiny(opened)
        process = opened._process
        assert process is not None
    assert process.poll() is not None


@pytest.mark.parametrize("name", ["agent.py", "agent_ort.py"])
def test_agent_is_old_python_and_standard_library_only(name):
    tree = ast.parse(Path(module.__file__).with_name(name).read_text(), feature_version=(3, 8))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert top <= sys.stdlib_module_names
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    inside = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names} - top
    assert inside <= {"numpy", "onnxruntime", "resource"}


def test_both_ends_have_the_same_protocol():
    assert module.MAGIC == b"EPA1 "
    assert f"\nPROTOCOL = {protocol.PROTOCOL} " in agent_source()


def test_an_agent_of_another_version_is_refused():
    for replaced in ("PROTOCOL = 2 ", "PROTOCOL = None "):
        source = agent_source().replace(f"PROTOCOL = {protocol.PROTOCOL} ", replaced)
        with PipeDevice(TARGET, source=source) as device, pytest.raises(DeviceError, match="its agent speaks protocol"):
            run_tiny(device)


def test_only_the_measuring_part_is_in_the_fingerprint():
    source = agent_source()
    assert agent_sha256(source + "\n# more") == agent_sha256(source)
    assert agent_sha256(source.replace("time.perf_counter()", "time.time()", 1)) != agent_sha256(source)


def test_the_package_never_imports_the_agent():
    package = Path(module.__file__).parent.parent
    for path in package.rglob("*.py"):
        assert "device.agent" not in path.read_text(encoding="utf-8"), path


def test_nothing_is_imported_from_the_folder_it_starts_in(tmp_path, monkeypatch):
    (tmp_path / "platform.py").write_text("raise SystemExit(7)\n")
    (tmp_path / "numpy.py").write_text("raise SystemExit(8)\n")
    monkeypatch.chdir(tmp_path)
    with connect(Target("cpu")) as device:
        assert device.fingerprint.runtime == "onnxruntime"


@pytest.mark.parametrize("runtime", [Runtime("tensorrt"), Runtime(precision="fp16")])
def test_what_cannot_be_measured_yet_is_refused(runtime):
    with pytest.raises(DeviceError, match="cannot be measured yet; expected 'onnxruntime'"):
        connect(Target("x", runtime=runtime))
