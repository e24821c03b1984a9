"""Visibility as FlexAttention reads it: a function of one query and one key, and which blocks of both it leaves over.

Blocks are told from the bounds of what stands in them, so that nothing here has a number for every pair of tokens, but
for a mask over pairs that somebody gave. A device is never asked for a number either: all of it may stand in a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.masks.visibility import MaskSpec
from x_transformers.ops import by_row, pad_left

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SIDE = 128
"""Queries and keys of a block, as the kernels take them."""

KEPT = 64
"""Block masks that stay from pass to pass."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class BlockPart(NamedTuple):
    """One thing that hides keys.

    Attributes:
        seen: `(b, h, q, k) -> bool`, whether it leaves the key to the query; k counts the prefix.
        some, every: `(1|b, 1|h, 1|query blocks, key blocks)` bool, whether it may leave any pair of a block, and
            whether it leaves all of them for certain.
    """

    seen: MaskFunction
    some: Tensor
    every: Tensor


class BlockRule(NamedTuple):
    """What decides visibility where no tensor does: `k <= q + diagonal` and `q + diagonal - k <= window`."""

    queries: int
    keys: int
    prefix: int
    causal: bool
    window: int | None
    diagonal: int
    device: torch.device


def block_mask(hiding: MaskSpec, like: Tensor) -> BlockMask:
    """The blocks that a kernel visits. Where no tensor decides about them they are made once for all passes.

    Args:
        hiding: what hides keys.
        like: queries, `(b, h, i, d)`, whose device is taken.
    """
    rule = None if _passing(like) else rule_of(hiding, like.device)
    return build(hiding, like.device) if rule is None else of_rule(rule)


def _passing(like: Tensor) -> bool:
    """Whether tensors made now must not outlive the pass: those of a graph, or of a simulation."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return True
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def rule_of(hiding: MaskSpec, device: torch.device) -> BlockRule | None:
    """The rule, if it says everything; None if tensors have a say."""
    parts = hiding.live, hiding.given, hiding.owners, hiding.shown
    uneven = hiding.window is not None and not hiding.even
    if hiding.diagonal is None or uneven or any(part is not None for part in parts):
        return None
    causal = hiding.order is not None
    return BlockRule(hiding.queries, hiding.keys, hiding.prefix, causal, hiding.window, hiding.diagonal, device)


@functools.lru_cache(maxsize=KEPT)
def of_rule(rule: BlockRule) -> BlockMask:
    """The block mask of a rule. It may serve training, whoever asked first."""
    with torch.inference_mode(False):
        keys = torch.arange(rule.keys, device=rule.device)
        queries = torch.arange(rule.queries, device=rule.device) + rule.diagonal
        hiding = MaskSpec(
            rule.queries,
            rule.keys,
            order=(queries, keys) if rule.causal else None,
            slots=(queries.unsqueeze(0), keys.unsqueeze(0)),
            window=rule.window,
            prefix=rule.prefix,
        )
        return build(hiding, rule.device)


def build(hiding: MaskSpec, device: torch.device) -> BlockMask:
    """The block mask of whatever hides keys."""
    from torch.nn.attention.flex_attention import BlockMask

    i, j = hiding.queries, hiding.prefix + hiding.keys
    parts = parts_of(hiding)
    every = _whole(i, device).unsqueeze(-1) & _whole(j, device)
    some = torch.ones_like(every)
    for part in parts:
        some, every = some & part.some, every & part.every
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=SIDE,
        mask_mod=_all(tuple(part.seen for part in parts)),
        seq_lengths=(i, j),
    )


def parts_of(hiding: MaskSpec) -> list[BlockPart]:
    """What hides keys, one by one. Keys of the prefix are let through by each, but for those that are not shown."""
    parts, prefix = [], hiding.prefix
    if hiding.order is not None:
        of_q, of_k = hiding.order
        parts.append(_at_most(_in_front(of_k.unsqueeze(0), prefix), of_q.unsqueeze(0)))
    if hiding.slots is not None and hiding.window is not None:
        of_q, of_k = hiding.slots
        parts.append(_at_most(_in_front(-of_k, prefix), hiding.window - of_q))
    if hiding.owners is not None:
        assert prefix == 0, "packed rows have no keys in front"
        parts.append(_same(*hiding.owners))
    if hiding.given is not None:
        parts.append(_given(pad_left(hiding.given, prefix, True)))
    if hiding.live is not None or hiding.shown is not None:
        parts.append(_live(hiding))
    return parts


def _all(functions: tuple[MaskFunction, ...]) -> MaskFunction:
    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        result = functions[0](b, h, q, k)
        for function in functions[1:]:
            result = result & function(b, h, q, k)
        return result

    return seen


def _at_most(of_k: Tensor, of_q: Tensor) -> BlockPart:
    """Keys are seen whose number, of `(1|b, P + j)`, is at most the query's, of `(1|b, i)`."""
    key, query = by_row(of_k), by_row(of_q)
    (first_k, last_k), (first_q, last_q) = _bounds(of_k), _bounds(of_q)
    return BlockPart(
        lambda b, h, q, k: key(b, k) <= query(b, q),
        (first_k.unsqueeze(-2) <= last_q.unsqueeze(-1)).unsqueeze(1),
        (last_k.unsqueeze(-2) <= first_q.unsqueeze(-1)).unsqueeze(1),
    )


def _same(of_q: Tensor, of_k: Tensor) -> BlockPart:
    """Keys are seen whose number, of `(j,)`, is the query's, of `(i,)`."""
    (first_k, last_k), (first_q, last_q) = _bounds(of_k), _bounds(of_q)
    first_q, last_q = first_q.unsqueeze(-1), last_q.unsqueeze(-1)
    meet = (first_k <= last_q) & (first_q <= last_k)
    one = (first_q == last_q) & (first_k == last_k)
    return BlockPart(lambda b, h, q, k: of_k[k] == of_q[q], meet[None, None], (meet & one)[None, None])


def _live(hiding: MaskSpec) -> BlockPart:
    """Keys are seen that are live, and those of the prefix that are shown."""
    live, shown = hiding.live, hiding.shown
    if shown is None:
        assert live is not None
        live = pad_left(live, hiding.prefix, True)
    else:
        live = shown.new_ones(1, hiding.keys) if live is None else live
        rows = max(len(live), len(shown))
        live = torch.cat((shown.expand(rows, -1), live.expand(rows, -1)), dim=-1)
    key, (least, most) = by_row(live), _bounds(live)
    return BlockPart(lambda b, h, q, k: key(b, k), most[:, None, None], least[:, None, None])


def _given(seen: Tensor) -> BlockPart:
    """Pairs of `(1|b, 1|h, 1|i, P + j)`."""
    rows, heads, queries = (size > 1 for size in seen.shape[:3])
    least, most = _bounds(seen)
    if queries:
        (least, _), (_, most) = (_bounds(t.mT) for t in (least, most))
        least, most = least.mT, most.mT
    return BlockPart(lambda b, h, q, k: seen[b if rows else 0, h if heads else 0, q if queries else 0, k], most, least)


def _in_front(of_k: Tensor, prefix: int) -> Tensor:
    """`(1|b, j)` to `(1|b, P + j)`: numbers below all others in front."""
    return of_k if prefix == 0 else F.pad(of_k, (prefix, 0), value=torch.iinfo(of_k.dtype).min)


def _bounds(t: Tensor) -> tuple[Tensor, Tensor]:
    """`(..., n)` to least and largest numbers of its blocks, `(..., blocks)`."""
    n = t.shape[-1]
    blocks = (n + SIDE - 1) // SIDE
    # the last block is filled up with the last number
    places = torch.arange(blocks * SIDE, device=t.device).clamp(max=n - 1)
    t = t[..., places].unflatten(-1, (blocks, SIDE))
    return t.amin(dim=-1), t.amax(dim=-1)


def _whole(n: int, device: torch.device) -> Tensor:
    """`(blocks,)` bool, which blocks of n tokens are full."""
    return torch.arange(SIDE, n + SIDE, SIDE, device=device) <= n


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(b, h, query blocks, key blocks)` bool to how many key blocks each has, and which, those first."""
    chosen = blocks.to(torch.int32)
    order = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)
