"""Loads the model files named on stdin, one answer of JSON per line: the worker of tools/fuzz_load and of the tests."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from edgeprune.errors import EdgepruneError
from edgeprune.graph.load import load

HERE = Path(__file__).resolve().parent


def attempt(path: str) -> dict[str, object]:
    """Load it in three ways, run what loads. ``s`` is the slowest of the three in seconds."""
    factory = f"{HERE / 'broken.py'}:small_net"
    shape = [(1, 3, 16, 16)]
    answer: dict[str, object] = {"outcome": "loaded", "message": ""}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest = 0.0
    for options in ({}, {"input_shapes": shape}, {"input_shapes": shape, "factory": factory}):
        start = time.monotonic()
        try:
            network = load(path, **options)  # type: ignore[arg-type]
        except EdgepruneError as error:
            message = str(error)
            answer = {"outcome": "refused", "message": message}
            if "\n" in message or not message.startswith(("/", "--")) or len(message) > 1500 or error.exit_code == 1:
                answer["outcome"] = "traceback"
        except BaseException as error:  # what must not happen
            return {"outcome": "traceback", "message": repr(error)[:500], "s": time.monotonic() - start}
        else:
            answer = {"outcome": "loaded", "message": ""}
            try:
                network.module(*network.random_inputs())
            except Exception as error:  # running it is not loading it, but nothing of the file may come alive
                answer["message"] = repr(error)[:200]
        slowest = max(slowest, time.monotonic() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**answer, "s": slowest, "grown_mib": grown // 1024}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(attempt(line.rstrip("\n"))), file=out, flush=True)
