"""Subsampled keys: in training, each layer and row sees a random share of the keys (arXiv 2306.01705).

A query sees the kept keys that it would see otherwise, and always its own. The other keys are hidden by a mask; where
nothing besides the softmax reads pairs of tokens, the kept keys are gathered instead, for a share of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attend import Attend
from x_transformers.attention.backends.base import AttentionOutput
from x_transformers.attention.qk.decay import Decay
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Call, Capture, Carry, Deltas, LayerCall, Memo, Span
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.masks.visibility import Visibility
from x_transformers.ops import at_least_float32, expand_kv_heads, pad_left
from x_transformers.options.schema import Feature, Rule, at_least, opt, require

NEVER = -3e4
"""Logit of an own key that is hidden; float16 holds it."""


@dataclass(frozen=True, kw_only=True)
class SubsamplingOptions:
    subsample_keys: float | None = opt(
        None, "in training, each row sees this random share of the keys, drawn again in each layer, and its own key"
    )
    subsample_local: int | None = opt(
        None, "draw for blocks of this many queries w; keys at distance t are kept in proportion to 1 / (1 + t / w)"
    )

    def __post_init__(self) -> None:
        share = self.subsample_keys
        require(share is None or 0 < share <= 1, f"`subsample_keys` is {share}; it must lie in (0, 1].")
        at_least(1, subsample_local=self.subsample_local)


class Kept(NamedTuple):
    """Keys that were drawn, for blocks of queries.

    Attributes:
        columns: `(b, blocks, c)` columns of keys, the best first.
        valid: `(b, blocks, c)` bool, False for those beyond the share of a block that sees fewer keys; None: all are.
        height: number of queries of a block; the last block may have fewer.
    """

    columns: Tensor
    valid: Tensor | None
    height: int

    def spread(self, keys: int) -> Tensor:
        """Return `(b, blocks, keys)` bool, True for keys that were drawn."""
        valid = torch.ones_like(self.columns, dtype=torch.bool) if self.valid is None else self.valid
        return valid.new_zeros(*self.columns.shape[:2], keys).scatter(-1, self.columns, valid)


class KeySubsampling(nn.Module):
    """Attention to a random share of the keys, while this module is in training mode.

    Of the m keys that a block of queries may see, `ceil(share * m)` are kept. Without blocks, all queries of a row are
    one. Keys of tokens are drawn from, recurrent memory and the cache included; those in front (learned ones, zeros,
    those of a caller) are always seen.

    Args:
        share: share of the keys, in (0, 1].
        local: number w of queries of a block, which keeps keys at distance t with a chance in proportion to
            `1 / (1 + t / w)`; None: one block, and all keys alike.
        gathered: the core for gathered keys, without causality and window; None if the attention has parts that read
            pairs of tokens.
    """

    def __init__(self, share: float, local: int | None, gathered: Attend | None) -> None:
        super().__init__()
        # whole numbers, with which counts are exact
        self.part, self.whole = Fraction(share).limit_denominator(10**6).as_integer_ratio()
        self.local, self.gathered = local, gathered

    @property
    def draws(self) -> bool:
        """True if keys are drawn now."""
        return self.training and self.part < self.whole

    def around(self, core: Attend) -> Attend | _Subsampled:
        """Return what attends: the core, or what draws keys before it attends."""
        return _Subsampled(core, self) if self.draws else core

    def draw(self, layer: LayerCall, batch: int, *, causal: bool) -> Kept:
        """Draw the keys that each block of queries may see.

        Args:
            layer: the sublayer's call.
            batch: number of rows.
            causal: a block sees no key after its last query.
        """
        query, keys = layer.call.query, layer.keys
        i, j, local = query.length, keys.length, self.local
        height = i if local is None else local
        blocks = 1 if local is None else -(-i // local)
        device = keys.index.device
        # proportional to a chance, without replacement: the largest of chance / Exp(1)
        noise = torch.empty(batch, blocks, j, device=device).exponential_().reciprocal()
        seen = None if keys.token_mask is None else keys.token_mask.unsqueeze(1)
        if local is not None:
            last = (torch.arange(1, blocks + 1, device=device) * local).clamp(max=i) - 1
            middle = (torch.arange(blocks, device=device) * local + local // 2).clamp(max=i - 1)
            distance = (query.slot[:, middle].unsqueeze(-1) - keys.slot.unsqueeze(-2)).abs()
            noise = noise / (1 + distance / local)
            if causal:
                arrived = (keys.index <= query.index[last].unsqueeze(-1)).unsqueeze(0)
                seen = arrived if seen is None else seen & arrived
        most = self._count(j)
        if seen is None:
            return Kept(noise.topk(most, dim=-1).indices, None, height)
        columns = noise.masked_fill(~seen, -1.0).topk(most, dim=-1).indices
        counts = self._count(seen.expand(batch, blocks, j).sum(dim=-1, keepdim=True))
        return Kept(columns, torch.arange(most, device=device) < counts, height)

    def _count(self, keys: Any) -> Any:
        """Return the number of keys that are kept, `ceil(share * keys)`."""
        return (keys * self.part + self.whole - 1) // self.whole


@dataclass(frozen=True, eq=False)
class _Subsampled:
    """A core that attends to keys that are drawn at each call."""

    core: Attend
    by: KeySubsampling

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        layer: LayerCall,
        *,
        own: bool,
        prefix: int,
        shown: Tensor | None,
        decay: Decay | None,
    ) -> tuple[AttentionOutput, Visibility]:
        """Attend within one sublayer; for the arguments see `Attend.run`.

        Raises:
            InputError: if the keys are those of a context, and distances decide which are kept.
        """
        core, gathered, causal = self.core, self.by.gathered, layer.causal
        if causal is None:
            causal = layer.call.causal if layer.context is None else core.causal
        if self.by.local is not None and not own:
            raise InputError(
                "`subsample_local` keeps keys by their distance, and those of a context have none; drop it there."
            )
        kept = self.by.draw(layer, q.shape[0], causal=causal and own)
        if gathered is None or decay is not None or _reads_pairs(core, layer, causal, own):
            layer = _masked(layer, kept, own)
            return core.run(q, k, v, x, layer, own=own, prefix=prefix, shown=shown, decay=decay)
        if own:
            return _Gathered(core, gathered, kept, layer, prefix, causal).run(q, k, v, shown)
        return _run_gathered(gathered, kept, q, k, v, prefix, shown, kept.valid)


def _reads_pairs(core: Attend, layer: LayerCall, causal: bool, own: bool) -> bool:
    """Return True if a pass needs the scores of all pairs, or has something of the caller for each of them."""
    call = layer.call
    if core.leaves_scores or call.capture.scores or call.capture.on_demand or layer.deltas.attn is not None:
        return True
    if layer.biases or layer.kind in layer.carry.scores:
        return True
    return call.attn_mask is not None if own else causal or layer.context_attn_mask is not None


def _masked(layer: LayerCall, kept: Kept, own: bool) -> LayerCall:
    """Return the call with all other keys hidden."""
    call, keys = layer.call, layer.keys
    i, seen = call.query.length, kept.spread(keys.length)
    seen = seen.expand(-1, i, -1) if seen.shape[1] == 1 else seen.repeat_interleave(kept.height, dim=1)[:, :i]
    seen = seen.unsqueeze(1)
    if not own:
        return replace(layer, context_attn_mask=_both(layer.context_attn_mask, seen))
    seen = seen | (keys.index == call.query.index.unsqueeze(-1))
    # a span and a memo of its own: other layers hide other keys
    call = replace(call, attn_mask=_both(call.attn_mask, seen), memo=call.memo.fork())
    return replace(layer, call=call, keys=replace(keys))


def _both(mask: Tensor | None, seen: Tensor) -> Tensor:
    """Return where a caller's mask, which recurrent memory may be missing in, and another one are True."""
    if mask is None:
        return seen
    mask = mask[(None,) * (4 - mask.ndim)]
    return pad_left(mask, seen.shape[-1] - mask.shape[-1], True) & seen


@dataclass(frozen=True, eq=False)
class _Gathered:
    """Self-attention to gathered keys, and of each query to its own key.

    The own keys differ from query to query, and kernels take one set of keys. One more key serves for all of them: its
    features are zeros and a one, queries have their own score as a further feature, and values have one that shows the
    weight of this key. Queries whose own key was drawn do not see it.
    """

    core: Attend
    gathered: Attend
    kept: Kept
    layer: LayerCall
    prefix: int
    causal: bool

    def run(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None) -> tuple[AttentionOutput, Visibility]:
        """Attend; for the arguments see `Attend.run`."""
        heads, width, prefix = q.shape[1], v.shape[-1], self.prefix
        at = self.layer.keys.find(self.layer.call.query.index) + prefix
        own_k, own_v = k.index_select(-2, at), v.index_select(-2, at)
        own_seen, drawn = self._own_seen(), self._own_drawn(at - prefix)
        apart = ~drawn if own_seen is None else own_seen & ~drawn
        score = (at_least_float32(q) * at_least_float32(expand_kv_heads(own_k, heads))).sum(dim=-1, keepdim=True)
        score = score.masked_fill(~apart, NEVER)
        # two features, so that half precision loses nothing
        coarse = score.to(q.dtype)
        features = [q, coarse, (score - coarse).to(q.dtype)]
        more, more_v = 2 + -(q.shape[-1] + 2) % 8, 1 + -(width + 1) % 8
        q = F.pad(torch.cat(features, dim=-1), (0, more - 2))
        k, v = _with_own(k, prefix, 2, more), _with_own(v, prefix, 1, more_v)
        if shown is not None:
            shown = F.pad(shown, (0, 1), value=True)
        seen = self._seen()
        result, _ = _run_gathered(self.gathered, self.kept, q, k, v, prefix + 1, shown, seen)
        out, weight = result.out[..., :width], result.out[..., width : width + 1]
        out = out + weight.masked_fill(~apart, 0.0) * expand_kv_heads(own_v, heads).to(out.dtype)
        return result._replace(out=out), Visibility(fully_masked=self._fully_masked(seen, own_seen, shown))

    def _own_seen(self) -> Tensor | None:
        """Return `(b, 1, i, 1)` bool, True where a query sees its own key; None if all do."""
        mask = self.layer.call.token_mask
        return None if mask is None else mask[:, None, :, None]

    def _own_drawn(self, at: Tensor) -> Tensor:
        """Return `(b, 1, i, 1)` bool, True where the own key, in the column `at`, was drawn for the query."""
        drawn, (_, blocks, _), height = (
            self.kept.spread(self.layer.keys.length),
            self.kept.columns.shape,
            self.kept.height,
        )
        columns = _in_blocks(at, blocks, height).clamp(min=0).expand(drawn.shape[0], -1, -1)
        return drawn.gather(-1, columns).flatten(1)[:, None, : at.shape[0], None]

    def _seen(self) -> Tensor | None:
        """Return `(b, blocks, 1|height, c)` bool, which of the gathered keys a query sees; None if it sees all."""
        call, keys, (columns, valid, height) = self.layer.call, self.layer.keys, self.kept
        blocks, window, ahead = columns.shape[1], self.core.window, self.core.ahead
        seen = None if valid is None else valid.unsqueeze(-2)
        if self.causal:
            of_q = _in_blocks(call.query.index, blocks, height).unsqueeze(-1)
            arrived = keys.index[columns].unsqueeze(-2) <= of_q
            seen = arrived if seen is None else seen & arrived
        if window is not None or ahead is not None:
            slots = (
                keys.slot.expand(columns.shape[0], -1).gather(-1, columns.flatten(1)).unflatten(-1, columns.shape[1:])
            )
            distance = _in_blocks(call.query.slot, blocks, height).unsqueeze(-1) - slots.unsqueeze(-2)
            near = torch.ones_like(distance, dtype=torch.bool) if window is None else distance <= window
            near = near if ahead is None else near & (distance >= -ahead)
            seen = near if seen is None else seen & near
        return seen

    def _fully_masked(self, seen: Tensor | None, own_seen: Tensor | None, shown: Tensor | None) -> Tensor | bool:
        """Return where a query sees no key; False if there is no such query."""
        if seen is None or own_seen is None or (self.prefix and shown is None):
            return False
        i = own_seen.shape[2]
        some = seen.any(dim=-1).expand(-1, -1, self.kept.height).flatten(1)[:, None, :i, None] | own_seen
        if shown is not None:
            some = some | shown[:, None, None, :-1].any(dim=-1, keepdim=True)
        return ~some


def _with_own(t: Tensor, prefix: int, ones: int, more: int) -> Tensor:
    """Add a row after the first `prefix` ones, and `more` features, which are zeros but for `ones` ones in that row."""
    front, rest = t[..., :prefix, :], t[..., prefix:, :]
    t = F.pad(torch.cat((front, torch.zeros_like(rest[..., :1, :]), rest), dim=-2), (0, more))
    row = F.pad(t.new_ones(1, ones), (t.shape[-1] - more, more - ones, prefix, rest.shape[-2]))
    return t + row


def _in_blocks(t: Tensor, blocks: int, height: int) -> Tensor:
    """Cut the last axis into blocks; the last one ends with copies of -1."""
    return F.pad(t, (0, blocks * height - t.shape[-1]), value=-1).unflatten(-1, (blocks, height))


def _run_gathered(
    core: Attend,
    kept: Kept,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: int,
    shown: Tensor | None,
    seen: Tensor | None,
) -> tuple[AttentionOutput, Visibility]:
    """Attend to gathered keys, the blocks of queries as rows.

    Args:
        core: without causality and window.
        kept: which keys.
        q, k, v, prefix, shown: as in `Attend.run`.
        seen: `(b, blocks, 1|height, c)` bool, or `(b, blocks, c)` for all queries of a block; None for all.
    """
    (b, blocks, count), i, height = kept.columns.shape, q.shape[-2], kept.height
    if seen is not None:
        seen = (seen.unsqueeze(-2) if seen.ndim == 3 else seen).flatten(0, 1).unsqueeze(1)
    if blocks > 1:
        q = F.pad(q, (0, 0, 0, blocks * height - i)).unflatten(-2, (blocks, height)).transpose(1, 2).flatten(0, 1)
        shown = None if shown is None else shown.repeat_interleave(blocks, dim=0)
    k, v = (_gather(t, kept.columns, prefix) for t in (k, v))
    places, queries = torch.arange(count, device=q.device), torch.arange(height, device=q.device)
    query, keys = Span(queries, queries[None], queries[None]), Span(places, places[None], places[None])
    call = Call(query, query, False, aligned=False, capture=Capture(), memo=Memo())
    layer = LayerCall(call, keys, keys, carry=Carry(), deltas=Deltas(), causal=False, context_attn_mask=seen)
    result, visible = core.run(q, k, v, q, layer, own=False, prefix=prefix, shown=shown)
    if blocks > 1:
        out = result.out.unflatten(0, (b, blocks)).transpose(1, 2).flatten(2, 3)[..., :i, :]
        result = result._replace(out=out)
    return result, visible


def _gather(t: Tensor, columns: Tensor, prefix: int) -> Tensor:
    """Return `(b * blocks, g, P + c, d)` of `(b, g, P + j, d)`: the keys or values in front, and the kept ones."""
    (b, blocks, count), g = columns.shape, t.shape[1]
    rest = t[..., prefix:, :].transpose(1, 2)
    first = torch.arange(b, device=t.device)[:, None, None] * rest.shape[1]
    # whole rows by one index: their gradients are added row by row
    kept = rest.flatten(0, 1).index_select(0, (columns + first).flatten())
    kept = kept.view(b * blocks, count, g, t.shape[-1]).transpose(1, 2)
    if not prefix:
        return kept
    return torch.cat((t[..., :prefix, :].repeat_interleave(blocks, dim=0), kept), dim=-2)


FEATURE = Feature(
    name="key_subsampling",
    group="attn",
    slot="subsampling",
    options=SubsamplingOptions,
    enabled=lambda options: options.subsample_keys is not None,
    summary="in training, a random share of the keys",
    paper="2306.01705",
    self_attention_only=True,
    unpackable="`subsample_keys` draws a share of the keys of a row, not of each document",
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention and o["key_subsampling"].subsample_local is not None,
            why="`subsample_local` keeps keys by their distance, and in cross-attention keys are in another sequence; "
            "drop it there.",
        ),
    ),
    examples=(
        {"attn_subsample_keys": 0.5, "rotary_pos_emb": True},
        {"attn_subsample_keys": 0.4, "attn_subsample_local": 3, "attn_num_mem_kv": 1},
        {"attn_subsample_keys": 0.5, "alibi_pos_bias": True},
        {"cross_attend": True, "cross_attn_subsample_keys": 0.5},
    ),
)
