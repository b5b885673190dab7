"""What may I pass to ``--method``? One dict; a method is added by one function and one line."""

from __future__ import annotations

from collections.abc import Callable

from edgeprune.plan.problem import Ranking
from edgeprune.prune.sensitivity import importance

# (network, channels, batches | None, original=None) -> group name -> Ranking
IMPORTANCE: dict[str, Callable[..., dict[str, Ranking]]] = {
    "cap": importance("cap"),
    "taylor": importance("taylor"),
    "magnitude": importance("magnitude"),
}
