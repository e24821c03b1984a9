"""Choosing a token from logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import InputError, NotFiniteError
from x_transformers.ops import at_least_float32, log
from x_transformers.options.values import accepts, shown

Choose = Callable[[Tensor], Tensor]
"""`(b, v)` logits to `(b, 1)` tokens."""


Adjust = Callable[[Tensor], Tensor]
"""`(..., v)` logits to those that are drawn from, in float32 or wider."""

NEAR_ZERO = 1e-6
"""Temperatures below this one take the most likely token: logits divided by them would overflow."""


def is_greedy(temperature: float) -> bool:
    """Return True if a temperature is zero, or so near that only the most likely token has a chance."""
    return temperature < NEAR_ZERO


def adjuster(
    temperature: float,
    filter_fn: Callable[..., Tensor],
    filter_kwargs: Mapping[str, Any],
    filter_before_temperature: bool = False,
) -> Adjust:
    """Return a function that computes `filter(logits / temperature)`, or `filter(logits) / temperature`.

    By default the temperature comes first: a filter by probability must see the probabilities that are drawn from. At
    temperature 0, or near it, only the filter is applied.

    Args:
        temperature: 0 or higher.
        filter_fn: logits `(b, v)` to logits.
        filter_kwargs: its keywords.
        filter_before_temperature: filter before the division.

    Raises:
        InputError: if the temperature is negative or not finite, or the filter does not take `filter_kwargs`.
    """
    if not accepts(float, temperature) or temperature < 0:
        raise InputError(
            f"`temperature` is {shown(temperature)}; it must be finite and not negative. 0 takes the most likely token."
        )
    check_keywords(filter_fn, filter_kwargs, "filter_kwargs", arguments=1)
    scale = 1.0 if is_greedy(temperature) else temperature

    def filtered(logits: Tensor) -> Tensor:
        kept = filter_fn(logits, **filter_kwargs)
        if not isinstance(kept, Tensor) or kept.shape != logits.shape:
            raise InputError(
                f"`filter_logits_fn` returned {shown(kept)}; it must keep the shape {tuple(logits.shape)}."
            )
        return kept

    def adjust(logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        if scale == 1:
            return filtered(logits)
        return filtered(logits) / scale if filter_before_temperature else filtered(logits / scale)

    return adjust


def unchanged(logits: Tensor) -> Tensor:
    """Return the logits unchanged."""
    return logits


def most_likely(logits: Tensor) -> Tensor:
    """Return `(b, 1)` the token with the largest logit, the first of several."""
    return logits.argmax(dim=-1, keepdim=True)


def draw(logits: Tensor, adjust: Adjust) -> Tensor:
    """Draw `(b, 1)` tokens from `softmax(adjust(logits))`."""
    return draw_from(adjust(logits).softmax(dim=-1))


def draw_from(probs: Tensor) -> Tensor:
    """Draw `(b, 1)` tokens with probabilities proportional to `probs (b, v)`.

    Raises:
        NotFiniteError: if there are no such probabilities, on a CPU only.
    """
    if probs.device.type != "cpu":
        return exponential_race(probs)  # without the check, for which an accelerator would have to be waited for
    try:
        return torch.multinomial(probs, 1)
    except RuntimeError:
        if bool(probs.isfinite().all()):
            raise
    raise NotFiniteError(
        "the logits that are drawn from have no probabilities: `filter_logits_fn` (or a contrast with an amateur) "
        "returned NaN, or left no token. Keep at least one token with a finite logit in each row."
    )


def exponential_race(probs: Tensor) -> Tensor:
    """Draw `(b, 1)` the same tokens as `torch.multinomial(probs, 1)`, without its checks, which wait for the device.

    `argmax(p / q)` with `q` from Exp(1): the first of independent clocks that tick at the rates p.
    """
    return (probs / torch.empty_like(probs).exponential_(1)).argmax(dim=-1, keepdim=True)


def gumbel_noise(t: Tensor) -> Tensor:
    """Return `-ln(-ln(u))`, `u` uniform in (0, 1), of t's shape: `argmax(logits + noise)` is a draw from the softmax.

    Args:
        t: whose shape, dtype and device the noise has.
    """
    return -log(-log(torch.rand_like(t)))


def gumbel_sample(logits: Tensor, temperature: float = 1.0, eps: float = 1e-6) -> Tensor:
    """Draw tokens `(...)` from `softmax(logits / temperature)`; the most likely ones if the temperature is near 0.

    Args:
        logits: `(..., v)`.
        temperature: divides the logits.
        eps: temperatures up to this one are near 0.
    """
    if temperature <= eps:
        return logits.argmax(dim=-1)
    logits = at_least_float32(logits)  # which half precision would overflow when divided
    return (logits / temperature + gumbel_noise(logits)).argmax(dim=-1)


def check_readable(logits: Tensor, vocabulary: int) -> None:
    """Raise an `InputError` if tokens could be drawn from `logits (..., v)` that the model does not embed."""
    if logits.shape[-1] > vocabulary:
        raise InputError(
            f"the model gives logits for {logits.shape[-1]} tokens, but embeds {vocabulary}; what it generates could "
            "not be read again. Make `logits_dim` and `num_tokens` agree."
        )


def check_keywords(fn: Callable[..., Tensor], keywords: Mapping[str, Any], name: str, arguments: int) -> None:
    """Raise an `InputError` unless `fn` takes `keywords` after a number of positional arguments."""
    if not isinstance(keywords, Mapping) or not all(isinstance(key, str) for key in keywords):
        raise InputError(f"`{name}` is {shown(keywords)}; it must map names of keywords to their values.")
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(*(None,) * arguments, **keywords)
    except TypeError as error:
        called = getattr(fn, "__name__", type(fn).__name__)
        raise InputError(f"`{name}` do not fit {called}{signature}: {error}.") from None
