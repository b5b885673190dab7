"""Modules that are called more than once: some of their calls get a copy before its weights are changed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any

from torch import fx, nn


def has(module: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(module)
        return True
    except AttributeError:
        return False


def clone(module: nn.Module, path: str) -> str:
    """Copy the submodule at ``path`` beside itself; the copy's path."""
    number = 2
    while has(module, f"{path}_{number}"):
        number += 1
    module.add_submodule(f"{path}_{number}", copy.deepcopy(module.get_submodule(path)))  # type: ignore[operator]
    return f"{path}_{number}"


def own_modules(module: fx.GraphModule, calls: Iterable[fx.Node]) -> list[Any]:
    """The modules of these calls, each once. Where others call one too, these calls get a copy of it."""
    wanted = list(dict.fromkeys(calls))
    found = []
    for path in dict.fromkeys(str(call.target) for call in wanted):
        every = [n for n in module.graph.nodes if n.op == "call_module" and n.target == path]
        mine = [n for n in every if n in wanted]
        target = path if len(mine) == len(every) else clone(module, path)
        for call in mine:
            call.target = target
        found.append(module.get_submodule(target))
    return found
