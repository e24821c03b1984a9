"""What training objectives share: losses of single tokens, and means over those that count."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from x_transformers.errors import TokenRangeError
from x_transformers.ops import at_least_float32


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, log_probs: bool = False) -> Tensor:
    """`-log p(label)` of each label, 0 where it is `ignore_index`; of the logits' dtype.

    Args:
        logits: `(..., v)`; log-probabilities if `log_probs`.
        labels: `(...)` ids.
        ignore_index: the label that does not count.
        log_probs: the logits are normalised already.

    Raises:
        TokenRangeError: if a label lies outside of the logits, where that can be seen without waiting for a device.
    """
    fn = F.nll_loss if log_probs else F.cross_entropy
    try:
        each = fn(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    except IndexError as error:  # on a CPU; elsewhere labels are not looked at
        raise TokenRangeError(
            f"targets run up to {int(labels.max())}, but the model gives logits for {logits.shape[-1]} tokens."
        ) from error
    return each.reshape(labels.shape)


def chunked_token_losses(
    features: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    chunk: int,
    *,
    ignore_index: int = -100,
    log_probs: bool = False,
) -> Tensor:
    """`token_losses(head(features), labels)`, without the logits of more than `chunk` tokens at any time.

    The logits of a chunk are not kept for the gradients but computed again, so that the head runs twice in training.

    Args:
        features: `(..., D)`.
        labels: `(...)` ids.
        head: `(chunk, D)` to `(chunk, v)`, each row from its own alone.
        chunk: tokens, at least 1.
        ignore_index, log_probs: as in `token_losses`.

    Raises:
        TokenRangeError: as `token_losses`.
    """

    def of(features: Tensor, labels: Tensor) -> Tensor:
        with _casting_anew(features.device.type):
            return token_losses(head(features), labels, ignore_index=ignore_index, log_probs=log_probs)

    pairs = zip(features.flatten(0, -2).split(chunk), labels.flatten().split(chunk), strict=True)
    if torch.is_grad_enabled():
        each = [checkpoint(of, *pair, use_reentrant=False) for pair in pairs]
    else:
        each = [of(*pair) for pair in pairs]
    return torch.cat(each).reshape(labels.shape)


def _casting_anew(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is, but without its memory of weights: the one rounded copy that chunks would share would also
    add up their gradients, in half precision.
    """
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def mean_over(each: Tensor, counts: Tensor) -> Tensor:
    """The mean of `each (...)`, at least in float32, over the places where `counts (...)`; 0 with a gradient if none.

    Places that do not count may hold anything, NaN too.
    """
    kept = at_least_float32(each).masked_fill(~counts, 0.0)
    return kept.sum() / counts.sum().clamp(min=1)


def next_token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """`(...)` log-probability of each label under `logits (..., v)`, at least in float32."""
    return at_least_float32(logits).log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
