"""Desk: where a device lays down one job at a time, and a page that comes and goes fetches it and brings its answer.

A page has an identity of its own from the moment it is loaded. The one that said hello last does the work; a job that
was fetched and not answered is handed out again, and the first answer to a job is the one that counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SILENT_S = 8.0  # a page says every second that it is there; after so long it is gone, asleep or cut off
Message = tuple[Mapping[str, Any], tuple[bytes, ...]]


class SupersededError(Exception):
    """This page is not the one that does the work; the text says why, for its reader."""


class FinishedError(Exception):
    """There will be no more jobs."""


@dataclass(slots=True)
class Task:
    """A job on the desk. ``pages``: those that fetched it. ``answer`` once it is there."""

    id: int
    message: Message
    pages: list[str] = field(default_factory=list)
    answer: Message | None = None


class Desk:
    """Thread-safe. ``accept`` is asked about every hello and returns why it is refused, or an empty text."""

    def __init__(self, accept: Callable[[Mapping[str, Any]], str]):
        self._accept = accept
        self.changed = threading.Condition()
        self.page = ""
        self.task: Task | None = None
        self.progress: dict[str, Any] = {"done": 0.0, "total": 0.0, "what": "", "left_s": None}
        self.hidden = False
        self._seen = 0.0
        self._finished = False
        self._told_finished = False

    # the page's side

    def arrive(self, page: str, hello: Mapping[str, Any]) -> None:
        """A page was loaded and its runtime started, or failed to. Raises SupersededError when it is refused."""
        with self.changed:
            reason = self._accept(hello)
            if reason:
                raise SupersededError(reason)
            self.page, self.hidden = page, False
            self._contact(page)

    def take(self, page: str, wait_s: float) -> Message | None:
        """The job that is not answered yet; waits for one. None: ask again."""
        with self.changed:
            self._contact(page)
            end = time.monotonic() + wait_s
            while self.task is None or self.task.answer is not None:
                if self._finished:
                    self._told_finished = True
                    self.changed.notify_all()
                    raise FinishedError
                left = end - time.monotonic()
                if left <= 0:
                    return None
                self.changed.wait(min(left, 1.0))
                self._contact(page)
            self.task.pages.append(page)
            self.changed.notify_all()
            return self.task.message

    def give(self, page: str, header: Mapping[str, Any], blobs: tuple[bytes, ...]) -> bool:
        """An answer; whether it was taken. A second one to the same job is not, nor one to a job given up."""
        with self.changed:
            self._contact(page)
            task = self.task
            if task is None or task.answer is not None or header.get("id") != task.id:
                return False
            task.answer = (header, blobs)
            self.changed.notify_all()
            return True

    def heartbeat(self, page: str, hidden: bool, job: int) -> dict[str, Any]:
        """The page is there. ``cancel`` in the reply names a job that it should give up."""
        with self.changed:
            if page != self.page:  # a page that has not said hello yet
                return {"cancel": 0, "progress": self.progress}
            self._contact(page)
            self.hidden = hidden
            wanted = self.task is not None and self.task.id == job
            return {"cancel": 0 if wanted or job <= 0 else job, "progress": self.progress}

    def _contact(self, page: str) -> None:
        if page != self.page:
            raise SupersededError("Another page does the work now; this one has stopped. Reload it to take over.")
        self._seen = time.monotonic()

    # the device's side

    @property
    def present(self) -> bool:
        """Whether a page is there and can work."""
        return bool(self.page) and time.monotonic() - self._seen < SILENT_S

    def lay(self, task: Task | None) -> None:
        """The next job, or none; what was there before is given up."""
        with self.changed:
            self.task = task
            self.changed.notify_all()

    def finish(self, wait_s: float) -> None:
        """No more jobs; waits a moment for the page to hear it."""
        with self.changed:
            self.task = None
            self._finished = True
            self.changed.notify_all()
            if self.present and not self.hidden:
                self.changed.wait_for(lambda: self._told_finished, wait_s)
