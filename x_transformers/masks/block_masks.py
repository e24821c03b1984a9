"""Block masks for FlexAttention: a function of one query and one key, and the blocks of both that it does not hide.

Whether a block is hidden, partly visible or wholly visible follows from the bounds of the numbers in it (order, slots,
documents). Therefore nothing here has a number for every pair of tokens, except for a caller's mask over pairs. No
number is read from the device either, so that all of it may be a part of a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.masks.visibility import MaskSpec
from x_transformers.ops import by_index, pad_left

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SIDE = 128
"""Number of queries and of keys of a block, as the kernels take them."""

KEPT = 64
"""Number of block masks that are kept from pass to pass."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class BlockPart(NamedTuple):
    """One rule of visibility, by pairs and by blocks.

    Attributes:
        seen: `(b, h, q, k) -> bool`, True if the rule allows the pair; k counts the prefix.
        some: `(1|b, 1|h, 1|query blocks, key blocks)` bool, True if it may allow a pair of the block.
        every: the same, True if it certainly allows all pairs of the block.
    """

    seen: MaskFunction
    some: Tensor
    every: Tensor


class BlockRule(NamedTuple):
    """Visibility that follows from numbers, without a tensor: causality, `k <= q + diagonal`, and a window.

    In a window, `-ahead <= q + diagonal - k <= window`.
    """

    queries: int
    keys: int
    prefix: int
    causal: bool
    window: int | None
    ahead: int | None
    diagonal: int
    device: torch.device


def block_mask(hiding: MaskSpec, like: Tensor) -> BlockMask:
    """Return the blocks that a kernel visits, computed once for all passes where they follow from numbers only.

    Args:
        hiding: the rules.
        like: queries `(b, h, i, d)`, on the device of the result.
    """
    rule = None if _passing(like) else rule_of(hiding, like.device)
    return build(hiding, like.device) if rule is None else of_rule(rule)


def _passing(like: Tensor) -> bool:
    """Return True if tensors that are made now must not outlive the pass: in a graph, or in a simulation."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return True
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def rule_of(hiding: MaskSpec, device: torch.device) -> BlockRule | None:
    """Return the rule in numbers; None if the visibility depends on tensors."""
    parts = hiding.token_mask, hiding.given, hiding.owners, hiding.shown
    uneven = hiding.slots is not None and not hiding.even
    if hiding.diagonal is None or uneven or any(part is not None for part in parts):
        return None
    causal = hiding.order is not None
    bounds = (hiding.window, hiding.ahead)
    return BlockRule(hiding.queries, hiding.keys, hiding.prefix, causal, *bounds, hiding.diagonal, device)


@functools.lru_cache(maxsize=KEPT)
def of_rule(rule: BlockRule) -> BlockMask:
    """Return the block mask of a rule.

    It is kept for later passes, which may train: tensors made in inference mode could not be used there.
    """
    with torch.inference_mode(False):
        keys = torch.arange(rule.keys, device=rule.device)
        queries = torch.arange(rule.queries, device=rule.device) + rule.diagonal
        hiding = MaskSpec(
            rule.queries,
            rule.keys,
            order=(queries, keys) if rule.causal else None,
            slots=None if rule.window is rule.ahead is None else (queries.unsqueeze(0), keys.unsqueeze(0)),
            window=rule.window,
            ahead=rule.ahead,
            prefix=rule.prefix,
        )
        return build(hiding, rule.device, _by_places(rule))


def _by_places(rule: BlockRule) -> MaskFunction | None:
    """Return the function of a rule that compares places themselves, or None.

    In a window many blocks are partly visible, for whose pairs a kernel would otherwise read four tensors. Numbers
    that change from pass to pass must not become a part of a kernel; the width of the window is read from a tensor.
    """
    if rule.diagonal or rule.prefix:
        return None
    if rule.causal and rule.window is None:
        return lambda b, h, q, k: k <= q
    most = rule.queries + rule.keys
    bounds = [most if bound is None else bound for bound in (rule.window, rule.ahead)]
    widths = torch.tensor(bounds, dtype=torch.int32, device=rule.device)
    if rule.causal:
        return lambda b, h, q, k: (k <= q) & (q - k <= widths[h * 0])
    return lambda b, h, q, k: (q - k <= widths[h * 0]) & (k - q <= widths[h * 0 + 1])


def build(hiding: MaskSpec, device: torch.device, seen: MaskFunction | None = None) -> BlockMask:
    """Return the block mask of any rules.

    Args:
        hiding: the rules.
        device: of the result.
        seen: a cheaper function for the same rules, or None.
    """
    from torch.nn.attention.flex_attention import BlockMask

    i, j = hiding.queries, hiding.prefix + hiding.keys
    parts = parts_of(hiding)
    # blocks that reach beyond the last token are never "full", so that the kernel checks each of their pairs
    every = _whole(i, device).unsqueeze(-1) & _whole(j, device)
    some = torch.ones_like(every)
    for part in parts:
        some, every = some & part.some, every & part.every
    return BlockMask.from_kv_blocks(
        # in this order: blocks whose pairs the kernel checks with `mask_mod`, and blocks that it takes as a whole
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=SIDE,
        mask_mod=_all(tuple(part.seen for part in parts)) if seen is None else seen,
        seq_lengths=(i, j),
    )


def parts_of(hiding: MaskSpec) -> list[BlockPart]:
    """Return the rules one by one. Each allows the keys of the prefix, except for those that are not shown."""
    parts, prefix = [], hiding.prefix
    if hiding.order is not None:
        of_q, of_k = hiding.order
        parts.append(_at_most(_in_front(of_k.unsqueeze(0), prefix), of_q.unsqueeze(0)))
    if hiding.slots is not None:
        of_q, of_k = hiding.slots
        if hiding.window is not None:  # q - k <= window
            parts.append(_at_most(_in_front(-of_k, prefix), hiding.window - of_q))
        if hiding.ahead is not None:  # k - q <= ahead
            parts.append(_at_most(_in_front(of_k, prefix), of_q + hiding.ahead))
    if hiding.owners is not None:
        assert prefix == 0, "packed rows have no keys in front"
        parts.append(_same(*hiding.owners))
    if hiding.given is not None:
        parts.append(_given(pad_left(hiding.given, prefix, True)))
    if hiding.token_mask is not None or hiding.shown is not None:
        parts.append(_padding(hiding))
    return parts


def _all(functions: tuple[MaskFunction, ...]) -> MaskFunction:
    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        result = functions[0](b, h, q, k)
        for function in functions[1:]:
            result = result & function(b, h, q, k)
        return result

    return seen


def _at_most(of_k: Tensor, of_q: Tensor) -> BlockPart:
    """Allow keys whose number, in `(1|b, P + j)`, is at most the query's, in `(1|b, i)`.

    Some pair of a block may be allowed if its least key is at most its largest query, and every pair is if its largest
    key is at most its least query.
    """
    key, query = by_index(of_k), by_index(of_q)
    (first_k, last_k), (first_q, last_q) = _bounds(of_k), _bounds(of_q)
    return BlockPart(
        lambda b, h, q, k: key(b, k) <= query(b, q),
        (first_k.unsqueeze(-2) <= last_q.unsqueeze(-1)).unsqueeze(1),
        (last_k.unsqueeze(-2) <= first_q.unsqueeze(-1)).unsqueeze(1),
    )


def _same(of_q: Tensor, of_k: Tensor) -> BlockPart:
    """Allow keys whose number, in `(j,)`, is the query's, in `(i,)`."""
    # ranges of documents that do not meet have no pair in common; if both blocks are in one document, every pair counts
    (first_k, last_k), (first_q, last_q) = _bounds(of_k), _bounds(of_q)
    first_q, last_q = first_q.unsqueeze(-1), last_q.unsqueeze(-1)
    meet = (first_k <= last_q) & (first_q <= last_k)
    one = (first_q == last_q) & (first_k == last_k)
    return BlockPart(lambda b, h, q, k: of_k[k] == of_q[q], meet[None, None], (meet & one)[None, None])


def _padding(hiding: MaskSpec) -> BlockPart:
    """Allow keys that padding does not hide, and those of the prefix that are shown."""
    token_mask, shown = hiding.token_mask, hiding.shown
    if shown is None:
        assert token_mask is not None
        token_mask = pad_left(token_mask, hiding.prefix, True)
    else:
        token_mask = shown.new_ones(1, hiding.keys) if token_mask is None else token_mask
        rows = max(token_mask.shape[0], shown.shape[0])
        token_mask = torch.cat((shown.expand(rows, -1), token_mask.expand(rows, -1)), dim=-1)
    key, (least, most) = by_index(token_mask), _bounds(token_mask)
    return BlockPart(lambda b, h, q, k: key(b, k), most[:, None, None], least[:, None, None])


def _given(seen: Tensor) -> BlockPart:
    """Allow the pairs of a mask `(1|b, 1|h, 1|i, P + j)`."""
    least, most = _bounds(seen)
    # bounds over the keys of a block first, then, with the axes exchanged, over its queries
    if seen.shape[2] > 1:
        (least, _), (_, most) = (_bounds(t.mT) for t in (least, most))
        least, most = least.mT, most.mT
    return BlockPart(by_index(seen), most, least)


def _in_front(of_k: Tensor, prefix: int) -> Tensor:
    """Pad `(1|b, j)` to `(1|b, P + j)`, with numbers below all others for the prefix."""
    return of_k if prefix == 0 else F.pad(of_k, (prefix, 0), value=torch.iinfo(of_k.dtype).min)


def _bounds(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest number of each block, `(..., blocks)`, of numbers `(..., n)`."""
    n = t.shape[-1]
    blocks = (n + SIDE - 1) // SIDE
    # the last block is filled up with the last number
    places = torch.arange(blocks * SIDE, device=t.device).clamp(max=n - 1)
    t = t[..., places].unflatten(-1, (blocks, SIDE))
    return t.amin(dim=-1), t.amax(dim=-1)


def _whole(n: int, device: torch.device) -> Tensor:
    """Return `(blocks,)` bool, which blocks of n tokens are full."""
    return torch.arange(SIDE, n + SIDE, SIDE, device=device) <= n


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen key blocks of each query block, and the key blocks with the chosen ones first.

    Args:
        blocks: `(b, h, query blocks, key blocks)` bool.
    """
    chosen = blocks.to(torch.int32)
    # kernels visit only the first ones, in this order: stable, so that keys are read from memory one after the other
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)
