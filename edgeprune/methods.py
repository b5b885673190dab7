"""What may I pass to ``--method``? One dict; a method is added by one function and one line."""

from __future__ import annotations

from edgeprune.prune.sensitivity import Importance, importance

# (network, channels, batches | None, original=None) -> group name -> Ranking
IMPORTANCE: dict[str, Importance] = {
    "cap": importance("cap"),
    "taylor": importance("taylor"),
    "magnitude": importance("magnitude"),
}
