"""From the settings of a run to its model and optimizers."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.training.optimizers import Muon, split_parameters
from x_transformers.training.presets import build_model
from x_transformers.training.settings import Settings


def model_of(settings: Settings, vocabulary: int) -> AutoregressiveWrapper:
    """Build the model of a run, with weights that depend on its seed.

    Args:
        settings: of the run.
        vocabulary: number of tokens.
    """
    torch.manual_seed(settings.seed)
    options = dict(settings.set)
    if settings.recompute:
        options["checkpoint_every"] = settings.recompute
    chunk = settings.loss_chunk or None
    return build_model(settings.preset, vocabulary, settings.of_preset("context"), options, loss_chunk_size=chunk)


def optimizers_of(settings: Settings, model: nn.Module) -> dict[str, Optimizer]:
    """Build Muon for the matrices of the layers and AdamW for the rest, or AdamW for everything.

    Each group has its peak learning rate as `peak_lr`.

    Args:
        settings: of the run.
        model: after sharding.
    """
    split = split_parameters(model)
    lr, decay = settings.of_preset("lr"), settings.weight_decay
    # single numbers are not sharded, and fused optimizers cannot mix them with parameters that are
    fused = all(parameter.ndim > 0 for parameter in model.parameters())
    if settings.optimizer == "adamw":
        tables = [parameter for parameter in split.others if parameter.ndim > 1]
        rest = [parameter for parameter in split.others if parameter.ndim <= 1]
        groups = [
            {"params": [*split.matrices, *split.embeddings, *tables], "lr": lr, "weight_decay": decay},
            {"params": rest, "lr": lr, "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=fused)
        found: dict[str, Optimizer] = {"adamw": adamw}
    else:
        groups = [
            {"params": split.embeddings, "lr": settings.of_preset("embedding_lr")},
            {"params": split.others, "lr": lr},
        ]
        groups = [group for group in groups if group["params"]]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=fused)
        # in float32, the steps do not depend on the number of processes
        dtype = torch.bfloat16 if settings.device.startswith("cuda") else torch.float32
        muon = Muon(
            split.matrices,
            lr=settings.of_preset("muon_lr"),
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
            ns_dtype=dtype,
        )
        found = {"adamw": adamw, "muon": muon}
    for optimizer in found.values():
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return found
