import dataclasses

import onnx_nets as nets

from edgeprune.device.connect import connect
from edgeprune.device.target import Fusion, Target
from edgeprune.latency.layout import device_fusion, measured_block


def test_the_block_is_asked_from_the_device():
    with connect(Target("cpu")) as device:
        block = measured_block(device)
        assert block in (0, 8, 16)
        assert device_fusion(device) == dataclasses.replace(Fusion(), block=block)
    if nets.blocked_runtime():
        assert block == 16


def test_a_target_without_blocks_is_believed():
    with connect(Target("cpu", fusion=Fusion(block=0))) as device:
        assert device_fusion(device).block == 0
