"""docs/benchmarks/methods.md and its plots, from the rows that tools/bench_methods wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
REGIMES = {
    "closed": "No training: 1 024 unlabelled images (MobileNetV2: 125)",
    "recovery": "Equal recovery: two passes over the training images",
}
OVER = 0.01  # share of the original's latency by which a row may lie above its budget
Rows = Sequence[dict[str, Any]]


def write(rows: Rows, networks: Sequence[str], methods: Sequence[str]) -> None:
    lines = [
        "# Methods at equal measured latency", "",
        "Made by `tools/bench_methods`; target `cpu`, 1 thread. Latency is the measured share of the original's, timed",
        "again by a fresh process after the run. CIFAR-10: top-1 on the 10 000 test images. MobileNetV2: top-1 on 125",
        "ImageNet samples that calibration did not see, and in brackets how often it decides as the original does.",
        "Seconds are of a machine with other work; what lies more than a point above its budget is marked.", "",
    ]  # fmt: skip
    for regime, title in REGIMES.items():
        own = [r for r in rows if r["regime"] == regime]
        if own:
            lines += [f"## {title}", ""]
        for network in networks:
            here = [r for r in own if r["network"] == network]
            if here:
                plot = _plot(
                    here, f"{network}, {title.split(':')[0].lower()}", FOLDER / f"methods-{regime}-{network}.svg"
                )
                lines += [
                    f"### {network}",
                    "",
                    *_table(here, methods),
                    "",
                    *([f"![{network}]({plot})", ""] if plot else []),
                ]
    (FOLDER / "methods.md").write_text("\n".join(lines).rstrip() + "\n")


def _table(rows: Rows, methods: Sequence[str]) -> list[str]:
    budgets = sorted({r["budget"] for r in rows}, key=lambda b: -float(b.rstrip("%")))
    head = ["method"] + [f"{b}: {what}" for b in budgets for what in ("top-1", "latency", "s")]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for method in methods:
        own = {r["budget"]: r for r in rows if r["method"] == method}
        if own:
            lines.append("| " + " | ".join([method, *(c for b in budgets for c in _cells(own.get(b)))]) + " |")
    return lines


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    if "error" in row:
        return ["-", row["error"][:80].replace("|", "/"), str(row["seconds"])]
    shared = f" ({row['agreement']:.0%})" if row["network"] == "mobilenet_v2" else ""
    over = row["ratio"][0] > float(row["budget"].rstrip("%")) / 100 + OVER
    return [
        f"{100 * row['top1']:.2f}{shared}",
        f"{row['ratio'][0]:.3f}{' (over)' if over else ''}",
        str(row["seconds"]),
    ]


def _plot(rows: Rows, title: str, path: Path) -> str | None:
    good = [r for r in rows if "error" not in r]
    if not good:
        return None
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "edgeprune"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for i, method in enumerate(dict.fromkeys(r["method"] for r in good)):
        points = sorted((r["ratio"][0], 100 * r["top1"]) for r in good if r["method"] == method)
        style = "--" if method.startswith("Torch-Pruning") else "-"
        axes.plot(*zip(*points, strict=True), style, marker="osv^Dx+*"[i % 8], markersize=4, linewidth=1, label=method)
    axes.set(xlabel="measured latency / original", ylabel="top-1, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path.name
