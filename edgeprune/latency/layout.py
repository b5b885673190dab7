"""How many channels the runtime's own layout packs into a block on this device: asked, not assumed.

The runtime pads the weights of a convolution to whole blocks when it optimises a graph (16 channels with AVX-512, 8
with AVX2); a processor for which it has no such layout keeps the plain operator.
"""

from __future__ import annotations

from dataclasses import replace

import onnx

from edgeprune.device.device import Device, Job
from edgeprune.device.target import Fusion
from edgeprune.errors import DeviceError
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.measure import REFERENCE
from edgeprune.latency.micro import build


def device_fusion(device: Device) -> Fusion:
    """The target's fusion rules with the block of this very device. A target file that says block 0 is believed.

    Raises DeviceError when the device cannot load a single convolution.
    """
    fusion = device.target.fusion
    return replace(fusion, block=measured_block(device)) if fusion.block else fusion


def measured_block(device: Device) -> int:
    """Channels per block, 0 without a blocked layout."""
    kernel: Kernel = replace(REFERENCE, inputs=((1, 64, 4, 4),), output=(1, 1, 4, 4), tail=())
    micro = build([kernel])
    result = device.run(Job("optimize", {"weights": micro.weights}, [micro.model]))
    if not result.ok:
        raise DeviceError(f"target {device.target.name}: {result.error}")
    graph = onnx.load_from_string(result.blobs[0]).graph
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Conv" and "nchwc" in node.domain:
            weight = sizes.get(node.input[1], [])
            if len(weight) == 4 and weight[1] == 64:
                return int(weight[0])
    return 0
