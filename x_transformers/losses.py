"""Losses shared by the training objectives: of single tokens, and means over those that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from x_transformers.errors import ConfigError, TokenRangeError
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, log_probs: bool = False) -> Tensor:
    """Return `-log p(label)` of each label, and 0 where it is `ignore_index`.

    Args:
        logits: `(..., v)`; log-probabilities if `log_probs`.
        labels: `(...)` ids.
        ignore_index: the label that does not count.
        log_probs: the logits are normalized already.

    Returns:
        `(...)`, of the dtype of the logits.

    Raises:
        TokenRangeError: if a label lies outside of the logits. This is checked on a CPU only, since an accelerator
            would have to be waited for.
    """
    fn = F.nll_loss if log_probs else F.cross_entropy
    try:
        each = fn(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    except IndexError as error:  # on a CPU; elsewhere labels are not looked at
        raise TokenRangeError(
            f"targets run up to {int(labels.max())}, but the model returns logits for {logits.shape[-1]} tokens."
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
    """Return `token_losses(head(features), labels)`, with logits for at most `chunk` tokens in memory.

    The logits of a chunk are not saved for the backward pass but computed again, so that the head runs twice.

    Args:
        features: `(..., D)`.
        labels: `(...)` ids.
        head: map from `(chunk, D)` to `(chunk, v)` that treats each row by itself.
        chunk: number of tokens, at least 1.
        ignore_index, log_probs: as in `token_losses`.

    Raises:
        TokenRangeError: as `token_losses`.
    """

    def of(features: Tensor, labels: Tensor) -> Tensor:
        with _autocast_without_cache(features.device.type):
            return token_losses(head(features), labels, ignore_index=ignore_index, log_probs=log_probs)

    pairs = zip(_chunks(features.flatten(0, -2), chunk), _chunks(labels.flatten(), chunk), strict=True)
    # `torch.func` has no hooks for saved tensors, which checkpointing needs
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        each = [checkpoint(of, *pair, use_reentrant=False) for pair in pairs]
    else:
        each = [of(*pair) for pair in pairs]
    return torch.cat(each).reshape(labels.shape)


def _chunks(t: Tensor, most: int) -> Sequence[Tensor]:
    """Split the first axis into parts of at most `most` rows.

    The number of parts is a number of a graph, the length is not: graphs of heads that must be called split it into
    equal parts, a power of two of them, so that few graphs serve all lengths.
    """
    if not torch.compiler.is_compiling():
        return t.split(most)
    length, parts = t.shape[0], 1
    while parts * most < length:
        parts *= 2
    return [t[part * length // parts : (part + 1) * length // parts] for part in range(parts)]


def _autocast_without_cache(device: str) -> AbstractContextManager[Any]:
    """Return the current autocast state without its cache of weights.

    With the cache all chunks would share one rounded copy of the head's weight, whose gradient would be summed over
    chunks in half precision. Without it each chunk rounds the weight again, and gradients are summed in float32.
    """
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def mean_over(each: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of `each (...)`, at least in float32, over the places where `counts (...)` is True.

    It is 0, attached to the graph, if no place counts. The other places may contain anything, even NaN.
    """
    kept = at_least_float32(each).masked_fill(~counts, 0.0)
    return kept.sum() / counts.sum().clamp(min=1)


def reaching(loss: Tensor, *parts: nn.Module | nn.Parameter | None) -> Tensor:
    """Return the loss, whose gradients for some parameters are zero instead of missing.

    DistributedDataParallel waits for a gradient of every parameter, in each step and in each process. A part that a
    loss leaves out, always or by chance, would stop it.

    Args:
        loss: scalar, or anything that it depends on.
        parts: modules and parameters that it may not depend on.
    """
    if not (torch.is_grad_enabled() and loss.requires_grad):
        return loss
    for part in parts:
        for parameter in part.parameters() if isinstance(part, nn.Module) else (part,):
            # shards (DTensor) are left out: `fully_shard` waits for nothing, and mixing them with tensors is an error
            if type(parameter) is nn.Parameter and parameter.requires_grad:
                # a sum of no numbers, which is zero even if the parameter is not finite
                loss = loss + parameter.flatten()[:0].sum().to(loss.dtype)
    return loss


def run_with_aux_loss(net: nn.Module, *arguments: Any, **keywords: Any) -> tuple[Any, Tensor | None]:
    """Run one pass of a training loss, and return its output and the auxiliary loss, which the loss has to contain.

    Every objective runs its models through this function, which also leaves the statistics of norms for
    `advance_norms`. In evaluation there is no auxiliary loss, so that losses of
    models with and without experts can be compared.

    Args:
        net: a model or a stack, perhaps inside of what PyTorch puts around it. A module of the caller's has no
            auxiliary loss.
        arguments: of the pass.
        keywords: of the pass.

    Returns:
        What the pass returns, and a scalar, or None if there is nothing to add; see `plus_aux_loss`.
    """
    model = unwrapped(net)
    has_loss, has_norms = (model.training and getattr(model, name, False) for name in _NEEDS_RECORD)
    if not (has_loss or has_norms):
        return net(*arguments, **keywords), None
    out, record = net(*arguments, return_aux_loss=True, **keywords)
    if any(keywords.get(name) for name in _WITH_RECORD):
        out = (out, record)
    elif keywords.get("return_mems"):
        out = (out, record.mems)
    if has_norms:
        model.note_norms(record)  # type: ignore[operator]
    return out, record.aux_loss if has_loss else None


_NEEDS_RECORD = "has_aux_loss", "has_batch_norms"
"""Properties of models whose record a training loss needs."""

_WITH_RECORD = (
    "return_intermediates",
    "return_embeddings_and_intermediates",
    "return_attn_z_loss",
    "return_logit_entropies",
    "return_hiddens",
)
"""Arguments with which a pass returns its record anyway."""


def plus_aux_loss(loss: Any, *parts: Tensor | None) -> Any:
    """Return a loss plus the auxiliary losses of its passes, of different models; see `run_with_aux_loss`.

    Args:
        loss: a tensor, or a tuple that begins with it.
        parts: scalars, or None.
    """
    if isinstance(loss, tuple):
        return plus_aux_loss(loss[0], *parts), *loss[1:]
    for part in parts:
        if part is not None:
            loss = loss + part
    return loss


def mean_aux_loss(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the mean of the auxiliary losses of several passes of one model, or None if it has none."""
    given = [part for part in parts if part is not None]
    return torch.stack(given).mean() if given else None


def next_token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probabilities `(...)` of labels under `logits (..., v)`, at least in float32."""
    return at_least_float32(logits).log_softmax(dim=-1).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)


def normal_divergence(mean: Tensor, log_variance: Tensor, floor: float = 0.0) -> Tensor:
    """Return the divergence of normal distributions from the standard one (1312.6114), at least in float32.

        sum over dimensions of max((exp(v) + mu^2 - v - 1) / 2 - floor, 0)

    Args:
        mean: mu, `(..., z)`.
        log_variance: v, `(..., z)`, logarithms of variances.
        floor: divergence of each dimension that costs nothing.

    Returns:
        `(...)`.
    """
    mean, log_variance = at_least_float32(mean), at_least_float32(log_variance)
    each = (log_variance.exp() + mean.square() - log_variance - 1) / 2
    return (each - floor).relu().sum(dim=-1)


def sigreg_loss(
    x: Tensor,
    num_slices: int = 1024,
    domain: tuple[float, float] = (-5, 5),
    num_knots: int = 17,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """Return how far features are from a standard normal distribution, by random projections (2511.08544).

    With the empirical characteristic function `psi(t) = mean over x of exp(i t <x, u>)` of a random direction u, and
    `phi(t) = exp(-t^2 / 2)`, that of the normal distribution:

        mean over u of integral of |psi(t) - phi(t)|^2 phi(t) dt

    Args:
        x: `(..., d)` features.
        num_slices: number of directions.
        domain: ends of the integral.
        num_knots: number of points t of its trapezoid rule, at least 2.
        valid: `(...)` bool, the features that count; default all. Without any the loss is 0.

    Returns:
        A scalar, at least in float32.

    Raises:
        ConfigError: if the numbers describe no integral.
    """
    if num_slices < 1 or num_knots < 2 or domain[0] >= domain[1]:
        raise ConfigError(
            f"`num_slices` is {num_slices}, `num_knots` {num_knots} and `domain` {tuple(domain)}; there must be at "
            "least 1 direction and 2 points, from a lower to a higher number."
        )
    x = at_least_float32(x).flatten(0, -2)
    counts = x.new_ones(len(x)) if valid is None else valid.flatten().to(x.dtype)
    x = x.masked_fill(counts.unsqueeze(-1) == 0, 0.0)
    directions = F.normalize(torch.randn(num_slices, x.shape[-1], device=x.device, dtype=x.dtype), dim=-1)
    knots = torch.linspace(*domain, num_knots, device=x.device, dtype=x.dtype)
    # autocast would round the angles
    with torch.autocast(x.device.type, enabled=False):
        angles = (x @ directions.T).unsqueeze(-1) * knots
        shares = counts / counts.sum().clamp(min=1)
        real, imaginary = (torch.einsum("n, n s k -> s k", shares, part) for part in (angles.cos(), angles.sin()))
    phi = (-knots.square() / 2).exp()
    excess = ((real - phi).square() + imaginary.square()) * phi
    return torch.trapezoid(excess, knots, dim=-1).mean() * (counts.sum() > 0)


def ahead(t: Tensor, rollouts: int) -> Tensor:
    """Return what comes after each position but the last: `out[r, :, i] = t[:, i + 1 + r]`, zeros beyond the end.

    Args:
        t: `(b, n, ...)`.
        rollouts: number R of later positions.

    Returns:
        `(R, b, n - 1, ...)`.
    """
    n = t.shape[1]
    padded = torch.cat((t, torch.zeros_like(t[:, :1]).expand(-1, rollouts, *t.shape[2:])), dim=1)
    return torch.stack([padded[:, 1 + r : n + r] for r in range(rollouts)])
