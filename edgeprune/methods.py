"""What may I pass to ``--method`` and ``--planner``? Dict literals; a method is added by one function and one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from edgeprune.errors import UsageError
from edgeprune.plan.capsearch import cap_search
from edgeprune.plan.exact import exact
from edgeprune.plan.flops import flops
from edgeprune.plan.greedy import hbgs, hbgts
from edgeprune.plan.problem import Planner
from edgeprune.plan.uniform import uniform
from edgeprune.prune.select.blend import blend
from edgeprune.prune.select.cap import cap
from edgeprune.prune.select.curve import Selector
from edgeprune.prune.select.fp import fp_backward, fp_backward_out, fp_omp, fp_omp_out
from edgeprune.prune.select.magnitude import magnitude, magnitude_in
from edgeprune.prune.select.taylor import taylor
from edgeprune.prune.select.thinet import thinet, thinet_omp
from edgeprune.train.adaptive import ADAPTIVE
from edgeprune.train.aofp import aofp
from edgeprune.train.learner import Learner
from edgeprune.train.resconv import RESCONV
from edgeprune.train.ucp import ucp

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Method(Generic[F]):
    """
    function: what does it
    needs:    the least it works with
    decides:  what of a network it settles
    minutes:  what it typically adds to a run: ResNet-56 at 32 x 32 to half its latency, 1 024 images, one core
    summary:  one line
    source:   where it was published; "here" if nowhere else
    """

    function: F
    needs: Literal["nothing", "unlabelled data", "training"]
    decides: Literal["channels", "widths", "widths and blocks", "widths, blocks and resolution"]
    minutes: float
    summary: str
    source: str


SELECTORS: dict[str, Method[Selector]] = {
    "cap": Method(
        cap, "unlabelled data", "channels", 0.2,
        "the loss that the layers reading a channel cannot make up for", "Xie et al. 2021",
    ),
    "taylor": Method(
        taylor, "unlabelled data", "channels", 0.1,
        "how far the output moves without the channel, to first order", "Molchanov et al. 2017",
    ),
    "thinet": Method(
        thinet, "unlabelled data", "channels", 0.2,
        "greedily, what adds least to the outputs of the layers reading it", "Luo et al. 2017",
    ),
    "thinet-omp": Method(
        thinet_omp, "unlabelled data", "channels", 0.2,
        "what explains most of those outputs, by matching pursuit", "Luo et al. 2019",
    ),
    "blend": Method(
        blend, "unlabelled data", "channels", 2.0,
        "a mixture of all these criteria, evolved for each group", "He et al. 2021",
    ),
    "magnitude-in": Method(
        magnitude_in, "nothing", "channels", 0.1,
        "the weights that read a channel", "Li et al. 2017",
    ),
    "fp-backward": Method(
        fp_backward, "nothing", "channels", 0.1,
        "drop what the other weights reading the group combine to best", "Purohit et al. 2024",
    ),
    "fp-omp": Method(
        fp_omp, "nothing", "channels", 0.1,
        "keep what the other weights reading the group are combined from", "Purohit et al. 2024",
    ),
    "fp-backward-out": Method(
        fp_backward_out, "nothing", "channels", 0.1,
        "as fp-backward, on the filters that make the channels", "Purohit et al. 2024",
    ),
    "fp-omp-out": Method(
        fp_omp_out, "nothing", "channels", 0.1,
        "as fp-omp, on the filters that make the channels", "Purohit et al. 2024",
    ),
    "magnitude": Method(
        magnitude, "nothing", "channels", 0.1,
        "the weights that make a channel, times those that read it", "Li et al. 2017",
    ),
}  # fmt: skip

LEARNERS: dict[str, Method[Learner]] = {
    "aofp": Method(
        Learner(aofp), "training", "widths", 10.0,
        "random subsets of channels ablated while training goes on", "Ding et al. 2019",
    ),
    "resconv": Method(
        RESCONV, "training", "widths and blocks", 10.0,
        "layers and branches taken out where a factor on each comes to zero", "Xu et al. 2020",
    ),
    "ucp": Method(
        Learner(ucp), "training", "channels", 10.0,
        "the channels that gates, trained in front of their readers, let through", "Chang et al. 2020",
    ),
    "adaptive": Method(
        ADAPTIVE, "training", "widths and blocks", 10.0,
        "channels and layers taken out as their scales come to zero, one penalty for all", "Liu et al. 2017",
    ),
}  # fmt: skip

PLANNERS: dict[str, Method[Planner]] = {
    "exact": Method(
        exact, "nothing", "widths and blocks", 0.1,
        "least summed damage within the budget, with a proven gap", "here",
    ),
    "hbgs": Method(
        hbgs, "unlabelled data", "widths and blocks", 0.5,
        "move by move, least error of the layers next to it per millisecond", "Purohit et al. 2024",
    ),
    "hbgts": Method(
        hbgts, "unlabelled data", "widths and blocks", 1.2,
        "move by move, least error of the final output per millisecond", "Purohit et al. 2024",
    ),
    "cap": Method(
        cap_search, "unlabelled data", "widths", 2.0,
        "one tolerance for what every layer may lose, by bisection", "Xie et al. 2021",
    ),
    "uniform": Method(
        uniform, "nothing", "widths", 0.1,
        "one share for all groups; a baseline", "Howard et al. 2017",
    ),
    "flops": Method(
        flops, "nothing", "widths and blocks", 0.1,
        "exact, but on multiply-adds in place of milliseconds; a baseline", "here",
    ),
    "3d": Method(
        exact, "unlabelled data", "widths, blocks and resolution", 4.0,
        "the resolution that is best together with depth and width, then exact", "Wang et al. 2021",
    ),
}  # fmt: skip

DATA_FREE = tuple(name for name, method in SELECTORS.items() if method.needs == "nothing")  # the best first


def method_name(name: str | None, data: bool) -> str:
    """The selector or learner to use: ``name``, or the default for what there is.

    Raises UsageError for an unknown one, and for one that needs images when there are none.
    """
    if name is None:
        return "cap" if data else DATA_FREE[0]
    why = "trains while it chooses" if name in LEARNERS else "chooses by what it sees in images"
    return _usable(SELECTORS | LEARNERS, "method", name, data, why)


def planner_name(name: str | None, data: bool) -> str:
    """The planner to use; as ``method_name``."""
    return _usable(PLANNERS, "planner", name or "exact", data, "decides by what it sees in images")


def table() -> list[dict[str, Any]]:
    """All methods as plain values; ``option`` says what of ``compress`` takes the name, ``default`` when it is taken
    without being named."""
    defaults = {
        ("--method", method_name(None, True)): "default",
        ("--method", method_name(None, False)): "default without --data",
        ("--planner", planner_name(None, True)): "default",
    }
    return [
        {
            "option": option,
            "name": name,
            "default": defaults.get((option, name), ""),
            "needs": method.needs,
            "decides": method.decides,
            "minutes": method.minutes,
            "summary": method.summary,
            "source": method.source,
        }
        for option, methods in (("--method", SELECTORS | LEARNERS), ("--planner", PLANNERS))
        for name, method in methods.items()
    ]


def resolution_for(planner: str, given: str | int | None, data: bool) -> str | int | None:
    """What ``--resolution`` comes to with this planner.

    Raises UsageError where they contradict each other, or where nothing is there to weigh resolutions on.
    """
    if PLANNERS[planner].decides == "widths, blocks and resolution":
        if given not in (None, "auto"):
            raise UsageError(f"--planner {planner} decides the resolution itself; leave --resolution {given} out")
        return "auto"
    if given == "auto" and not data:
        raise UsageError("--resolution auto weighs resolutions on images; give --data, or a size such as 160")
    return given


def _usable(table: Mapping[str, Method[Any]], option: str, name: str, data: bool, why: str) -> str:
    if name not in table:
        raise UsageError(f"--{option} {name!r} is not known; known {option}s: {', '.join(table)}")
    if not data and table[name].needs != "nothing":
        other = next(n for n, method in table.items() if method.needs == "nothing")
        raise UsageError(f"--{option} {name} {why}; give --data, or use --{option} {other}")
    return name
