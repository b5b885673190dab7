import pytest

from edgeprune.errors import UsageError
from edgeprune.methods import DATA_FREE, SELECTORS, selector_name


def test_the_default_depends_on_the_data():
    assert selector_name(None, data=True) == "cap"
    assert selector_name(None, data=False) == DATA_FREE[0]


def test_a_method_that_needs_images_says_so():
    assert selector_name("cap", data=True) == "cap"
    with pytest.raises(UsageError, match="--method cap chooses by what it sees in images; give --data, or use "):
        selector_name("cap", data=False)


@pytest.mark.parametrize("name", DATA_FREE)
def test_data_free_methods_go_without(name):
    assert selector_name(name, data=False) == name


def test_unknown_method():
    with pytest.raises(UsageError, match=f"known methods: {', '.join(SELECTORS)}"):
        selector_name("luck", data=True)
