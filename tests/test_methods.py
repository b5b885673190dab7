import pathlib
import re

import pytest

import edgeprune
from edgeprune.errors import UsageError
from edgeprune.methods import DATA_FREE, LEARNERS, PLANNERS, SELECTORS, method_name, planner_name

TABLES = {"--method": SELECTORS | LEARNERS, "--planner": PLANNERS}
PAGE = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "methods.md").read_text()


def test_the_default_depends_on_the_data():
    assert method_name(None, data=True) == "cap"
    assert method_name(None, data=False) == DATA_FREE[0]


def test_a_method_that_needs_images_says_so():
    assert method_name("cap", data=True) == "cap"
    with pytest.raises(UsageError, match="--method cap chooses by what it sees in images; give --data, or use "):
        method_name("cap", data=False)


@pytest.mark.parametrize("name", DATA_FREE)
def test_data_free_methods_go_without(name):
    assert method_name(name, data=False) == name


def test_what_trains_says_so():
    with pytest.raises(UsageError, match="--method aofp trains while it chooses; give --data"):
        method_name("aofp", data=False)


def test_the_list_marks_the_defaults():
    marked = {(m["option"], m["name"]): m["default"] for m in edgeprune.list_methods() if m["default"]}
    assert marked == {
        ("--method", "cap"): "default",
        ("--method", DATA_FREE[0]): "default without --data",
        ("--planner", "exact"): "default",
    }


def test_unknown_method():
    with pytest.raises(UsageError, match=f"known methods: {', '.join(SELECTORS)}"):
        method_name("luck", data=True)


def test_planners_are_checked_in_the_same_way():
    assert planner_name(None, data=False) == planner_name("exact", data=False) == "exact"
    assert planner_name("hbgts", data=True) == "hbgts"
    with pytest.raises(
        UsageError, match="--planner hbgts decides by what it sees in images; give --data, or use --planner e"
    ):
        planner_name("hbgts", data=False)
    with pytest.raises(UsageError, match=f"known planners: {', '.join(PLANNERS)}"):
        planner_name("luck", data=True)


def test_the_list_is_all_there_is():
    found = edgeprune.list_methods()
    assert [(m["option"], m["name"]) for m in found] == [(o, n) for o, table in TABLES.items() for n in table]
    assert {m["needs"] for m in found} <= {"nothing", "unlabelled data", "training"}
    for method in found:
        assert 0 < method["minutes"] < 600
        assert method["source"]
        assert len(method["summary"]) < 80
        assert "\n" not in method["summary"]


@pytest.mark.parametrize(("option", "name"), [(o, n) for o, table in TABLES.items() for n in table])
def test_every_method_has_a_section(option, name):
    heading = f"{name} (planner)" if option == "--planner" and name in SELECTORS else name
    section = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    assert section, heading
    for part in ("*Idea.*", "*Source.*", "*Use it*", "*Costs*"):
        assert part in section[1], f"{heading}: {part}"
