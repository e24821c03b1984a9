"""Small helpers that scripts import from modules of x-transformers. The library itself does not use them.

A module that has some in x-transformers finds them here when somebody asks for one: `__getattr__ = names_of(__name__)`.
They are no part of its `dir`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import pack, unpack
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from x_transformers.modules import script_names
from x_transformers.modules.script_names import at_most_one_of, divisible_by, exists, first


def default(val: Any, d: Any) -> Any:
    """Return the value, or `d` if it is None."""
    return d if val is None else val


def cast_tuple(t: Any, length: int = 1) -> tuple[Any, ...]:
    """Return a tuple as it is, and anything else `length` times."""
    return t if isinstance(t, tuple) else (t,) * length


def is_empty(x: Any) -> bool:
    """Return True if there is nothing in a collection."""
    return len(x) == 0


def compact(arr: Iterable[Any]) -> list[Any]:
    """Return the elements that are not None."""
    return [each for each in arr if each is not None]


def maybe(fn: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a function that leaves None alone, and everything if there is no function."""

    def inner(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x if fn is None or x is None else fn(x, *args, **kwargs)

    return inner


def once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls another one the first time only, and returns None afterwards."""
    called = False

    @functools.wraps(fn)
    def inner(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        if called:
            return None
        called = True
        return fn(*args, **kwargs)

    return inner


def disable_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs another one without autocast, on any device."""

    @functools.wraps(fn)
    def inner(*args: Any, **kwargs: Any) -> Any:
        kind = next((each.device.type for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), "cpu")
        with torch.autocast(kind, enabled=False):
            return fn(*args, **kwargs)

    return inner


def pack_one(t: Tensor, pattern: str) -> tuple[Tensor, Any]:
    """Return one tensor packed by einops, and the shapes that unpack it."""
    return pack([t], pattern)


def unpack_one(t: Tensor, ps: Any, pattern: str) -> Tensor:
    """Return the tensor that `pack_one` packed."""
    return unpack(t, ps, pattern)[0]


def pack_one_with_inverse(t: Tensor, pattern: str) -> tuple[Tensor, Callable[..., Tensor]]:
    """Return one tensor packed by einops, and a function that unpacks it, perhaps by another pattern."""
    packed, shapes = pack_one(t, pattern)

    def inverse(out: Tensor, inv_pattern: str | None = None) -> Tensor:
        return unpack_one(out, shapes, default(inv_pattern, pattern))

    return packed, inverse


def repeat_batch(t: Tensor, batch_size: int) -> Tensor:
    """Return a tensor `batch_size` times, along a new first axis."""
    return t.unsqueeze(0).repeat(batch_size, *[1] * t.ndim)


def transpose(t: Tensor) -> Tensor:
    """Return a tensor with its last two axes exchanged."""
    return t.transpose(-1, -2)


def detach_all(obj: Any) -> Any:
    """Return lists, tuples and dicts of tensors without their graph."""
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, obj)


def or_reduce(masks: Sequence[Tensor]) -> Tensor:
    """Return where any of the masks is True."""
    return functools.reduce(torch.logical_or, masks)


def maybe_and_mask(*masks: Tensor | None) -> Tensor | None:
    """Return where all masks that are given are True; None without any."""
    given = compact(masks)
    return functools.reduce(torch.logical_and, given) if given else None


def get_cached_kvs(cache: Any) -> list[Any]:
    """Return the cached keys and values of each attention of a record."""
    return [each.cached_kv for each in cache.attn_intermediates]


def init_zero_(layer: nn.Module) -> None:
    """Set the weights of a map to zero, and its bias."""
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)


def init_depth_scaled_(projection: Any, layer_depth: int) -> None:
    """Initialize a map with the standard deviation `(2 * fan_in * layer_depth) ** -0.5`."""
    nn.init.normal_(projection.weight, std=(2 * projection.weight.shape[1] * layer_depth) ** -0.5)


def freeze_all_layers_(module: nn.Module) -> None:
    """Let no parameter of a module need a gradient."""
    module.requires_grad_(False)


def pick_and_pop(keys: Iterable[str], d: dict[str, Any]) -> dict[str, Any]:
    """Move entries out of a dict, into a new one."""
    return {key: d.pop(key) for key in keys}


def group_dict_by_key(cond: Callable[[str], bool], d: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries whose keys meet a condition, and the others."""
    met = {key: value for key, value in d.items() if cond(key)}
    return met, {key: value for key, value in d.items() if key not in met}


def string_begins_with(prefix: str, str: str) -> bool:
    """Return True if a string begins with a prefix."""
    return str.startswith(prefix)


def group_by_key_prefix(prefix: str, d: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries whose keys begin with a prefix, and the others."""
    return group_dict_by_key(functools.partial(string_begins_with, prefix), d)


def groupby_prefix_and_trim(prefix: str, d: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries whose keys begin with a prefix, without it, and the others."""
    met, others = group_by_key_prefix(prefix, d)
    return {key[len(prefix) :]: value for key, value in met.items()}, others


def resolve_repeat_blocks_to_layer_execute_order(
    repeat_blocks: Any, num_blocks: int, len_default_block: int
) -> tuple[int, ...]:
    """Return the indices of sublayers in the order of execution, with ranges of blocks repeated.

    Args:
        repeat_blocks: `(block, times)` or `((first, last), times)`, or several of them.
        num_blocks: number of blocks.
        len_default_block: number of sublayers of a block.
    """
    single = len(repeat_blocks) == 2 and isinstance(repeat_blocks[1], int)
    ends: dict[int, tuple[int, int]] = {}
    for span, times in [repeat_blocks] if single else repeat_blocks:
        begin, last = (span, span) if isinstance(span, int) else span
        ends[begin] = last, times
    blocks: list[int] = []
    at = 0
    while at < num_blocks:
        last, times = ends.get(at, (at, 1))
        blocks += list(range(at, last + 1)) * times
        at = last + 1
    return tuple(block * len_default_block + part for block in blocks for part in range(len_default_block))


def dropout_seq(seq: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor | None]:
    """Keep a random share `1 - dropout` of the tokens of each row, at least one.

    Args:
        seq: `(b, n, D)`.
        mask: `(b, n)` bool, valid tokens, or None.
        dropout: share of the tokens that are left out.

    Returns:
        `(b, k, D)` kept tokens, and `(b, k)` their mask, None without a mask.
    """
    batch, n, _ = seq.shape
    ranks = torch.rand(batch, n, device=seq.device)
    if mask is not None:
        ranks = ranks.masked_fill(~mask, -1.0)
    kept = ranks.topk(max(1, int(n * (1 - dropout))), dim=-1).indices
    rows = torch.arange(batch, device=seq.device).unsqueeze(-1)
    if mask is None:
        return seq[rows, kept], None
    counts = (mask.sum(dim=-1, keepdim=True) * (1 - dropout)).ceil()
    few = torch.arange(kept.shape[1], device=seq.device) < counts
    return seq[rows, kept], mask[rows, kept] & few


def flip(x: Tensor, dim: int = 1, lens: Tensor | None = None) -> Tensor:
    """Return a tensor with an axis reversed; of each row only the first `lens (b,)` places, if they are given."""
    if lens is None:
        return x.flip(dim)
    n = x.shape[dim]
    places = torch.arange(n, device=x.device)
    turned = torch.where(places < lens.unsqueeze(-1), lens.unsqueeze(-1) - 1 - places, places)
    shape = [1] * x.ndim
    shape[0], shape[dim] = len(lens), n
    return x.gather(dim, turned.reshape(shape).expand_as(x))


def batch_masked_mean(t: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over rows of the means over the places of each where `mask` is True."""
    while mask.ndim < t.ndim:
        mask = mask.unsqueeze(-1)
    mask = mask.expand_as(t)
    axes = tuple(range(1, t.ndim))
    return ((t * mask).sum(dim=axes) / mask.sum(dim=axes).clamp(min=1e-5)).mean()


def log(t: Tensor, eps: float = 1e-20) -> Tensor:
    """Return `log(max(t, eps))`."""
    return t.clamp(min=eps).log()


def binary_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of bits with the probabilities `sigmoid(logits)`."""
    p = logits.sigmoid()
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits))


def unit_by_eps(t: Tensor, eps: float = 1e-6) -> Tensor:
    """Return vectors of unit length over the last axis."""
    return F.normalize(t, dim=-1, eps=eps)


def unit_by_dim(t: Tensor, dim: int = -1) -> Tensor:
    """Return vectors of unit length over an axis."""
    return F.normalize(t, dim=dim)


def scale_grad(t: Tensor, scale: float) -> Tensor:
    """Return a tensor with its gradient multiplied by a factor."""
    return t * scale + t.detach() * (1 - scale)


def rollout_loss_weights(step_losses: Tensor, decay: float = 1.0) -> Tensor:
    """Return `exp(-decay * sum over earlier steps of their losses)` for losses `(k, ...)`, as constants."""
    losses = step_losses.detach()
    return (-decay * (losses.cumsum(dim=0) - losses)).exp()


def sample_prob(prob: float) -> bool:
    """Return True with a probability, by Python's generator."""
    return random.random() < prob


def coin_flip() -> bool:
    """Return True half of the time."""
    return sample_prob(0.5)


_ANY = {"exists": exists, "default": default, "F": F}
_OF: dict[str, dict[str, Any]] = {
    "attend": {
        "at_most_one_of": at_most_one_of,
        "compact": compact,
        "pack_one": pack_one,
        "unpack_one": unpack_one,
        "once": once,
    },
    "x_transformers": {
        "disable_autocast": disable_autocast,
        "is_empty": is_empty,
        "detach_all": detach_all,
        "maybe": maybe,
        "resolve_repeat_blocks_to_layer_execute_order": resolve_repeat_blocks_to_layer_execute_order,
        "or_reduce": or_reduce,
        "get_cached_kvs": get_cached_kvs,
        "init_zero_": init_zero_,
        "init_depth_scaled_": init_depth_scaled_,
        "pick_and_pop": pick_and_pop,
        "group_dict_by_key": group_dict_by_key,
        "string_begins_with": string_begins_with,
        "group_by_key_prefix": group_by_key_prefix,
        "groupby_prefix_and_trim": groupby_prefix_and_trim,
        "dropout_seq": dropout_seq,
        "DEFAULT_ATTN_RESIDUAL_LORA_RANK": 64,
    },
    "belief_state_wrapper": {"flip": flip},
    "continuous": {"batch_masked_mean": batch_masked_mean},
    "continuous_autoencoder": {},
    "dpo": {"freeze_all_layers_": freeze_all_layers_, "maybe_and_mask": maybe_and_mask},
    "entropy_based_tokenizer": {"log": log},
    "free_transformer": {"log": log, "pack_with_inverse": pack_one_with_inverse, "binary_entropy": binary_entropy},
    "full_bandwidth": {},
    "gpt_lejepa": {"l2norm": unit_by_eps, "scale_grad": scale_grad},
    "gpt_vae": {},
    "multi_input": {},
    "neo_mlp": {},
    "next_latent_wrapper": {"l2norm": unit_by_dim, "dynamic_rollout_loss_weights": rollout_loss_weights},
    "nonautoregressive_wrapper": {"sample_prob": sample_prob, "coin_flip": coin_flip},
    "recirculation": {"cast_tuple": cast_tuple, "GELU": nn.GELU},
    "up_wrapper": {"divisible_by": divisible_by, "LSTM": nn.LSTM, "GRU": nn.GRU},
    "xl_autoregressive_wrapper": {
        "is_empty": is_empty,
        "first": first,
        "divisible_by": divisible_by,
        "repeat_batch": repeat_batch,
        "pack_one_with_inverse": pack_one_with_inverse,
        "transpose": transpose,
    },
    "xm_latent_decoder": {"cast_tuple": cast_tuple, "default": script_names.default},
    "xval": {},
}


def names_of(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that scripts import helpers from.

    Args:
        module: its full name.
    """
    names = {**_ANY, **_OF[module.rpartition(".")[2]]}

    def find(name: str) -> Any:
        if name in names:
            return names[name]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find
