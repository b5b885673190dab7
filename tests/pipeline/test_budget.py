import pytest

from edgeprune.errors import UsageError
from edgeprune.pipeline.budget import parse_budget


@pytest.mark.parametrize(
    ("text", "original_ms", "expected"),
    [("10ms", 99, 10), ("800us", 99, 0.8), ("0.5s", 99, 500), ("60%", 20, 12), ("1.6x", 16, 10), (" 2 ms ", 1, 2)],
)
def test_budget_in_milliseconds(text, original_ms, expected):
    assert parse_budget(text).ms(original_ms) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "10", "ten ms", "-5ms", "0ms", "10 minutes", "nanms", 0.6, None])
def test_nonsense_is_refused_with_examples(text):
    with pytest.raises(UsageError, match="10ms, 800us, 60% or 1.7x"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["100%", "120%", "1x", "0.5x"])
def test_a_budget_that_asks_for_nothing_is_refused(text):
    with pytest.raises(UsageError, match="allows the original latency"):
        parse_budget(text)
