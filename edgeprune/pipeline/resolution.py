"""Compressing at another input size: what everything after the choice of a size works with.

The network at the small size is what is judged, cut, repaired, certified and verified: the reference of closed forms is
the original network run at that size. What a user compares with stays the original at its own size: its latency, its
accuracy, and its answers, from which the compressed network learns.
"""

from __future__ import annotations

import re

from edgeprune.errors import UsageError
from edgeprune.graph.network import Network
from edgeprune.graph.resolution import Size, size_of

AUTO = "auto"
_PATTERN = re.compile(r"\s*([1-9][0-9]{0,4})\s*(?:[xX]\s*([1-9][0-9]{0,4}))?\s*")


def parse_resolution(text: str | int | None, network: Network) -> Size | str | None:
    """``160`` or ``160x120`` (height x width) -> a size; AUTO and None stay.

    Raises UsageError when the text is no size or not smaller than the network's own, UnsupportedModelError when the
    network's input has no height and width.
    """
    if text is None:
        return None
    own = size_of(network)
    if str(text).strip().lower() == AUTO:
        return AUTO
    match = _PATTERN.fullmatch(str(text))
    if not match:
        raise UsageError(f"--resolution {text!r}: expected auto, or a size such as 160 or 160x120 (height x width)")
    size = int(match[1]), int(match[2] or match[1])
    if size[0] > own[0] or size[1] > own[1] or size == own:
        raise UsageError(f"--resolution {text}: expected less than the network's own {own[0]}x{own[1]}")
    return size


def preprocessing(original: Network, size: Size | None) -> str:
    """What whoever feeds the delivered network must do to its inputs; empty where nothing changed."""
    if size is None:
        return ""
    height, width = size_of(original)
    return (
        f"resize what the original would see at {height}x{width} to {size[0]}x{size[1]} (height x width, bilinear with "
        "antialiasing), then scale it as for the original"
    )


def metadata(original: Network, size: Size | None) -> dict[str, str]:
    """For the delivered file: its input's size and how inputs come to it; nothing where nothing changed."""
    return (
        {} if size is None else {"input_size": f"{size[0]}x{size[1]}", "preprocessing": preprocessing(original, size)}
    )
