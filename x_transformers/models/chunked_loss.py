"""Loss of a model for a few tokens at a time, so that the logits of a large vocabulary are never in memory together.

In eager mode each chunk is a call of the head, which activation checkpointing runs again (`chunked_token_losses`). A
graph would contain every chunk, and so serve one number of chunks only. There, a head that is a linear map becomes one
operator, which contains the loop and has its own backward pass: two graphs serve all lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.losses import chunked_token_losses, token_losses
from x_transformers.models.embeddings import table_of
from x_transformers.models.heads import BiasedLinear, LinearNoBias, TiedLogits, sigsoftmax
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.inference import unobserved
from x_transformers.ops import at_least_float32


class LinearHead(NamedTuple):
    """A map from features to logits that depends on nothing but these: `features @ weight^T * scale + bias`.

    Attributes:
        weight: `(v, D)`.
        bias: `(v,)`, or None.
        scale: factor, only without a bias.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float


def chunked_losses(
    model: TransformerWrapper,
    features: Tensor,
    labels: Tensor,
    chunk: int,
    *,
    ignore_index: int,
    arguments: Mapping[str, Any] | None,
) -> Tensor:
    """Return `-log p(label)` of each label, and 0 where it is `ignore_index`, with logits of `chunk` tokens in memory.

    Args:
        model: has the head.
        features: `(..., D)` of the model.
        labels: `(...)` ids.
        chunk: number of tokens, at least 1.
        ignore_index: the label that does not count.
        arguments: of the head; see `to_logits_kwargs`.

    Returns:
        `(...)`.

    Raises:
        TokenRangeError: as `token_losses`.
        InputError: as `TransformerWrapper.logits_of`.
    """
    linear = linear_head(model) if torch.compiler.is_compiling() and not arguments else None
    if linear is None:
        head = functools.partial(model.logits_of, arguments=arguments)
        normalized = model.output_is_log_prob
        return chunked_token_losses(features, labels, head, chunk, ignore_index=ignore_index, log_probs=normalized)
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    of_rows = functools.partial(_losses_of_rows, linear, model.sigsoftmax_logits, ignore_index, dtype)
    mixture = model.mixture
    if mixture is None:
        return of_rows(chunk, features.flatten(0, -2), labels.flatten()).reshape(labels.shape)
    # A mixture only needs the probability of the label under each softmax, which is a row of its own:
    # -log sum_j w_j p_j(label) = -logsumexp_j (log w_j - loss_j)
    each, k = mixture.to_mixture(features).unflatten(-1, (mixture.k, -1)), mixture.k
    losses = of_rows(chunk * k, each.flatten(0, -2), labels.flatten().repeat_interleave(k))
    shares = at_least_float32(mixture.combine_mixture(features)).log_softmax(dim=-1)
    mixed = -(shares - losses.reshape(shares.shape)).logsumexp(dim=-1)
    return mixed.masked_fill(labels == ignore_index, 0.0)


def linear_head(model: TransformerWrapper) -> LinearHead | None:
    """Return the weights of a head that may be applied without calling its module, else None.

    Modules with hooks, adapters or quantized weights must be called, and shards are no tensors that an operator reads.
    """
    head = model.to_logits
    if head is None or model.squeeze_out_last_dim or not unobserved(head):
        return None
    if model.logit_changes is not None and not model.logit_changes.keeps_linear:
        return None
    found = None
    if type(head) is TiedLogits and (head.bias is None or head.scale == 1):
        found = LinearHead(table_of(model.token_emb), head.bias, head.scale)
    elif type(head) is LinearNoBias or type(head) is BiasedLinear or type(head) is nn.Linear:
        found = LinearHead(head.weight, head.bias, 1.0)
    return found if found is not None and type(found.weight) is nn.Parameter else None


def _losses_of_rows(
    head: LinearHead,
    sigmoid: bool,
    ignore_index: int,
    dtype: torch.dtype | None,
    chunk: int,
    features: Tensor,
    labels: Tensor,
) -> Tensor:
    return linear_losses(features, labels, *head, sigmoid, ignore_index, chunk, dtype)


_HEAD = "Tensor weight, Tensor? bias, float scale, bool sigmoid, int ignore_index, int chunk, ScalarType? dtype"


@torch.library.custom_op(
    "x_transformers::linear_losses", mutates_args=(), schema=f"(Tensor features, Tensor labels, {_HEAD}) -> Tensor"
)
def linear_losses(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    sigmoid: bool,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """Compute `-log p(label)` of each row under the softmax of a linear map, `chunk` rows at a time.

    It is one operation that a compiler does not look into, differentiable once.

    Args:
        features: `(N, D)`.
        labels: `(N,)` ids; the loss is 0 where they are `ignore_index`.
        weight, bias, scale: see `LinearHead`.
        sigmoid: add `log sigmoid(logits)` to the logits (`sigsoftmax`).
        ignore_index: the label that does not count.
        chunk: number of rows.
        dtype: of the linear map, which autocast chooses; None for that of its inputs.

    Returns:
        `(N,)`, at least in float32.

    Raises:
        TokenRangeError: as `token_losses`.
    """
    losses = _rows_of_losses(features, labels.shape, dtype)
    with torch.autocast(features.device.type, enabled=False):
        head = _cast(LinearHead(weight, bias, scale), dtype)
        for rows in _chunks(labels.shape[0], chunk):
            logits = at_least_float32(_logits(head, _cast_rows(features[rows], dtype)))
            logits = sigsoftmax(logits) if sigmoid else logits
            losses[rows] = token_losses(logits, labels[rows], ignore_index=ignore_index)
    return losses


@linear_losses.register_fake
def _(features: Tensor, labels: Tensor, *head: Any) -> Tensor:
    return _rows_of_losses(features, labels.shape, head[-1])


@torch.library.custom_op(
    "x_transformers::linear_losses_gradient",
    mutates_args=(),
    schema=f"(Tensor gradient, bool[] wanted, Tensor features, Tensor labels, {_HEAD}) -> (Tensor, Tensor, Tensor)",
)
def linear_losses_gradient(
    gradient: Tensor,
    wanted: list[bool],
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    sigmoid: bool,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `linear_losses`; the logits of each chunk are computed again.

    Args:
        gradient: `(N,)` of the losses.
        wanted: gradients that are needed: those of features, weight and bias.
        features, labels, weight, bias, scale, sigmoid, ignore_index, chunk, dtype: of `linear_losses`.

    Returns:
        three gradients; those that are not needed are empty.
    """
    to_features, to_weight, to_bias = _room_for_gradients(wanted, features, weight, bias)
    with torch.autocast(features.device.type, enabled=False):
        head = _cast(LinearHead(weight, bias, scale), dtype)
        for rows in _chunks(labels.shape[0], chunk):
            x = _cast_rows(features[rows], dtype)
            logits = _logits(head, x)
            change = _gradient_of_logits(at_least_float32(logits), labels[rows], gradient[rows], sigmoid, ignore_index)
            change = (change * scale).to(logits.dtype)
            if wanted[0]:
                to_features[rows] = change @ head.weight
            # sums over chunks are in float32, as close to the truth as the sum of one chunk
            if wanted[1]:
                to_weight += change.mT @ x
            if wanted[2]:
                to_bias += change.sum(dim=0)
    return to_features, to_weight.to(weight.dtype), to_bias if bias is None else to_bias.to(bias.dtype)


@linear_losses_gradient.register_fake
def _(
    gradient: Tensor, wanted: list[bool], features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    to_features, to_weight, to_bias = _room_for_gradients(wanted, features, weight, bias)
    return to_features, to_weight.to(weight.dtype), to_bias if bias is None else to_bias.to(bias.dtype)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, labels, weight, bias, *ctx.rest = inputs
    ctx.save_for_backward(features, labels, weight, bias)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    features, labels, weight, bias = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wanted = [needed[0], needed[2], needed[3]]
    found = linear_losses_gradient(gradient, wanted, features, labels, weight, bias, *ctx.rest)
    of_features, of_weight, of_bias = (each if want else None for each, want in zip(found, wanted, strict=True))
    return of_features, None, of_weight, of_bias, *(None,) * len(ctx.rest)


linear_losses.register_autograd(_gradients, setup_context=_save_inputs)


def _chunks(length: int, most: int) -> Iterator[slice]:
    return (slice(start, start + most) for start in range(0, length, most))


def _cast(head: LinearHead, dtype: torch.dtype | None) -> LinearHead:
    if dtype is None:
        return head
    return LinearHead(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.scale)


def _cast_rows(features: Tensor, dtype: torch.dtype | None) -> Tensor:
    return features if dtype is None else features.to(dtype)


def _logits(head: LinearHead, features: Tensor) -> Tensor:
    logits = F.linear(features, head.weight, head.bias)
    return logits if head.scale == 1.0 else logits * head.scale


def _gradient_of_logits(logits: Tensor, labels: Tensor, gradient: Tensor, sigmoid: bool, ignore_index: int) -> Tensor:
    """Return `(softmax - one_hot(label)) * gradient` for logits `(n, v)`, times `2 - sigmoid(logits)` if `sigmoid`."""
    change = (sigsoftmax(logits) if sigmoid else logits).softmax(dim=-1)
    ignored = labels == ignore_index
    row = torch.arange(labels.shape[0], device=labels.device)
    change[row, labels.masked_fill(ignored, 0)] -= 1.0
    change *= gradient.masked_fill(ignored, 0.0).unsqueeze(-1)
    return change * (2.0 - logits.sigmoid()) if sigmoid else change


def _rows_of_losses(features: Tensor, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
    wide = torch.float64 if (features.dtype if dtype is None else dtype) is torch.float64 else torch.float32
    return features.new_empty(shape, dtype=wide)


def _room_for_gradients(
    wanted: list[bool], features: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors for the gradients of features, weight and bias, at least in float32 where chunks are summed."""
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    return (
        features.new_empty(features.shape if wanted[0] else (0,)),
        weight.new_zeros(weight.shape if wanted[1] else (0,), dtype=wide),
        weight.new_zeros(bias.shape if bias is not None and wanted[2] else (0,), dtype=wide),
    )
