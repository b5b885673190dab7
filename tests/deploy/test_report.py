from dataclasses import replace

import pytest

from edgeprune.deploy.report import Latency, NetworkFacts, Report, render
from edgeprune.errors import UsageError

BEFORE = NetworkFacts(Latency(10.0, 9.95, 10.05, 10.4, 400), 853_018, 127_000_000, 3_450_000, 0.9339)
AFTER = NetworkFacts(Latency(6.4, 6.38, 6.42, 6.6, 400), 400_000, 61_000_000, 1_620_000, 0.928)
REPORT = Report(
    name="resnet56", origin="resnet56.pt", input_shapes=[[1, 3, 32, 32]], asked="65%", budget_ms=6.5, predicted_ms=6.43,
    before=BEFORE, after=AFTER, ratio=[0.64, 0.637, 0.643], certificate=3e-7, verification={"error": 2e-7},
    target={"name": "cpu"}, widths={"layer1.0.conv1": [8, 16]}, removed=["layer1.3"], agreement=0.961,
    seconds={"shrink": 31.0}, warnings=["3 denormal weights were set to zero"], notes=["not augmented by flip"],
    untrained_accuracy=0.9,
)  # fmt: skip


def test_json_goes_there_and_back():
    again = Report.from_json(REPORT.to_json())
    assert again.to_json() == REPORT.to_json()
    assert again.after.latency.spread == pytest.approx(0.02 / 6.4)
    assert '"met": true' in REPORT.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 99, "met": true}', "null"])
def test_other_text_is_refused(text):
    with pytest.raises(UsageError):
        Report.from_json(text)


def test_table_has_asked_predicted_before_and_after():
    lines = render(REPORT).splitlines()
    assert lines[0].split() == ["asked", "predicted", "before", "after", "after", "/", "before"]
    latency = next(line for line in lines if line.startswith("latency"))
    for part in ("6.5 ms (65%)", "6.43 ms", "10 ms ±0.5%", "6.4 ms ±0.3%", "0.640 (0.637..0.643)"):
        assert part in latency
    accuracy = next(line for line in lines if line.startswith("accuracy  "))
    for part in ("93.39 %", "92.80 %", "-0.59 points"):
        assert part in accuracy
    text = "\n".join(lines)
    assert "budget met: 6.4 ms of 6.5 ms" in text
    assert "accuracy before training: 90.00 %" in text
    assert "cut == masked original to 3.0e-07, file == torch to 2.0e-07" in text
    assert "groups narrowed: 1, blocks removed: 1" in text
    assert "note: not augmented by flip" in text
    assert "warning: 3 denormal" in text


def test_missed_budget_says_by_how_much():
    missed = replace(REPORT, budget_ms=6.0, asked="6ms")
    assert not missed.met
    assert "budget MISSED by 6.7%" in render(missed)
    near = replace(REPORT, ratio=[0.657, 0.655, 0.659])
    assert "budget met, 1.1% over, within the 2% that timing spreads: " in render(near)
    assert "6 ms  " in render(missed)
    assert "(6ms)" not in render(missed)


def test_without_labels_accuracy_is_a_dash():
    plain = replace(
        REPORT,
        before=replace(BEFORE, accuracy=None),
        after=replace(AFTER, accuracy=None),
        agreement=None,
        untrained_accuracy=None,
    )
    row = next(line for line in render(plain).splitlines() if line.startswith("accuracy"))
    assert row.split() == ["accuracy", "-", "-", "-", "-", "-"]


def test_microseconds():
    fast = replace(REPORT, after=replace(AFTER, latency=Latency(0.64, 0.63, 0.65, 0.7, 9)))
    assert "640 us ±1.6%" in render(fast)
