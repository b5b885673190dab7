"""What may I pass to ``--method``? One dict; a method is added by one function and one line."""

from __future__ import annotations

from edgeprune.errors import UsageError
from edgeprune.prune.select.cap import cap
from edgeprune.prune.select.curve import Selector
from edgeprune.prune.select.magnitude import magnitude
from edgeprune.prune.select.taylor import taylor

SELECTORS: dict[str, Selector] = {
    "cap": cap,
    "taylor": taylor,
    "magnitude": magnitude,
}
DATA_FREE = ("magnitude",)  # the best first


def selector_name(name: str | None, data: bool) -> str:
    """The selector to use: ``name``, or the default for what there is.

    Raises UsageError for an unknown one, and for one that needs images when there are none.
    """
    if name is None:
        return "cap" if data else DATA_FREE[0]
    if name not in SELECTORS:
        raise UsageError(f"--method {name!r} is not known; known methods: {', '.join(SELECTORS)}")
    if not data and name not in DATA_FREE:
        raise UsageError(
            f"--method {name} chooses by what it sees in images; give --data, or use --method {DATA_FREE[0]}"
        )
    return name
