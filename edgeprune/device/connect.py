"""Which device a target names."""

from __future__ import annotations

from edgeprune.device.browser import BrowserDevice
from edgeprune.device.device import Device, Say, silent
from edgeprune.device.pipe import PipeDevice
from edgeprune.device.pool import PoolDevice
from edgeprune.device.ssh import SshDevice, parse_address
from edgeprune.device.target import Target
from edgeprune.errors import DeviceError

RUNTIMES = ("onnxruntime", "onnxruntime-web")


def connect(target: Target, say: Say = silent) -> Device:
    """The device of a target; nothing is asked of it yet. Raises DeviceError for a kind that is not known.

    ``say`` is told what is waited for.
    """
    if target.runtime.name not in RUNTIMES or target.runtime.precision != "fp32":
        raise DeviceError(
            f"target {target.name}: runtime {target.runtime.name!r} with precision {target.runtime.precision!r} cannot "
            f"be measured yet; expected {' or '.join(map(repr, RUNTIMES))} with 'fp32'"
        )
    if target.device == "local":
        return PipeDevice(target, say=say)
    if target.device == "ssh":
        if not target.host:
            raise DeviceError(
                f"target {target.name} is reached by ssh; say where it is: --on HOST, or host = in its file"
            )
        hosts = [host.strip() for host in target.host.split(",")]
        if len(hosts) == 1:
            return SshDevice(target, hosts[0], say=say)
        if len({parse_address(host, target.user, target.port) for host in hosts}) < len(hosts):
            raise DeviceError(f"target {target.name}: {target.host} names a host twice; name each once")
        return PoolDevice({host: SshDevice(target, host, say=say) for host in hosts}, say=say)
    if target.device == "browser":
        return BrowserDevice(target)
    raise DeviceError(
        f"target {target.name}: device {target.device!r} is not known; expected 'local', 'ssh' or 'browser'"
    )
