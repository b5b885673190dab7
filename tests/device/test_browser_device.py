"""A real Chromium with the real onnxruntime-web runs the jobs; it is reloaded, hidden, overworked, served by https."""

import dataclasses
import shutil
import subprocess
import threading
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from chromium import Browser, needs_chromium, runtime_files
from onnx import TensorProto, helper, numpy_helper

from edgeprune.device.connect import connect
from edgeprune.device.device import DeviceLostError, Job
from edgeprune.device.target import Protocol, find_target
from edgeprune.errors import DeviceError
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.measure import REFERENCE, measure_batch, measure_overhead
from edgeprune.latency.networks import measure_networks

pytestmark = needs_chromium
QUICK = Protocol(id="quick", warmup_ms=20, kernel_ms=15, batch_ms=1, rounds=5, round_ms=10, evict_mb=4)


def network(channels: int, size: int, seed: int = 0) -> bytes:
    """Two convolutions with a residual sum, a pooling and a matrix product."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (channels, 3, 3, 3), "w2": (channels, channels, 3, 3), "w3": (channels, 10), "b": (channels,)}
    constants = [
        numpy_helper.from_array((rng.normal(size=shape) * 0.2).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b"], ["a"], pads=[1] * 4, name="n1"),
        helper.make_node("Relu", ["a"], ["r"], name="n2"),
        helper.make_node("Conv", ["r", "w2"], ["c"], pads=[1] * 4, name="n3"),
        helper.make_node("Add", ["c", "r"], ["s"], name="n4"),
        helper.make_node("Relu", ["s"], ["t"], name="n5"),
        helper.make_node("GlobalAveragePool", ["t"], ["p"], name="n6"),
        helper.make_node("Flatten", ["p"], ["f"], name="n7"),
        helper.make_node("MatMul", ["f", "w3"], ["y"], name="n8"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        runtime_files(folder)
        patch.setenv("EDGEPRUNE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.kill()


@pytest.fixture(scope="module")
def device(browser):
    target = dataclasses.replace(find_target("web-wasm"), protocol=QUICK, patience_s=60.0)
    with connect(target) as served:
        browser.open(served.url)
        yield served


def outputs(device, model: bytes, x: np.ndarray) -> np.ndarray:
    result = device.run(Job("run", {"inputs": [["x", "float32", list(x.shape)]]}, [model, x.tobytes()]))
    assert result.ok, result.error
    (name, dtype, shape), blob = result.fields["outputs"][0], result.blobs[0]
    assert (name, dtype) == ("y", "float32")
    return np.frombuffer(blob, np.float32).reshape(shape)


def test_the_page_tells_what_it_is(device):
    found = device.fingerprint
    assert "Chromium" in found.machine
    assert "cores" in found.machine
    assert (found.runtime, found.provider, found.threads) == ("onnxruntime-web", "wasm", 1)
    assert found.runtime_version.count(".") == 2
    assert device._clock_us <= 20  # the page is isolated


def test_outputs_are_those_of_onnxruntime(device):
    model = network(16, 24)
    x = np.random.default_rng(1).normal(size=(1, 3, 24, 24)).astype(np.float32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    np.testing.assert_allclose(outputs(device, model, x), expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_ten_times_as_large_takes_longer(device):
    def wide(channels: int) -> Kernel:
        return dataclasses.replace(REFERENCE, inputs=((1, 16, 28, 28),), output=(1, channels, 28, 28))

    small, large, plain = measure_batch(
        device, [wide(16), wide(160), Kernel("Relu", (), ((1, 16, 28, 28),), (1, 16, 28, 28))]
    )
    assert 3 < large.hot_ms / small.hot_ms < 40
    assert 0 < plain.hot_ms < small.hot_ms
    assert (small.nodes, large.nodes) == (1, 1)
    assert small.hot_ref_ms > small.small_ref_ms > 0


@pytest.mark.slow
def test_the_profiler_costs_little_and_is_told(device):
    row = measure_overhead(device)
    assert 0 <= row.hot_ms < row.ref_ms


def test_a_pad_of_nothing_costs_nothing(device):
    (row,) = measure_batch(device, [Kernel("Pad", (("mode", "constant"),), ((1, 8, 8, 8),), (1, 8, 8, 8))])
    assert (row.hot_ms, row.error) == (0.0, "")


def test_networks_are_timed_against_each_other(device):
    timings = measure_networks(device, {"a": network(16, 32), "same": network(16, 32, 1), "wide": network(64, 32)})
    assert 0.7 < timings.ratio("same", "a").value < 1.4
    assert timings.ratio("wide", "a").value > 3


def test_failed_jobs_are_values(device):
    for job in (
        Job("optimize", {}),
        Job("run", {"inputs": []}, [b"no model"]),
        Job("networks", {"weights": [[]]}, [b""]),
    ):
        result = device.run(job)
        assert not result.ok
        assert result.error
        assert "\n" not in result.error
    x = np.ones((1, 3, 8, 8), np.float32)
    assert outputs(device, network(4, 8), x).shape == (1, 10)


def test_a_job_beyond_its_time_is_given_up_and_the_next_one_runs(device):
    fields = {"weights": [[]], "warmup_ms": 1, "rounds": 10**6, "round_ms": 10, "seed": 0, "limit_s": 10**6}
    with pytest.raises(DeviceLostError, match="no answer in time"):
        device.run(Job("networks", fields, [network(4, 8)], timeout_s=1.0))
    x = np.ones((1, 3, 8, 8), np.float32)
    assert outputs(device, network(4, 8), x).shape == (1, 10)


def test_a_worker_that_cannot_be_loaded_answers_no_job(device):
    files = device._server.files
    assert device.fingerprint.threads == 1  # the page is there
    held = files.pop("browser.js")
    fields = {"weights": [[]], "warmup_ms": 1, "rounds": 10**6, "round_ms": 10, "seed": 0, "limit_s": 10**6}
    try:
        with pytest.raises(DeviceLostError):  # the page needs another worker now
            device.run(Job("networks", fields, [network(4, 8)], timeout_s=1.0))
        job = Job("run", {"inputs": [["x", "float32", [1, 3, 8, 8]]]}, [network(4, 8), bytes(4 * 3 * 64)])
        thread, found = in_background(device, job)
        time.sleep(3)
        assert not found
    finally:
        files["browser.js"] = held
    thread.join(60)
    assert found[0].ok


def long_job() -> Job:
    """About two seconds."""
    fields = {"weights": [[]], "warmup_ms": 1, "rounds": 20, "round_ms": 100, "seed": 0, "limit_s": 60}
    return Job("networks", fields, [network(8, 16)], timeout_s=60.0)


def in_background(device, job):
    found = []
    thread = threading.Thread(target=lambda: found.append(device.run(job)), daemon=True)
    thread.start()
    return thread, found


def test_a_reload_in_the_middle_loses_nothing(browser, device):
    thread, found = in_background(device, long_job())
    browser.wait("state", "Measuring")
    browser.reload()
    thread.join(60)
    assert found[0].ok
    assert len(found[0].fields["samples"][0]) == 20


def test_what_was_measured_while_hidden_is_measured_again(browser, device):
    browser.wait("state", "Waiting")
    browser.script(
        "window.begun = 0; const post = Worker.prototype.postMessage;"
        "Worker.prototype.postMessage = function(m, ...r) {"
        "if (m.kind === 'job') window.begun += 1; return post.call(this, m, ...r); };"
        "Object.defineProperty(document, 'hidden', {get: () => window.covered, configurable: true});"
        "window.cover = (yes) => { window.covered = yes; document.dispatchEvent(new Event('visibilitychange')); };"
        "window.cover(false);"
    )
    thread, found = in_background(device, long_job())
    browser.wait("state", "Measuring")
    browser.script("window.cover(true)")
    browser.wait("state", "Paused")
    time.sleep(0.5)
    assert not found
    browser.script("window.cover(false)")
    thread.join(60)
    assert found[0].ok
    assert browser.script("return window.begun") == 2


@pytest.mark.slow
def test_a_second_page_takes_over_and_the_first_says_so(browser, device):
    first = browser.command("/window", method="GET")
    second = browser.command("/window/new", {"type": "tab"})["handle"]
    browser.command("/window", {"handle": second})
    browser.open(device.url)
    browser.wait("state", "Waiting")
    browser.command("/window", {"handle": first})
    browser.wait("trouble", "Another page")
    browser.command("/window", {"handle": second})
    assert outputs(device, network(4, 8), np.ones((1, 3, 8, 8), np.float32)).shape == (1, 10)


def test_a_wrong_address_shows_nothing(browser, device):
    browser.open(device.url[:-3] + "x/")
    assert "wrong token" in browser.script("return document.body.innerText")
    browser.open(device.url)
    browser.wait("state", "Waiting")


@pytest.mark.slow
def test_more_threads_than_one(browser, home):
    with connect(find_target("web-wasm", threads=2)) as device:
        browser.open(device.url)
        assert device.fingerprint.threads == 2
        assert outputs(device, network(16, 16), np.ones((1, 3, 16, 16), np.float32)).shape == (1, 10)
    browser.wait("state", "Finished")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_by_https_the_page_is_isolated_too(browser, tmp_path, home):
    pem = tmp_path / "page.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=edgeprune",
         "-keyout", str(tmp_path / "key.pem"), "-out", str(pem)],
        check=True, capture_output=True,
    )  # fmt: skip
    target = dataclasses.replace(find_target("web-wasm"), certificate=str(pem), key=str(tmp_path / "key.pem"))
    with connect(target) as device:
        assert device.url.startswith("https://127.0.0.1:")
        browser.open(device.url)
        assert device.fingerprint.provider == "wasm"
        assert device._clock_us <= 20


@pytest.mark.slow
def test_webgpu_computes_the_same_on_a_software_adapter(home):
    """Its times mean nothing there, so only outputs are compared."""
    opened = Browser(
        "--enable-unsafe-webgpu",
        "--use-webgpu-adapter=swiftshader",
        "--use-angle=swiftshader",
        "--ignore-gpu-blocklist",
    )
    try:
        with connect(find_target("web-webgpu")) as device:
            opened.open(device.url)
            try:
                machine = device.fingerprint.machine
            except DeviceError as error:
                pytest.skip(f"no WebGPU in this Chromium: {error}")
            assert machine.split(", ")[2]  # names the adapter
            x = np.random.default_rng(2).normal(size=(1, 3, 16, 16)).astype(np.float32)
            model = network(8, 16)
            (expected,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
            np.testing.assert_allclose(outputs(device, model, x), expected, rtol=1e-3, atol=1e-3)
    finally:
        opened.kill()


@pytest.mark.slow
def test_webgpu_without_a_gpu_is_told(browser, home):
    with connect(find_target("web-webgpu")) as device:
        browser.open(device.url)
        with pytest.raises(DeviceError, match="web-wasm"):
            device.fingerprint  # noqa: B018
