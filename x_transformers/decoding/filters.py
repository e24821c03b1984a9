"""Filters of logits: pure functions on `(..., v)` that replace what is not kept by -inf."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.options.suggestions import did_you_mean
from x_transformers.options.values import accepts, shown

Filter = Callable[..., Tensor]


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Nucleus: the most likely tokens until their probability exceeds `thres`, the one that crosses it included.

    From 1904.09751. A token is kept iff those more likely than it hold at most `thres`; so the first always is.

    Args:
        logits: `(..., v)`.
        thres: probability, in [0, 1].

    Raises:
        InputError: if `thres` lies outside of [0, 1].
    """
    _check_fraction("thres", thres)
    ordered, order = _probabilities(logits).sort(dim=-1, descending=True)
    surplus = F.pad(ordered.cumsum(dim=-1)[..., :-1], (1, 0)) > thres
    return logits.masked_fill(torch.empty_like(surplus).scatter_(-1, order, surplus), -math.inf)


def top_k(logits: Tensor, frac_num_tokens: float = 0.1, k: int | None = None) -> Tensor:
    """The `k` largest logits, by default `ceil(frac_num_tokens * v)`; ties as in `torch.topk`.

    Args:
        logits: `(..., v)`.
        frac_num_tokens: part of the vocabulary to keep where `k` is None.
        k: how many to keep; more than there are keeps all.

    Raises:
        InputError: if nothing would be kept.
    """
    size = logits.shape[-1]
    if k is not None and not accepts(int, k):
        raise InputError(f"`k` is {shown(k)}; it must be a whole number of tokens.")
    _check_number("frac_num_tokens", frac_num_tokens)
    count = math.ceil(frac_num_tokens * size) if k is None else k
    if count < 1:
        given = f"`frac_num_tokens` is {frac_num_tokens}" if k is None else f"`k` is {k}"
        raise InputError(f"top_k would keep no token: {given}; keep at least one (for greedy decoding, k = 1).")
    values, indices = logits.topk(min(count, size), dim=-1)
    return torch.full_like(logits, -math.inf).scatter_(-1, indices, values)


def top_a(logits: Tensor, min_p_pow: float = 2.0, min_p_ratio: float = 0.02) -> Tensor:
    """Tokens with `p >= min_p_ratio * p_max ** min_p_pow`; the most likely one stays whatever the bound.

    Args:
        logits: `(..., v)`.
        min_p_pow: how fast the bound falls where the model is unsure.
        min_p_ratio: factor of the bound, not negative.

    Raises:
        InputError: if `min_p_ratio` is negative.
    """
    _check_number("min_p_pow", min_p_pow)
    _check_number("min_p_ratio", min_p_ratio)
    if not min_p_ratio >= 0:
        raise InputError(f"`min_p_ratio` is {min_p_ratio}; it is a factor of probabilities and cannot be negative.")
    probs = _probabilities(logits)
    most = probs.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probs < torch.minimum(most.pow(min_p_pow) * min_p_ratio, most), -math.inf)


def min_p(logits: Tensor, min_p: float = 0.1) -> Tensor:
    """Tokens with `p >= min_p * p_max` (2407.01082).

    Args:
        logits: `(..., v)`.
        min_p: in [0, 1].

    Raises:
        InputError: if `min_p` lies outside of [0, 1].
    """
    _check_fraction("min_p", min_p)
    probs = _probabilities(logits)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -math.inf)


FILTER_LOGITS_FN: dict[str, Filter] = {"top_p": top_p, "top_k": top_k, "top_a": top_a, "min_p": min_p}


def find_filter(name_or_fn: str | Filter) -> Filter:
    """A filter by its name, or the callable itself.

    Raises:
        InputError: if no filter has that name, or what was given cannot be called.
    """
    if callable(name_or_fn):
        return name_or_fn
    if not isinstance(name_or_fn, str) or name_or_fn not in FILTER_LOGITS_FN:
        raise InputError(
            f"`filter_logits_fn` is {name_or_fn!r}; it must be a function of logits or one of "
            f"{', '.join(FILTER_LOGITS_FN)}.{did_you_mean(str(name_or_fn), FILTER_LOGITS_FN)}"
        )
    return FILTER_LOGITS_FN[name_or_fn]


def contrastive_decode_fn(
    expert_logits: Tensor, amateur_logits: Tensor, alpha: float = 0.1, beta: float = 0.5
) -> Tensor:
    """`(1 + beta) * expert - beta * amateur`, where the expert finds a token plausible (2210.15097, 2309.09117).

    A token is plausible iff the expert gives it at least `alpha` times the probability of its favourite; the others
    get the most negative finite number.

    Args:
        expert_logits: `(..., v)`.
        amateur_logits: the same shape.
        alpha: plausibility, in (0, 1].
        beta: weight of the contrast.

    Raises:
        InputError: if `alpha` lies outside of (0, 1], or the shapes differ.
    """
    _check_number("alpha", alpha)
    _check_number("beta", beta)
    if not 0 < alpha <= 1:
        raise InputError(f"`alpha` is {alpha}; it is a part of the highest probability and must lie in (0, 1].")
    if expert_logits.shape != amateur_logits.shape:
        raise InputError(
            f"the expert's logits have shape {tuple(expert_logits.shape)}, the amateur's "
            f"{tuple(amateur_logits.shape)}; both models need the same vocabulary."
        )
    bound = expert_logits.amax(dim=-1, keepdim=True) + math.log(alpha)
    contrast = (1 + beta) * expert_logits - beta * amateur_logits
    return contrast.masked_fill(expert_logits < bound, torch.finfo(contrast.dtype).min)


def _probabilities(logits: Tensor) -> Tensor:
    """Softmax over the vocabulary, at least in float32: sums of thousands of bfloat16 numbers are worthless."""
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _check_number(name: str, value: float) -> None:
    if not accepts(float, value):
        raise InputError(f"`{name}` is {shown(value)}; it must be a finite number.")


def _check_fraction(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 <= value <= 1:
        raise InputError(f"`{name}` is {value}; it is a probability and must lie in [0, 1].")
