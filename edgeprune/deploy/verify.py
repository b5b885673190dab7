"""The exported file computes what the network computes, or an error says by how much it does not.

Exporters have shipped wrong networks without a word, and runtimes have optimised right files into wrong ones; so the
bytes that ship are run in onnxruntime with all its optimisations on, next to torch, one sample at a time.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from edgeprune.errors import VerificationError
from edgeprune.graph.network import Network

RANDOM_CASES = 8
MAX_GIVEN = 32  # samples taken from the inputs that the caller gives


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared and how far it was off.

    error:      largest absolute error of any output in any case, over that output's largest absolute value in all
                cases; for outputs of integers or booleans the share that differs (dimensionless)
    mean_error: the same with the mean absolute error
    cases:      samples that were run; ``given`` of them came from the caller, the rest are standard normal
    agreement:  share of cases in which the largest element of every output is at the same place
    runtime:    e.g. "onnxruntime 1.31.1"
    """

    error: float
    mean_error: float
    tolerance: float
    cases: int
    given: int
    agreement: float
    runtime: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    model: bytes | onnx.ModelProto,
    network: Network,
    inputs: Iterable[torch.Tensor | Sequence[torch.Tensor]] = (),
    tolerance: float = 1e-4,
) -> Verification:
    """Run the file on 8 random samples and on those given, and compare with ``network`` in float32.

    inputs: batches of any size, each a tensor (N, ...) or one tensor per input of the network; the first 32 samples
            are used.

    Raises VerificationError when the file is not valid ONNX, does not load, has other inputs or outputs than the
    network, gives infinities or NaN, or is off by more than ``tolerance``.
    """
    data = model if isinstance(model, bytes) else model.SerializeToString()
    _check(data)
    session = _session(data)
    _check_inputs(session, network)
    random = [network.random_inputs(seed=seed) for seed in range(RANDOM_CASES)]
    given = _samples(inputs, network)
    expected, actual = [], []
    for case in (*random, *given):
        expected.append(_torch_outputs(network, case))
        actual.append(_file_outputs(session, case))
    wanted, got = _columns(expected), _columns(actual, len(expected[0]))
    errors = [_compared(want, have) for want, have in zip(wanted, got, strict=True)]
    largest = [e[0] for e in errors]
    result = Verification(
        error=max(largest),
        mean_error=max(e[1] for e in errors),
        tolerance=tolerance,
        cases=len(expected),
        given=len(given),
        agreement=float(np.mean([_same_place(*pair) for pair in zip(expected, actual, strict=True)])),
        runtime=f"onnxruntime {importlib.metadata.version('onnxruntime')}",
    )
    if not result.error <= tolerance:
        name = session.get_outputs()[largest.index(result.error)].name
        raise VerificationError(
            f"the exported file's output {name} differs from torch by {result.error:.3g} of its largest value, "
            f"expected at most {tolerance:g}; nothing was written. Please report this network: {network.origin}"
        )
    return result


def _check(data: bytes) -> None:
    try:
        onnx.checker.check_model(data, full_check=True)
    except Exception as error:  # the checker raises several kinds
        raise VerificationError(f"the exported file is not valid ONNX: {_first_line(error)}") from None


def _session(data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise VerificationError(f"onnxruntime refuses the exported file: {_first_line(error)}") from None


def _check_inputs(session: ort.InferenceSession, network: Network) -> None:
    shapes = [tuple(i.shape) for i in session.get_inputs()]
    wanted = [tuple(s) for s in network.input_shapes]
    if shapes != wanted:
        raise VerificationError(f"the exported file takes inputs of shape {shapes}, the network {wanted}")


def _samples(
    inputs: Iterable[torch.Tensor | Sequence[torch.Tensor]], network: Network
) -> list[tuple[torch.Tensor, ...]]:
    samples: list[tuple[torch.Tensor, ...]] = []
    for batch in inputs:
        tensors = (batch,) if isinstance(batch, torch.Tensor) else tuple(batch)
        for i in range(len(tensors[0])):
            if len(samples) == MAX_GIVEN:
                return samples
            sample = tuple(t[i : i + 1].detach().to("cpu", torch.float32).contiguous() for t in tensors)
            if [tuple(t.shape) for t in sample] == [tuple(s) for s in network.input_shapes]:
                samples.append(sample)
    return samples


def _torch_outputs(network: Network, case: Sequence[torch.Tensor]) -> list[np.ndarray]:
    module = network.module
    training = module.training
    place = next((p.device for p in module.parameters()), torch.device("cpu"))
    module.eval()
    try:
        with torch.no_grad():
            result = module(*(x.to(place) for x in case))
    finally:
        module.train(training)
    return [y.cpu().numpy() for y in (result if isinstance(result, (tuple, list)) else (result,))]


def _file_outputs(session: ort.InferenceSession, case: Sequence[torch.Tensor]) -> list[np.ndarray]:
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), case, strict=True)}
    try:
        return [np.asarray(y) for y in session.run(None, feed)]
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise VerificationError(f"onnxruntime cannot run the exported file: {_first_line(error)}") from None


def _columns(cases: Sequence[Sequence[np.ndarray]], count: int | None = None) -> list[list[np.ndarray]]:
    """Outputs by their place."""
    if count is not None and len(cases[0]) != count:
        raise VerificationError(f"the exported file has {len(cases[0])} outputs, the network {count}")
    return [list(column) for column in zip(*cases, strict=True)]


def _compared(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> tuple[float, float]:
    """(largest, mean) error of one output over all cases."""
    for want, have in zip(expected, actual, strict=True):
        if want.shape != have.shape:
            raise VerificationError(
                f"an output of the exported file has shape {have.shape}, the network's {want.shape}"
            )
    want, have = np.stack(expected), np.stack(actual)
    if not np.issubdtype(want.dtype, np.floating):
        differing = float(np.mean(want != have))
        return differing, differing
    for who, values in (("network", want), ("exported file", have)):
        if not np.isfinite(values).all():
            raise VerificationError(f"the {who} gives infinities or NaN on standard normal or given inputs")
    gap = np.abs(want.astype(np.float64) - have)
    scale = float(np.abs(want).max(initial=0)) or 1.0
    return float(gap.max(initial=0)) / scale, float(gap.mean()) / scale if gap.size else 0.0


def _same_place(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> bool:
    pairs = [(e, a) for e, a in zip(expected, actual, strict=True) if e.size]
    return all(int(e.argmax()) == int(a.argmax()) for e, a in pairs)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
