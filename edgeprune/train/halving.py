"""The search within one channel group for units that can go together: random halves of a shrinking search space.

Source: Ding et al., "Approximated Oracle Filter Pruning for Destructive CNN Width Optimization" (ICML 2019), binary
filter search. A set drawn from the search space is ablated, the damage it does is charged to each of its units, and
after enough draws either the best units go (a *move*), or the search goes on among the better half (a *half*), or it
starts again with all units that are left (a *restart*).

Shapes: n units; a mask is (n,) bool, draws are (parts, n) bool, their damages (parts,).

Deviations: as many units as a draw ablates go in a move, as in the source, but only so many that a width is left which
is worth having on the target (``widths``). The search space is halved all the same, down to the smallest such step;
then the very set that would go is ablated, without any chance in it. (The source ends one halving earlier.) Where every
step is more than half of the search space, halves are drawn to rank its units, and none goes. The damage of a move must
be at most the threshold (the source's code for PyTorch asks for less, that for TensorFlow for at most). A unit that was
never drawn counts as infinitely damaging (that code counts it as harmless).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.plan.problem import Ranking

TINY = 1e-9  # a move never counts as nothing: of two plans within the budget the wider one is taken


@dataclass(frozen=True, slots=True)
class Move:
    """Units that go together, the least damaging first, and the largest mean damage that was charged to one of them."""

    units: tuple[int, ...]
    damage: float


class Search:
    """widths: the widths the group may be left with, in any order; its size need not be among them.

    looked: whether the search has come to an end, with a move that waits or in vain, since this was last set to False
        from outside
    floor:  narrower than this is not asked for; to be set from outside
    """

    def __init__(self, size: int, widths: Sequence[int]) -> None:
        self.size = size
        self.widths = tuple(sorted({int(w) for w in widths if 0 < w < size}))
        self.alive = np.ones(size, bool)
        self.moves: list[Move] = []
        self.waiting: Move | None = None
        self.floor, self.looked = 0, False
        self.estimate = np.full(size, np.inf)  # the last mean damages over all units that were left then
        self.refused: dict[int, float] = {}  # width -> the damage of going down to it when that was last too much
        self.restart()

    @property
    def width(self) -> int:
        return int(self.alive.sum())

    def restart(self) -> None:
        """Search among all units that are left."""
        self._begin(self.alive.copy())

    def step(self) -> int:
        """How many units a draw ablates; 0 where no narrower width is left."""
        steps, members = self._steps(), int(self.space.sum())
        if not steps:
            return 0
        if members <= min(steps):
            return members
        return max((s for s in steps if s <= members // 2), default=members // 2)

    def draw(self, rng: np.random.Generator, parts: int) -> np.ndarray:
        """(parts, n): random subsets of the search space."""
        members = np.flatnonzero(self.space)
        chosen = members[np.argsort(rng.random((parts, len(members))), axis=1)[:, : self.step()]]
        drawn = np.zeros((parts, self.size), bool)
        np.put_along_axis(drawn, chosen, True, axis=1)
        return drawn

    def charge(self, drawn: np.ndarray, damage: np.ndarray) -> None:
        """Charge each draw's damage to all its units."""
        self.total += np.where(drawn, damage[:, None], 0.0).sum(0)
        self.count += drawn.sum(0)
        self.batches += 1
        self.draws += len(drawn)

    def means(self) -> np.ndarray:
        """(n,) mean damage charged to each unit; infinite where it was never drawn."""
        return np.divide(self.total, self.count, out=np.full(self.size, np.inf), where=self.count > 0)

    def decide(self, threshold: float) -> Move | None:
        """End a round of draws: the move that is cheap enough, which then waits to be accepted or declined; or None,
        and the search goes on among the better half, or has ``looked`` in vain and starts again."""
        members, means, step = np.flatnonzero(self.space), self.means(), self.step()
        if len(members) == self.width:
            self.estimate = np.where(self.alive, means, self.estimate)
        ranked = members[np.argsort(means[members], kind="stable")]
        if step in self._steps():
            move = Move(tuple(ranked[:step].tolist()), float(means[ranked[step - 1]]))
            if move.damage <= threshold and np.isfinite(move.damage):
                self.waiting, self.looked = move, True
                return move
            self.refused[self.width - step] = move.damage
        self._narrow(ranked)
        return None

    def accept(self) -> None:
        """Take the waiting move, or as much of it as the floor lets go: the units are gone, and the search starts
        again."""
        self.waiting = self.affordable()
        assert self.waiting is not None
        self.alive[list(self.waiting.units)] = False
        self.moves.append(self.waiting)
        self.refused.clear()
        self.restart()

    def affordable(self) -> Move | None:
        """The waiting move, or the part of it that leaves a width which is not below the floor."""
        if self.waiting is None:
            return None
        fitting = [s for s in self._steps() if s <= len(self.waiting.units)]
        return Move(self.waiting.units[: max(fitting, default=0)], self.waiting.damage)

    def decline(self) -> None:
        """The waiting move is worth nothing: go on as if it had been too damaging."""
        self.looked = False
        members, means = np.flatnonzero(self.space), self.means()
        self._narrow(members[np.argsort(means[members], kind="stable")])

    def ranking(self, threshold: float, beyond: float) -> Ranking:
        """Survivors first, then what went, last move first. Damage adds up over the moves. Narrower than where the
        search ended it is ``beyond`` more, and what was measured when going there was refused; where nothing was,
        it grows from ``threshold`` with the square of the units that go."""
        survivors = np.flatnonzero(self.alive)
        order = [*survivors[np.argsort(-self.estimate[survivors], kind="stable")].tolist()]
        order += [u for move in reversed(self.moves) for u in reversed(move.units)]
        widths, damage = [self.size], [0.0]
        for move in self.moves:
            widths.append(widths[-1] - len(move.units))
            damage.append(damage[-1] + max(move.damage, TINY))
        known = np.interp(np.arange(self.size + 1), widths[::-1], damage[::-1])
        known[: self.width] += beyond + self._further(threshold)
        return Ranking(np.asarray(order, dtype=np.int64), known)

    def _begin(self, space: np.ndarray) -> None:
        self.space = space
        self.total, self.count = np.zeros(self.size), np.zeros(self.size, np.int64)
        self.batches = self.draws = 0
        self.waiting = None

    def _steps(self) -> list[int]:
        return [self.width - w for w in self.widths if self.floor <= w < self.width]

    def _narrow(self, ranked: np.ndarray) -> None:
        """Go on among the better half of the search space, but no fewer than the smallest step, or start again."""
        members = max(len(ranked) // 2, min(self._steps(), default=len(ranked)))
        if members < len(ranked):
            space = np.zeros(self.size, bool)
            space[ranked[:members]] = True
            self._begin(space)
        else:
            self.restart()
            self.looked = True

    def _further(self, threshold: float) -> np.ndarray:
        """(width,) estimated damage of going from here down to each narrower width, never less for a narrower one."""
        gone = self.width - np.arange(self.width)
        points = sorted((self.width - w, d) for w, d in self.refused.items() if w < self.width and np.isfinite(d))
        steps = np.array([0.0, *(g for g, _ in points)])
        damage = np.maximum.accumulate([0.0, *(d for _, d in points)])
        if not points:
            steps, damage = np.array([0.0, max(1, self.step())]), np.array([0.0, max(threshold, TINY)])
        return np.interp(gone, steps, damage) * np.maximum(gone / steps[-1], 1.0) ** 2

    def state(self) -> dict[str, Any]:
        return {
            "alive": self.alive.tolist(),
            "space": self.space.tolist(),
            "total": self.total.tolist(),
            "count": self.count.tolist(),
            "batches": self.batches,
            "draws": self.draws,
            "moves": [[list(m.units), m.damage] for m in self.moves],
            "waiting": None if self.waiting is None else [list(self.waiting.units), self.waiting.damage],
            "estimate": self.estimate.tolist(),
            "refused": [list(item) for item in self.refused.items()],
            "looked": self.looked,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.alive, self.space = np.array(state["alive"], bool), np.array(state["space"], bool)
        self.total, self.count = np.array(state["total"], float), np.array(state["count"], np.int64)
        self.batches, self.draws, self.looked = state["batches"], state["draws"], state["looked"]
        self.moves = [Move(tuple(units), damage) for units, damage in state["moves"]]
        waiting = state["waiting"]
        self.waiting = None if waiting is None else Move(tuple(waiting[0]), waiting[1])
        self.estimate = np.array(state["estimate"], float)
        self.refused = {int(w): damage for w, damage in state["refused"]}
