"""The list of kernels for onnxruntime-web against the nodes that its profiler tells in a real browser."""

from collections import Counter

import pytest
from chromium import Browser, needs_chromium, runtime_files
from test_fusion import NETWORKS

from edgeprune.device.connect import connect
from edgeprune.device.device import Job
from edgeprune.device.target import find_target
from edgeprune.latency.fusion import sites

pytestmark = needs_chromium
ONE_RUN = {"weights": [], "warmup_ms": 0, "time_ms": 0, "least": 1, "evict_mb": [0], "compare": False}
NAMES = {"FusedConv": "Conv", "FusedGemm": "Gemm", "QuickGelu": "Sigmoid", "Flatten": "Reshape"}


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    runtime_files(home)
    browser = Browser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_HOME", str(home))
        with connect(find_target("web-wasm")) as opened:
            browser.open(opened.url)
            yield opened
    browser.kill()


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_are_those_of_the_browsers_runtime(name, device):
    model = NETWORKS[name]
    result = device.run(Job("kernels", ONE_RUN, [model.SerializeToString()]))
    assert result.ok, result.error
    found = Counter(NAMES.get(op, op) for _, op in result.fields["nodes"])
    swishes = found.pop("HardSigmoid", 0)  # the runtime runs HardSwish as HardSigmoid and Mul
    found["HardSwish"] += swishes
    found["Mul"] -= swishes
    expected = Counter(site.kernel.op for site in sites(model, device.target.fusion))
    assert +found == +expected
