"""From the input of an attention to queries, keys and values by heads, with the keys of caches and memories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.base import (
    AttentionShape,
    KeyMod,
    Part,
    QKNorm,
    QKTransform,
    Slot,
    ValueContext,
    ValueMod,
)
from x_transformers.attention.keys.additional import join_additional
from x_transformers.attention.latent import LatentKeysValues
from x_transformers.attention.projections import Projections
from x_transformers.attention.qk.decay import Decay
from x_transformers.attention.switch_head import HeadSwitch, Selections
from x_transformers.attention.values.residual import ValueMix, mix_values
from x_transformers.cache import Shape
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import LayerCall, Span
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.ops import split_heads
from x_transformers.routing.base import Routing


class Heads(NamedTuple):
    """Queries, keys and values of one pass.

    Attributes:
        q: `(b, h, i, d)`.
        k, v: `(b, g, j, d)` and `(b, g, j, e)`, those of the cache and of recurrent memory included.
        projected: `(b, g, new keys, e)` the values as they were projected.
        fresh: keys, before rotation, and values of this pass without recurrent memory; None for a cached context.
        decay: of the scores with distance, which queries and keys do not contain yet; None if there is none.
        chosen: matrices that tokens chose for the maps of heads; None if each map has one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    projected: Tensor
    fresh: tuple[Tensor, Tensor] | None
    decay: Decay | None = None
    chosen: Selections | None = None


class HeadProjection(nn.Module):
    """Abstract base class of `Attention`: what happens to queries, keys and values around the attention itself.

    Attributes:
        shape: widths and numbers of heads.
        unrotated_heads: numbers of query and key heads, from the first on, that are not rotated; None if all are.
        latent_q, latent_kv: projections to narrow latents, or None.
        latent_q_norm: norm of the latent of queries, or None.
        projections: the maps to queries, keys and values.
        switch: choice of matrices of the maps of heads, or None if each has one.
        qk_norms, keys, values: parts by slot.
        value_mix: learned share of the first layer's values, or None.
    """

    shape: AttentionShape
    unrotated_heads: tuple[int, int] | None
    latent_q: nn.Linear | None
    latent_q_norm: nn.Module | None
    latent_kv: LatentKeysValues | None
    projections: Projections
    switch: HeadSwitch | None
    qk_norms: Slot[QKNorm]
    keys: Slot[KeyMod]
    values: Slot[ValueMod]
    value_mix: ValueMix | None
    leaves_values: bool
    leaves_scores: bool

    @property
    def heads(self) -> int:
        return self.shape.heads

    @property
    def kv_heads(self) -> int:
        return self.shape.kv_heads

    @property
    def has_aux_loss(self) -> bool:
        """True if the choice of matrices has a loss."""
        return self.switch is not None and self.switch.loss_weights.any

    def parts(self) -> dict[str, Part]:
        """Return the parts that may declare streams, causality and entries of checkpoints, by their path."""
        raise NotImplementedError

    def cache_streams(self, rotations: Sequence[QKTransform] = ()) -> dict[str, Shape]:
        """Return the streams that grow with the sequence, as `{name: (heads, width)}`.

        Args:
            rotations: the stack's transforms, which may change the width of keys.
        """
        shape, width = self.shape, self.shape.dim_head
        for transform in rotations:
            width = transform.width(width)
        streams: dict[str, Shape] = {"k": (shape.kv_heads, width), "v": (shape.kv_heads, shape.value_dim_head)}
        if self.latent_kv is not None:
            streams = self.latent_kv.cache_streams()
            if self.value_mix is not None:
                streams["value_mix"] = (shape.kv_heads, 1)
        for part in self.parts().values():
            streams.update(part.cache_streams(shape))
        return streams

    def project_heads(self, xq: Tensor, xk: Tensor, xv: Tensor, layer: LayerCall) -> Heads:
        """Project, normalize and rotate queries, keys and values, and append the new keys to the cache.

        Args:
            xq, xk, xv: `(b, n, D)` inputs of queries, keys and values, usually one and the same.
            layer: the sublayer's call.
        """
        own, entry, projections = layer.context is None, layer.entry, self.projections
        norms: Iterable[QKNorm] = self.qk_norms
        if not own and entry is not None and entry.get("k") is not None:
            return self._query_cached_context(xq, layer)
        span, deltas, chosen = layer.fresh, layer.deltas, None
        if not own or layer.kv_residual is not None or layer.memory is not None:
            xk, xv = _sources(xk, xv, layer)
        if self.latent_q is self.latent_kv is self.switch is None and deltas.q is deltas.k is deltas.v is None:
            # every plain pass goes through here, so that heads are split without further Python calls
            h, g, merged, one = projections.heads, projections.kv_heads, projections.ready, xk is xq and xv is xq
            if merged is not None and one:
                q, k, raw = split_heads(F.linear(xq, *merged), h + 2 * g).split_with_sizes((h, g, g), -3)
            elif one and torch.is_grad_enabled() and (joint := self._project_jointly(xq)) is not None:
                (q, k, raw), norms = joint
            else:
                assert projections.k is not None
                q, k, raw = projections.q(xq), projections.k(xk), projections.v(xv)
                (b, i, of_q), (c, j, of_k), e = q.shape, k.shape, raw.shape[2] // g
                d = of_k // g
                # the axes of a single token need not be exchanged; -1 would be ambiguous in a batch of no rows
                q = q.view(b, h, 1, of_q // h) if i == 1 else q.view(b, i, h, of_q // h).transpose(1, 2)
                if j == 1:
                    k, raw = k.view(c, g, 1, d), raw.view(c, g, 1, e)
                else:
                    k, raw = k.view(c, j, g, d).transpose(1, 2), raw.view(c, j, g, e).transpose(1, 2)
        else:
            chosen = None if self.switch is None else self.switch(xq, xv, layer)
            of_values, of_outputs = (None, None) if chosen is None else (chosen.values, chosen.outputs)
            q = projections.queries(self._query_input(xq), deltas.q, of_outputs)
            k, raw, span = self._keys_values(xk, xv, layer, of_values)
        if projections.clip is not None:
            q, k, raw = projections.clipped(q, k, raw)
        # norms before rotations: a norm with a factor per feature would not commute with a rotation
        for norm in norms:
            q, k = norm.normalize_q(q), norm.normalize_k(k)
        v = self._mix_values(raw, xq, layer) if layer.carry.values else raw
        for mod in self.values:
            v = mod.project(v, xq, layer)
        m = 0 if layer.memory is None else layer.memory.shape[-2]
        fresh = (k[..., m:, :], v[..., m:, :]) if m > 0 else (k, v)
        if layer.rotations:
            q, k = self._rotate(q, k, layer, span)
        if entry is not None and own and self.latent_kv is None:
            k, v = append("k", k, layer), append("v", v, layer)
        elif entry is not None and not own:
            entry.put("k", k)
            entry.put("v", v)
        # the first one rotates, if any does
        if layer.rotations and layer.rotations[0].decays:
            return Heads(q, k, v, raw, fresh, self._decay(layer), chosen)
        return Heads(q, k, v, raw, fresh, None, chosen)

    def remember(self, x: Tensor, layer: LayerCall) -> Intermediates | None:
        """Append the keys and values of tokens to the cache, without attention; see `BranchFunction.remember`.

        Args:
            x: `(b, n, D)` normalized input.
            layer: the sublayer's call.
        """
        if layer.entry is None or layer.context is not None or self.leaves_values or self.leaves_scores:
            return None
        # parts append to streams of their own while they attend
        if any(part.cache_streams(self.shape) for part in self.parts().values()):
            return None
        chosen = self.project_heads(x, x, x, layer).chosen
        routing = () if chosen is None else chosen.records
        return Intermediates(layer_type=layer.kind, entry=layer.entry, routing=routing)

    def _project_jointly(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[QKNorm, ...]] | None:
        """Project to heads by one product, in training; also return the norms that they still need."""
        norms = tuple(norm for norm in self.qk_norms)  # PyTorch 2.6 makes no tuple of a module in strict exports
        together = norms[0].joint() if len(norms) == 1 else None
        heads = self.projections.joint(x, together)
        return None if heads is None else (heads, norms if together is None else ())

    def _query_input(self, x: Tensor) -> Tensor:
        """Return what queries are projected from: the input, or its latent."""
        if self.latent_q is None:
            return x
        latent = self.latent_q(x)
        return latent if self.latent_q_norm is None else self.latent_q_norm(latent)

    def _query_cached_context(self, x: Tensor, layer: LayerCall) -> Heads:
        """Project the queries only: the keys and values of the context come from an earlier pass."""
        k, v = layer.entry.get("k"), layer.entry.get("v")
        chosen = None if self.switch is None else self.switch(x, None, layer)
        of_outputs = None if chosen is None else chosen.outputs
        q = self.projections.queries(self._query_input(x), layer.deltas.q, of_outputs)
        if self.projections.clip is not None:
            (q,) = self.projections.clipped(q)
        for norm in self.qk_norms:
            q = norm.normalize_q(q)
        # cached keys are rotated already: with no keys at all, the transforms act on the queries only
        q, _ = self._rotate(q, k[..., :0, :], layer, layer.fresh.first(0))
        return Heads(q, k, v, v, None, self._decay(layer), chosen)

    def _keys_values(
        self, xk: Tensor, xv: Tensor, layer: LayerCall, chosen: Routing | None
    ) -> tuple[Tensor, Tensor, Span]:
        """Project keys and values, perhaps by way of a latent; also return where the keys are."""
        span, deltas = layer.fresh, layer.deltas
        if self.latent_kv is None:
            k, v = self.projections.keys_values(xk, xv, deltas.k, deltas.v, chosen)
            assert k is not None
            return k, v, span
        streams = self.latent_kv(xk)
        if layer.context is None:
            # the latent is what is cached, so that keys of every token are projected and rotated again in each pass
            streams, span = {name: append(name, t, layer) for name, t in streams.items()}, layer.keys
        latent = streams["latent"].squeeze(1)
        k, v = self.projections.keys_values(latent, latent, deltas.k, deltas.v)
        return self.latent_kv.join_keys(k, streams), v, span

    def _rotate(self, q: Tensor, k: Tensor, layer: LayerCall, keys: Span) -> tuple[Tensor, Tensor]:
        """Transform by positions: all heads, or the last ones."""
        for transform in layer.rotations:
            tables = layer.call.tables(transform, keys)
            if self.unrotated_heads is None:
                q, k = transform.apply_tables(q, k, tables)
                continue
            fixed_q, fixed_k = self.unrotated_heads
            if layer.entry is not None:
                layer.entry.unrotated = fixed_k
            rotated_q, rotated_k = transform.apply_tables(q[:, fixed_q:], k[:, fixed_k:], tables)
            q, k = torch.cat((q[:, :fixed_q], rotated_q), dim=1), torch.cat((k[:, :fixed_k], rotated_k), dim=1)
        return q, k

    def _decay(self, layer: LayerCall) -> Decay | None:
        """Return the decay of the scores with distance, if rotations have one."""
        fixed = 0 if self.unrotated_heads is None else self.unrotated_heads[0]
        found = [each.decay(layer, self.shape.heads, fixed) for each in layer.rotations if each.decays]
        return found[0] if found else None

    def _mix_values(self, v: Tensor, x: Tensor, layer: LayerCall) -> Tensor:
        """Mix in the values of the first layer of this kind, if there are any."""
        first = layer.carry.values.get(layer.kind)
        if first is None:
            return v
        if self.value_mix is None:
            return mix_values(v, first, 0.5)
        if layer.context is not None:
            raise InputError(
                "`learned_value_residual_mix` computes a share for each token's own values, and in cross-attention "
                "tokens have none; drop it there."
            )
        share = self.value_mix(layer.with_memory(x))
        # the values of cached tokens are projected again from their latents, and mixed in their old shares
        return mix_values(v, first, share if self.latent_kv is None else append("value_mix", share, layer))

    def extend_keys(self, k: Tensor, v: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """Add the keys and values before those of the tokens, and change the values before attention.

        From the left: zeros, those of the caller, learned ones.

        Args:
            k, v: `(b, g, j, d)` and `(b, g, j, e)`, those of the cache included.
            layer: the sublayer's call.

        Returns:
            keys and values, how many were added, and a mask `(b, P)` of the visible ones; None if all are.
        """
        # Value modifications act between the two loops: on learned and given values, but not on the zeros, which must
        # stay zero (LASER, for example, would make them exp(0)).
        prefix, shown, leading = 0, None, 0
        for mod in self.keys:
            prefix += mod.count
            if not mod.is_zero:
                k, v = mod.extend(k, v, self._normalize_memory)
        if layer.additional is not None:
            k, v = join_additional(k, v, *layer.additional, heads=self.shape.heads)
            prefix += layer.additional[0].shape[-2]
        for mod in self.values:
            v = mod.prepare_values(v)
        for mod in self.keys:
            if mod.is_zero:
                k, v = mod.extend(k, v, self._normalize_memory)
                leading += mod.count
        if layer.additional is not None and layer.additional_mask is not None:
            # the caller's keys are in the middle of the prefix, between zeros and learned keys, which are always
            # visible
            learned = prefix - leading - layer.additional_mask.shape[-1]
            shown = F.pad(layer.additional_mask, (leading, learned), value=True)
        return k, v, prefix, shown

    def _normalize_memory(self, k: Tensor) -> Tensor:
        for norm in self.qk_norms:
            k = norm.normalize_memory(k)
        return k

    def change_output(
        self, out: Tensor, x: Tensor, projected: Tensor, fully_masked: Tensor | None, layer: LayerCall
    ) -> Tensor:
        """Apply value modifications and the caller's delta to the heads' outputs.

        Args:
            out: `(b, h, n, e)` outputs of attention.
            x: `(b, n, D)` input of the queries.
            projected: `(b, g, new keys, e)` values as they were projected.
            fully_masked: True where a query saw no key, see `ValueContext`; None if there is no such query.
            layer: the sublayer's call.

        Returns:
            `(b, h, n, e)`.
        """
        n = x.shape[-2]
        own = projected[..., projected.shape[-2] - n :, :]
        if self.latent_kv is not None and layer.context is None:
            # from latents the values of all tokens are projected, and in a ring the newest ones are not the last
            own = projected.index_select(-2, layer.keys.find(layer.call.query.index))
        seen = ValueContext(x, own, fully_masked, layer)
        for mod in self.values:
            out = out if mod.acts_last else mod.change_output(out, seen)
        if layer.deltas.out is not None:
            out = out + split_heads(layer.deltas.out, self.shape.heads).to(out.dtype)
        for mod in self.values:
            out = mod.change_output(out, seen) if mod.acts_last else out
        return out


def _sources(xk: Tensor, xv: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor]:
    """Return the inputs of keys and values: the tokens or a context, with recurrent memory before them."""
    if layer.context is not None:
        xk = xv = layer.context
    if layer.kv_residual is not None:
        xk, xv = xk + layer.kv_residual, xv + layer.kv_residual
    if layer.memory is not None:
        # with four axes, `(3, b, m, D)`, memory has inputs of queries, keys and values; the last two are needed
        mk, mv = (layer.memory, layer.memory) if layer.memory.ndim == 3 else layer.memory[-2:].unbind(0)
        xk, xv = torch.cat((mk, xk), dim=-2), torch.cat((mv, xv), dim=-2)
    return xk, xv


def append(name: str, t: Tensor, layer: LayerCall) -> Tensor:
    """Append new tokens `(..., n, d)` to a stream of the cache and return all of it.

    Recurrent memory, which comes first in `t`, is not cached and stays first.
    """
    if layer.entry is None:
        return t
    if layer.memory is None:
        return layer.entry.grow(name, t)
    m = layer.memory.shape[-2]
    return torch.cat((t[..., :m, :], layer.entry.grow(name, t[..., m:, :])), dim=-2)
