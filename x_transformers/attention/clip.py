"""QK clip: scale the maps to queries and keys down until no logit exceeds a bound (MuonClip, 2507.20534)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.head_maps import HeadMaps
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.modules.param_attention import ParamAttention


def checked_logits(logits: Tensor | Intermediates | None, heads: int, tau: float) -> Tensor:
    """Return the logits that `qk_clip_` was given.

    Raises:
        InputError: if there are none, or tau is not positive. ShapeError: if they are not `(b, heads, i, j)`.
    """
    if isinstance(logits, Intermediates):
        logits = logits.pre_softmax_attn
    if logits is None:
        raise InputError(
            "`qk_clip_` reads logits, and this record holds none, since a fused kernel or a cache made it; run the "
            "pass without a cache, with `return_intermediates = True` and `flash` at None or False."
        )
    if tau <= 0:
        raise InputError(f"`tau` is {tau}; it must be positive.")
    if logits.ndim != 4 or logits.shape[1] != heads:
        raise ShapeError(f"the logits have shape {tuple(logits.shape)}; they must be (b, {heads}, i, j).")
    return logits


def clip_factors(logits: Tensor, tau: float) -> Tensor:
    """Return `(h,)` factors `min(1, tau / max)` of each head's largest logit; 1 where that is not positive.

    Args:
        logits: `(b, h, i, j)`.
        tau: the bound of the logits, > 0.
    """
    most = logits.float().amax(dim=(0, 2, 3))
    return torch.where(most > tau, tau / most, 1.0)


@torch.no_grad()
def clip_heads(projections: Any, latent: Any, factors: Tensor) -> None:
    """Multiply the logits of each query head by its factor, shared between queries and keys.

    The rows of key head g, and their biases, are multiplied by `sqrt(f_g)`, with `f_g` the least factor of the query
    heads that use it, and those of query head q by the rest, `factor_q / sqrt(f_g)`. The first features of the keys may
    be one key for all heads, which are clipped differently: it stays, and the queries' first features have the whole
    factor.

    Args:
        projections: the maps `q` to `h * d` features and `k` to those of the keys, or to some of these.
        latent: has the map `sub_keys` to the others, and the number `shared` of features that all heads share; None if
            there is no latent of keys.
        factors: `(h,)`.

    Raises:
        InputError: if one of the maps was replaced by a module that is not linear.
    """
    kv_heads, shared = projections.kv_heads, 0 if latent is None else latent.shared
    keys = (projections.k, None if latent is None or shared else latent.sub_keys)
    to_queries, to_keys = _linear(projections.q), [_linear(each) for each in keys if each is not None]
    of_keys = factors.unflatten(0, (kv_heads, -1)).amin(dim=-1).sqrt()
    rest = factors / of_keys.repeat_interleave(len(factors) // kv_heads)
    width = to_queries.weight.shape[0] // len(factors)
    by_feature = (factors[:, None].expand(-1, shared), rest[:, None].expand(-1, width - shared))
    _scale_rows(to_queries, torch.cat(by_feature, dim=1).flatten())
    # the maps share the key heads among them, in the order in which `join_keys` concatenates them
    done = 0
    for linear in to_keys:
        heads = linear.weight.shape[0] // (width - shared)
        _scale_rows(linear, of_keys[done : done + heads])
        done += heads


def _linear(module: nn.Module) -> nn.Linear:
    if isinstance(module, HeadMaps):
        raise InputError(
            "logits are clipped by scaling one matrix of each head, and with `attn_switch_queries_keys` tokens choose "
            "among several; drop it, or bound logits by `attn_qk_norm`."
        )
    if isinstance(module, ParamAttention):
        module = module.values
    if not isinstance(module, nn.Linear):
        raise InputError(
            f"logits are clipped by scaling the weights of `nn.Linear` maps, and a {type(module).__name__} is in the "
            "place of one; merge the adapter into its map first. (A matrix that tied blocks share cannot be "
            "scaled for one of them.)"
        )
    return module


def _scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    rows = factors.repeat_interleave(linear.weight.shape[0] // len(factors))
    linear.weight.mul_(rows.to(linear.weight)[:, None])
    if linear.bias is not None:
        linear.bias.mul_(rows.to(linear.bias))
