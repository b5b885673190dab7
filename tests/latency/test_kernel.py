import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import TableError
from edgeprune.latency.kernel import Kernel, parse_shape, shape_text

shapes = st.lists(st.integers(1, 4096), max_size=5).map(tuple)
kernels = st.builds(
    Kernel,
    op=st.sampled_from(["Conv", "Gemm", "com.microsoft::QuickGelu"]),
    attrs=st.dictionaries(st.text("abc_", min_size=1), st.text(min_size=1), max_size=4).map(
        lambda d: tuple(sorted(d.items()))
    ),
    inputs=st.lists(shapes, max_size=3).map(tuple),
    output=shapes,
    tail=st.lists(st.sampled_from(["Add", "Relu"]), max_size=2).map(tuple),
)


@given(kernels)
def test_key_and_back(kernel):
    text = kernel.key()
    assert "\n" not in text
    assert Kernel.from_key(text) == kernel


@given(kernels, kernels)
def test_keys_tell_kernels_apart(a, b):
    assert (a.key() == b.key()) == (a == b)


@given(shapes)
def test_shape_text_and_back(shape):
    assert parse_shape(shape_text(shape)) == shape


@pytest.mark.parametrize("text", ["", "Conv", "Conv{} 1x > 1x2 f32 more", "Conv{a=1} 1x2", "{} 1 > 1 f32"])
def test_not_a_key(text):
    with pytest.raises(TableError, match="not a kernel key"):
        Kernel.from_key(text)


def test_with_attrs_sets_and_removes():
    kernel = Kernel("Conv", (("group", "1"), ("io", "p>b")), ((1, 3, 4, 4),), (1, 8, 4, 4))
    assert kernel.with_attrs(io="", group="dw").attrs == (("group", "dw"),)
    assert kernel.attr("io") == "p>b"
    assert kernel.attr("nothing", "x") == "x"
