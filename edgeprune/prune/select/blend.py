"""Blended criteria: let evolution mix the rankings of several methods, group by group.

Source: He et al. (2021): cluster criteria whose rankings agree, take one of each cluster, evolve their calibration
factors on the accuracy of the pruned network.

    cluster    average linkage on 1 - Spearman's correlation of the criteria's ranks, cut at ``ALIKE``; the medoid stays
    mixture    score of a unit = sum_c a_c rank_c / n, a on the simplex; a one-hot a is that criterion
    evolution  all one-hots and the even mixture, then children of the two best, mixed and disturbed

Shapes: ranks (criteria, units), the most important unit n and the least important 1.
Deviations: every group has a mixture of its own, judged alone, so that a trial runs from that group on only. Fitness is
the divergence of the network's output from the original's, without labels, at three quarters of the width, its readers
refitted in place of new batch norm statistics, on the images that damage is measured on, which the criteria have not
seen. The number of trials bounds the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy
import torch

from edgeprune.graph.channels import ChannelGroup
from edgeprune.prune.consumers import RIDGE, Consumer, without_units
from edgeprune.prune.gram import residuals
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.cap import cap, systems
from edgeprune.prune.select.curve import Curve, LocalCurve, Selector, from_scores
from edgeprune.prune.select.fp import fp_backward, fp_backward_out
from edgeprune.prune.select.magnitude import magnitude, magnitude_in
from edgeprune.prune.select.taylor import taylor
from edgeprune.prune.select.thinet import thinet

CRITERIA: tuple[Selector, ...] = (cap, taylor, thinet, fp_backward, fp_backward_out, magnitude_in, magnitude)
ALIKE = 0.2  # 1 - Spearman of criteria that say the same
SHARE = 0.75  # the width that is tried: a round rarely cuts deeper
TRIALS = 16  # different sets of channels tried in each group
CHILDREN = 96  # mixtures thought of; most choose channels that were tried already
SPREAD = 0.3

Fitness = Callable[[np.ndarray], float]


def blend(judge: Judge, groups: Sequence[ChannelGroup], criteria: Sequence[Selector] = CRITERIA) -> Curve:
    chosen = [criterion(judge, groups) for criterion in criteria]

    def curve(group: ChannelGroup, consumers: Sequence[Consumer]) -> LocalCurve:
        ranks = np.stack([ranks_of(c(group, consumers).order) for c in chosen])
        ranks = ranks[representatives(ranks)]
        width = max(1, round(SHARE * group.size))

        def fitness(order: np.ndarray) -> float:
            return judge.exchanged_error(without_units(consumers, order[width:].tolist()))

        scores = evolve(ranks, width, fitness) @ ranks / group.size
        order = order_of(scores)
        problems = systems(consumers)
        if not problems:
            return from_scores(torch.from_numpy(scores))
        cost = torch.stack([residuals(s, order.tolist(), RIDGE) for s in problems]).sum(0)
        return LocalCurve(order, cost.numpy())

    return curve


def ranks_of(order: np.ndarray) -> np.ndarray:
    """(units,) n for the first of an order down to 1 for the last."""
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order), 0, -1)
    return ranks


def order_of(scores: np.ndarray) -> np.ndarray:
    """Units by descending score."""
    return np.argsort(-scores, kind="stable")


def representatives(ranks: np.ndarray) -> list[int]:
    """One criterion of each cluster, the one nearest to the others in it; in the criteria's order."""
    if 1 in ranks.shape:
        return [0]
    distance = np.clip(1 - np.corrcoef(ranks), 0, 2)  # of ranks, Pearson's correlation is Spearman's
    np.fill_diagonal(distance, 0)
    pairs = scipy.spatial.distance.squareform(distance, checks=False)
    tree = scipy.cluster.hierarchy.linkage(pairs, "average")
    clusters = scipy.cluster.hierarchy.fcluster(tree, ALIKE, "distance")
    found = []
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        found.append(int(members[distance[np.ix_(members, members)].sum(1).argmin()]))
    return sorted(found)


def evolve(ranks: np.ndarray, width: int, fitness: Fitness, seed: int = 0) -> np.ndarray:
    """(criteria,) the mixture found whose order has the smallest ``fitness``; its first ``width`` units count.
    Never worse than the best criterion alone."""
    rng = np.random.default_rng(seed)
    n = len(ranks)
    tried: dict[bytes, float] = {}
    population: list[tuple[float, np.ndarray]] = []
    first = [*np.eye(n), np.full(n, 1 / n)]
    for i in range(CHILDREN):
        mixture = first[i] if i < len(first) else _child(population, rng)
        order = order_of(mixture @ ranks)
        key = np.sort(order[:width]).tobytes()
        if key not in tried:
            if len(tried) == TRIALS:
                break
            tried[key] = fitness(order)
        population.append((tried[key], mixture))
        if n == 1:
            break
    return min(population, key=lambda pair: pair[0])[1]


def _child(population: Sequence[tuple[float, np.ndarray]], rng: np.random.Generator) -> np.ndarray:
    (_, a), (_, b) = sorted(population, key=lambda pair: pair[0])[:2]
    share, noise = rng.uniform(), rng.dirichlet(np.ones(len(a)))
    return (1 - SPREAD) * (share * a + (1 - share) * b) + SPREAD * noise
