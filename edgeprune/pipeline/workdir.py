"""What a compress run leaves for the next call of the same command: the shrunk network, and training checkpoints.

Every file carries the key of the run: a digest of the network, the data and the options that decide the result. A file
with another key is of another run and is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import EdgepruneError
from edgeprune.graph.network import Network
from edgeprune.pipeline.apply import apply_recipe
from edgeprune.pipeline.scaling import Scaling
from edgeprune.pipeline.shrink import Shrunk
from edgeprune.plan.problem import Recipe
from edgeprune.train.config import History

VERSION = 3
NAME = "shrunk.pt"
SCALING = "scaling.json"
BLOCKS = "blocks.json"


def digest(network: Network, options: dict[str, Any], samples: Iterable[torch.Tensor]) -> str:
    """Key of a run, 16 hexadecimal digits."""
    state = hashlib.sha256(json.dumps({"version": VERSION, **options}, sort_keys=True).encode())
    leaves = "".join(f"{n} {m};" for n, m in network.module.named_modules() if n and not any(m.children()))
    state.update(f"{network.input_shapes} {network.module.graph} {leaves}".encode())
    for tensor in (*network.module.state_dict().values(), *samples):
        state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def store(folder: Path, key: str, shrunk: Shrunk) -> None:
    """Keep a shrunk network; after a crash the folder holds the old state or the new one."""
    state = {
        "key": key,
        "recipe": shrunk.recipe.to_json(),
        "predicted_share": shrunk.predicted_share,
        "measured_ms": shrunk.measured_ms,
        "rounds": shrunk.rounds,
        "learning": None if shrunk.learning is None else shrunk.learning.to_dict(),
        "notes": list(shrunk.notes),
        "weights": shrunk.network.module.state_dict(),
    }
    part = folder / "shrunk.pt.part"
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / NAME)


def recall(folder: Path, key: str, original: Network) -> Shrunk | None:
    """The shrunk network of the run with this key, or None."""
    try:
        state = torch.load(folder / NAME, weights_only=True)
        if state["key"] != key:
            return None
        recipe = Recipe.from_json(state["recipe"])
        network = apply_recipe(original, recipe)
        _add_biases(network, state["weights"])
        network.module.load_state_dict(state["weights"])
        learning = None if state["learning"] is None else History(**state["learning"])
        notes = tuple(state.get("notes", ()))
        told = state["predicted_share"], state["measured_ms"], state["rounds"]
        return Shrunk(recipe, network, *told, (), learning, notes)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError, EdgepruneError):
        return None  # whatever is wrong with a kept file, the run can be done again


def store_scaling(folder: Path, key: str, scaling: Scaling) -> None:
    _write(folder / SCALING, {"key": key, "size": scaling.size, "document": scaling.document})


def recall_scaling(folder: Path, key: str) -> Scaling | None:
    """How the resolution of the run with this key was decided, or None."""
    try:
        state = json.loads((folder / SCALING).read_text())
        height, width = state["size"]
        return Scaling((int(height), int(width)), state["document"]) if state["key"] == key else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def store_blocks(folder: Path, key: str, removed: Iterable[str]) -> None:
    _write(folder / BLOCKS, {"key": key, "removed": list(removed)})


def recall_blocks(folder: Path, key: str) -> tuple[str, ...] | None:
    """The blocks taken out before the search of the run with this key, or None."""
    try:
        state = json.loads((folder / BLOCKS).read_text())
        return tuple(str(name) for name in state["removed"]) if state["key"] == key else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _write(file: Path, document: dict[str, Any]) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(document))
    os.replace(part, file)


def forget(folder: Path) -> None:
    """Shrink anew next time."""
    for name in (NAME, SCALING, BLOCKS):
        (folder / name).unlink(missing_ok=True)


def _add_biases(network: Network, weights: dict[str, torch.Tensor]) -> None:
    """Refitting gives a bias to layers that had none."""
    for name in weights.keys() - network.module.state_dict().keys():
        path, _, leaf = name.rpartition(".")
        if leaf == "bias":
            network.module.get_submodule(path).bias = torch.nn.Parameter(weights[name].clone())
