"""Which device a target names."""

from __future__ import annotations

from edgeprune.device.device import Device, Say, silent
from edgeprune.device.pipe import PipeDevice
from edgeprune.device.ssh import SshDevice
from edgeprune.device.target import Target
from edgeprune.errors import DeviceError


def connect(target: Target, say: Say = silent) -> Device:
    """The device of a target; nothing is asked of it yet. Raises DeviceError for a kind that is not known.

    ``say`` is told what is waited for.
    """
    if target.device == "local":
        return PipeDevice(target, say=say)
    if target.device == "ssh":
        if not target.host:
            raise DeviceError(
                f"target {target.name} is reached by ssh; say where it is: --on HOST, or host = in its file"
            )
        return SshDevice(target, target.host, say=say)
    raise DeviceError(f"target {target.name}: device {target.device!r} is not known; expected 'local' or 'ssh'")
