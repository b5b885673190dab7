"""PoolDevice: several devices of one kind that share the work. Their rows go into one table, so they must be alike in
everything that the fingerprint tells; one that fails or changes is left out, and another does what it had in hand.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from edgeprune.device.device import AgentStartError, Device, DeviceLostError, Fingerprint, Job, Result, Say, silent
from edgeprune.errors import DeviceError

T = TypeVar("T")


class PoolDevice(Device):
    """``devices`` by the name of their host; closing the pool closes them."""

    def __init__(self, devices: dict[str, Device], say: Say = silent):
        self.devices = dict(devices)
        self.target = next(iter(devices.values())).target
        self.say = say
        self._fingerprint: Fingerprint | None = None
        self._all = list(devices.values())
        self._why: DeviceError | None = None

    def close(self) -> None:
        for device in self._all:
            device.close()

    @property
    def fingerprint(self) -> Fingerprint:
        """Raises DeviceError when one of the devices does not answer, or is unlike the others."""
        if self._fingerprint is None:
            found = {host: device.fingerprint for host, device in self.devices.items()}
            (first, expected), *others = found.items()
            for host, fingerprint in others:
                if fingerprint != expected:
                    unlike = expected.difference(fingerprint)
                    raise DeviceError(
                        f"target {self.target.name}: {first} and {host} are not alike: {unlike}; rows of one do not "
                        "hold for the other: make them alike, or measure on one of them"
                    )
            self._fingerprint = expected
        return self._fingerprint

    def run(self, job: Job) -> Result:
        """On the first device that works. Raises DeviceLostError as that device does, DeviceError when none is left."""
        while True:
            host, device = self._first()
            try:
                return device.run(job)
            except DeviceError as error:
                if isinstance(error, DeviceLostError) and not isinstance(error, AgentStartError):
                    raise
                self._leave_out(host, error)

    def share(self, items: Iterable[T], work: Callable[[Device, T], None]) -> None:
        """``work`` is called for each item with a device that is free. Raises DeviceError when none is left, and what
        else it raised."""
        waiting, failures = deque(items), list[BaseException]()

        def serve(host: str, device: Device) -> None:
            while not failures:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                try:
                    work(device, item)
                except DeviceError as error:
                    waiting.append(item)
                    return self._leave_out(host, error)
                except BaseException as error:
                    failures.append(error)

        while waiting and not failures:
            self._first()
            threads = [threading.Thread(target=serve, args=pair, daemon=True) for pair in self.devices.items()]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            except BaseException as error:  # interrupted: closing takes the devices away from under the others
                failures.append(error)
                self.close()
                raise
        if failures:
            raise failures[0]

    def _first(self) -> tuple[str, Device]:
        if not self.devices:
            assert self._why is not None
            raise self._why
        return next(iter(self.devices.items()))

    def _leave_out(self, host: str, error: DeviceError) -> None:
        self.devices.pop(host).close()
        self._why = error
        if self.devices:
            self.say(f"going on without {host}: {error}")


def share(device: Device, items: Sequence[T], work: Callable[[Device, T], None]) -> None:
    """As ``PoolDevice.share``; a device of another kind does all of it."""
    if isinstance(device, PoolDevice):
        device.share(items, work)
    else:
        for item in items:
            work(device, item)
