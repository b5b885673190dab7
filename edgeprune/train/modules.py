"""What training does to a module: where it lies, its optimiser, its mode, and how a run is told from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from edgeprune.errors import DataError
from edgeprune.graph.network import BATCH_NORMS
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet


def place(module: nn.Module, device: torch.device, memory_format: torch.memory_format) -> None:
    """Move a module, its 4-d weights to a memory format, and the devices baked into the calls of its graph."""
    module.to(device=device)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
    graph = getattr(module, "graph", None)
    changed = False
    for node in graph.nodes if graph is not None else ():
        if node.kwargs.get("device") is not None and torch.device(node.kwargs["device"]) != device:
            node.kwargs = {**node.kwargs, "device": device}
            changed = True
    if changed:
        module.recompile()  # type: ignore[operator]


def optimizer_for(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Nesterov SGD; what multiplies activations decays, what shifts or scales them (norms, biases) does not."""
    parameters = [p.requires_grad_(True) for p in module.parameters() if p.is_floating_point()]
    return torch.optim.SGD(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
    )


def training_mode(module: nn.Module, batch_norm: str) -> None:
    """Everything trains, but "frozen" batch norms keep their running statistics."""
    module.train()
    if batch_norm == "frozen":
        for child in module.modules():
            if isinstance(child, BATCH_NORMS):
                child.eval()


def identity_of(
    student: nn.Module, teacher: nn.Module | None, data: DataSet, config: TrainConfig, hooks: str = ""
) -> str:
    """Of a run: a checkpoint with another one is not gone on with. The student counts by its shapes (its weights are
    in the checkpoint), the original by its weights. hooks: all that decides what they do."""
    digest = hashlib.sha256(f"{config.digest()}{hooks}".encode())
    for name, tensor in student.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
    for name, tensor in teacher.state_dict().items() if teacher is not None else ():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(f"{len(data)} {data.input_shape} {data.labelled} {data.normalisation}".encode())
    return digest.hexdigest()[:32]


def check_finite(x: torch.Tensor, data: DataSet) -> None:
    """Raise DataError on NaN or infinity among the samples."""
    if not torch.isfinite(x).all():
        raise DataError(f"{data.name}: samples hold numbers that are not finite (NaN or infinity)")
