"""A network at another height and width: the same weights, other sizes of its maps.

Where the graph takes its sizes from its input it simply runs there. Where sizes are baked in it mostly fails, and is
refused with what failed; a baked ``view`` may also mix samples without a word, so samples are run together and alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.batch import samples_are_independent
from edgeprune.graph.network import Network, shapes

Size = tuple[int, int]  # height, width
SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)


def size_of(network: Network) -> Size:
    """Height and width of the input. Raises UnsupportedModelError unless the one input is (N, C, H, W)."""
    if len(network.input_shapes) != 1 or len(network.input_shapes[0]) != 4:
        shown = ", ".join("x".join(map(str, s)) for s in network.input_shapes)
        raise UnsupportedModelError(
            f"{network.origin}: only a network of one input of 4 dimensions has a resolution to change, this one takes "
            f"{shown}; leave --resolution out"
        )
    return network.input_shapes[0][2], network.input_shapes[0][3]


def at_resolution(network: Network, size: Size) -> Network:
    """``network`` for inputs of another height and width; it shares the module.

    Raises UnsupportedModelError where the graph has sizes baked in, or its outputs change their shape with the input's.
    """
    if size == size_of(network):
        return network
    new = Network(network.module, ((1, network.input_shapes[0][1], *size),), network.origin)
    wanted = output_shapes(network, 2)
    try:
        one, two = output_shapes(new, 1), output_shapes(new, 2)
        if one != [(1, *s[1:]) for s in two] or not samples_are_independent(new):
            raise _refused(network, size, "samples of a batch would be mixed")
    except UnsupportedModelError:
        raise
    except Exception as error:  # sizes that do not fit raise whatever the operator at hand raises
        raise _refused(network, size, " ".join(str(error).split())[:160]) from error
    if two != wanted:
        raise UnsupportedModelError(
            f"{network.origin}: at {size[0]}x{size[1]} its output becomes {_text(two)} instead of {_text(wanted)}, so "
            "there is nothing to compare it with; only networks whose outputs keep their shape can change resolution: "
            "leave --resolution out"
        )
    return new


def output_shapes(network: Network, batch: int) -> list[tuple[int, ...]]:
    known = shapes(network, batch)
    output = next(n for n in network.module.graph.nodes if n.op == "output")
    return [known[n.name] for n in output.all_input_nodes if n.name in known]


def resolutions(network: Network, shares: Sequence[float] = SHARES) -> list[Size]:
    """Smaller sizes worth trying, the largest first: multiples of the network's stride, so that its maps divide evenly,
    next to these shares of its own size. Raises UnsupportedModelError where the graph allows none of them."""
    height, width = size_of(network)
    stride = stride_of(network)
    near = [(_multiple(height * share, stride), _multiple(width * share, stride)) for share in shares]
    found: list[Size] = []
    refused: UnsupportedModelError | None = None
    for size in dict.fromkeys(s for s in near if s[0] < height and s[1] < width):
        try:
            found.append(size_of(at_resolution(network, size)))
        except UnsupportedModelError as error:
            refused = refused or error
    if not found and refused is not None:
        raise refused
    return found


def _multiple(side: float, stride: int) -> int:
    return max(1, math.floor(side / stride + 0.5)) * stride


def stride_of(network: Network) -> int:
    """How many input pixels lie between two pixels of the smallest map, maps of one pixel aside; a power of two."""
    height, width = size_of(network)
    sides = [s[2:] for s in shapes(network).values() if len(s) == 4 and min(s[2:]) > 1]
    coarsest = max((min(height / h, width / w) for h, w in sides), default=1.0)
    return 2 ** max(0, round(math.log2(coarsest)))


def _refused(network: Network, size: Size, reason: str) -> UnsupportedModelError:
    own = size_of(network)
    return UnsupportedModelError(
        f"{network.origin}: cannot run at {size[0]}x{size[1]}, since sizes of its {own[0]}x{own[1]} input are baked in "
        f"({reason}); export it with height and width dynamic, or leave --resolution out"
    )


def _text(found: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, s[1:])) for s in found)
