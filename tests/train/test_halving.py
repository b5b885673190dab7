"""The search within one group, driven by damages that are written down by hand."""

import numpy as np
import pytest

from edgeprune.train.halving import Search

ALL = range(1, 100)


def told(search, damages, threshold):
    """One round in which every unit of the search space is charged the damage in the list."""
    for unit in np.flatnonzero(search.space):
        drawn = np.zeros((1, search.size), bool)
        drawn[0, unit] = True
        search.charge(drawn, np.array([damages[unit]]))
    return search.decide(threshold)


def space(search):
    return np.flatnonzero(search.space).tolist()


def test_a_move_takes_the_half_that_hurts_least_and_starts_again():
    search = Search(8, ALL)
    assert search.step() == 4
    move = told(search, [0.5, 0.1, 0.6, 0.2, 0.7, 0.3, 0.8, 0.4], threshold=0.4)
    assert (move.units, move.damage) == ((1, 3, 5, 7), 0.4)
    assert search.width == 8  # it waits
    search.accept()
    assert (space(search), search.width, search.step()) == ([0, 2, 4, 6], 4, 2)
    assert (search.waiting, search.looked, search.count.sum()) == (None, True, 0)


def test_halves_down_to_one_unit_and_a_restart():
    search, damages = Search(8, ALL), [0.5, 0.1, 0.6, 0.2, 0.7, 0.3, 0.8, 0.4]
    assert told(search, damages, 0.05) is None
    assert (space(search), search.step(), search.looked) == ([1, 3, 5, 7], 2, False)
    assert told(search, damages, 0.05) is None
    assert (space(search), search.step(), search.looked) == ([1, 3], 1, False)
    assert told(search, damages, 0.05) is None
    assert (space(search), search.step(), search.looked) == ([1], 1, False)
    assert told(search, damages, 0.05) is None
    assert (space(search), search.step(), search.looked) == (list(range(8)), 4, True)
    assert search.refused == {4: 0.4, 6: 0.2, 7: 0.1}
    assert not search.moves


def test_a_half_that_is_cheap_enough_alone():
    search, damages = Search(8, ALL), [0.5, 0.1, 0.6, 0.2, 0.7, 0.3, 0.8, 0.4]
    assert told(search, damages, 0.2) is None
    assert told(search, damages, 0.2).units == (1, 3)
    search.accept()
    assert search.width == 6
    assert not search.refused


def test_the_largest_damage_decides_and_at_most_is_enough():
    damages = [0.0, 0.0, 0.0, 0.3, 1, 1, 1, 1]
    assert told(Search(8, ALL), damages, 0.29) is None
    assert told(Search(8, ALL), damages, 0.3).damage == 0.3


def test_a_unit_that_was_never_drawn_is_never_taken():
    search = Search(4, ALL)
    drawn = np.array([[True, True, False, False]])
    search.charge(drawn, np.array([0.2]))
    assert search.means().tolist() == [0.2, 0.2, np.inf, np.inf]
    assert search.decide(0.5).units == (0, 1)
    lonely = Search(4, ALL)
    lonely.charge(np.array([[True, False, False, False]]), np.array([0.0]))
    assert lonely.decide(np.inf) is None


def test_steps_lead_to_the_candidate_widths_only():
    search = Search(64, (16, 32, 48, 64))
    seen = []
    for _ in range(6):
        seen.append((int(search.space.sum()), search.step()))
        told(search, np.ones(64), 0.5)
    assert seen == [(64, 32), (32, 16), (16, 16)] * 2  # at last the very set that would go
    told(search, np.zeros(64), 0.5)
    search.accept()
    assert (search.width, search.step()) == (32, 16)


def test_for_a_step_of_more_than_half_the_group_halves_only_rank():
    search = Search(16, (4, 16))
    assert search.step() == 8
    assert told(search, np.arange(16) / 100, 0.5) is None  # cheap enough, but 8 units are no step
    assert (space(search), search.step(), search.looked, search.refused) == (list(range(12)), 12, False, {})
    assert told(search, np.ones(16), 0.5) is None
    assert (space(search), search.looked, search.refused) == (list(range(16)), True, {4: 1.0})
    told(search, np.arange(16) / 100, 0.5)
    assert told(search, np.zeros(16), 0.5).units == tuple(range(12))
    search.accept()
    assert (search.width, search.step()) == (4, 0)


def test_no_draw_goes_below_the_narrowest_width():
    search = Search(8, range(3, 9))
    taken = []
    while search.step():
        told(search, np.zeros(8), 0.0)
        taken.append(len(search.waiting.units))
        search.accept()
    assert (search.width, taken) == (3, [4, 1])


def test_a_move_reaches_no_further_than_the_floor():
    search, damages = Search(8, ALL), [0.5, 0.1, 0.6, 0.2, 0.7, 0.3, 0.8, 0.4]
    told(search, damages, 1.0)
    search.floor = 6
    assert search.affordable().units == (1, 3)
    search.accept()
    assert (search.width, search.step(), search.moves[0].units) == (6, 0, (1, 3))
    fresh = Search(8, ALL)
    fresh.floor = 5
    assert fresh.step() == 3


def test_a_move_that_gains_nothing_is_like_one_that_costs_too_much():
    search = Search(8, ALL)
    told(search, [0.5, 0.1, 0.6, 0.2, 0.7, 0.3, 0.8, 0.4], 1.0)
    search.decline()
    assert (space(search), search.waiting, search.width, search.looked) == ([1, 3, 5, 7], None, 8, False)


def test_draws_are_random_subsets_of_the_search_space():
    search = Search(8, ALL)
    told(search, [0.5, 0.1, 0.6, 0.2, 0.7, 0.3, 0.8, 0.4], 0.0)
    drawn = search.draw(np.random.default_rng(0), 3000)
    assert (drawn.sum(1) == 2).all()
    assert not drawn[:, [0, 2, 4, 6]].any()
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(pairs) == 6
    assert (abs(counts - 500) < 80).all()  # four standard deviations


def test_charging_is_the_mean_over_the_draws_that_held_a_unit():
    search, rng = Search(6, ALL), np.random.default_rng(1)
    total, count = np.zeros(6), np.zeros(6)
    for _ in range(5):
        drawn, damage = search.draw(rng, 4), rng.random(4)
        search.charge(drawn, damage)
        for units, d in zip(drawn, damage, strict=True):
            for unit in np.flatnonzero(units):
                total[unit] += d
                count[unit] += 1
    np.testing.assert_allclose(search.means(), total / count, rtol=1e-12)
    assert search.batches == 5


def walked():
    search = Search(8, ALL)
    told(search, [0.5, 0.1, 0.6, 0.2, 0.7, 0.3, 0.8, 0.4], 0.4)
    search.accept()  # 1 3 5 7 for 0.4
    told(search, [0.5, 0, 0.6, 0, 0.7, 0, 0.9, 0], 0.6)
    search.accept()  # 0 2 for 0.6
    told(search, [0, 0, 0, 0, 1.5, 0, 2.0, 0], 1.0)  # 4 for 1.5 is refused
    assert search.refused == {1: 1.5}
    return search


def test_the_ranking_goes_back_the_way_the_search_came():
    ranking = walked().ranking(threshold=1.0, beyond=1.0)
    assert ranking.order.tolist() == [6, 4, 2, 0, 7, 5, 3, 1]
    np.testing.assert_allclose(ranking.damage[2:], [1.0, 0.7, 0.4, 0.3, 0.2, 0.1, 0.0])
    np.testing.assert_allclose(ranking.damage[:2], [1.0 + 1.0 + 1.5 * 4, 1.0 + 1.0 + 1.5])
    assert (np.diff(ranking.damage) <= 0).all()


def test_a_group_that_never_moved_has_a_ranking_too():
    ranking = Search(4, ALL).ranking(threshold=0.1, beyond=0.5)
    assert sorted(ranking.order.tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(ranking.damage, [0.5 + 0.4, 0.5 + 0.1 * 2.25, 0.5 + 0.1, 0.5 + 0.05, 0.0])


@pytest.mark.parametrize("waits", [False, True])
def test_the_state_holds_everything(waits):
    search = walked()
    if waits:
        told(search, np.zeros(8), 1.0)
        assert search.waiting
    other = Search(8, ALL)
    other.load(search.state())
    for s in (search, other):
        if waits:
            s.accept()
        else:
            told(s, np.arange(8.0), 0.1)
    assert search.state() == other.state()
