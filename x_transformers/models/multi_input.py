"""A stack over several aligned streams of token ids, whose embeddings are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_ids
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.base import Model
from x_transformers.models.embeddings import build_embedding_norm, checked_ids
from x_transformers.models.heads import LinearNoBias
from x_transformers.models.inputs import ModelInputs, TokenSpan, z_loss_weight
from x_transformers.models.options.base import check_size
from x_transformers.models.options.catalog import MULTI_INPUT
from x_transformers.models.options.reading import read_options, show_options
from x_transformers.models.requested_outputs import with_requested
from x_transformers.options.signatures import shows_keywords_of


class MultiInputTransformerWrapper(Model):
    """Aligned streams of token ids to logits for each of them.

    Args:
        num_tokens: name of each stream -> size of its vocabulary.
        max_seq_len: length of the absolute position table; 0 for none and no limit.
        attn_layers: the stack.
        keywords: see below.

    Raises:
        ConfigError: listing every keyword that is unknown, wrong or in conflict, and what to change.
    """

    def __init__(
        self,
        *,
        num_tokens: Mapping[str, int] | None = None,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        **keywords: Any,
    ) -> None:
        options = read_options(type(self), MULTI_INPUT, attn_layers, keywords, max_seq_len=max_seq_len)
        check_size("max_seq_len", max_seq_len, least=0)
        sizes = _check_streams(num_tokens)
        dim = attn_layers.dim
        emb_dim = dim if options.emb_dim is None else options.emb_dim
        super().__init__(attn_layers, options, max_seq_len=max_seq_len, emb_dim=emb_dim)
        self.num_tokens = sizes
        self.embeds = nn.ModuleDict({f"{name}_embed": nn.Embedding(size, emb_dim) for name, size in sizes.items()})
        self.post_emb_norm = build_embedding_norm(options, emb_dim)
        self.to_logits = (
            None
            if options.return_only_embed
            else nn.ModuleDict({name: LinearNoBias(dim, size) for name, size in sizes.items()})
        )

    @shows_keywords_of(AttentionLayers.forward, but=("return_hiddens",))
    @checked
    @passes_on("attn_layers", but=("return_hiddens",))
    def forward(
        self,
        x: Mapping[str, Ids],
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        return_intermediates: bool = False,
        mask: Tensor | None = None,
        return_mems: bool = False,
        return_attn: bool = False,
        mems: Sequence[Tensor | None] | None = None,
        mem_masks: Sequence[Tensor | None] | None = None,
        pos: Tensor | None = None,
        prepend_embeds: Tensor | None = None,
        prepend_mask: Tensor | None = None,
        sum_embeds: Tensor | float | None = None,
        return_attn_z_loss: bool = False,
        attn_z_loss_weight: float | None = None,
        seq_start_pos: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        *,
        input_not_include_cache: bool = False,
        cache_age: int | None = None,
        capture: Capture | None = None,
        return_aux_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n)` token ids of each stream, by name. With a cache: the whole sequence, of which the tokens
                that are not cached run, or the new ones only (`input_not_include_cache`).
            return_embeddings: return features `(b, n, D)` instead of logits; return_logits_and_embeddings: both.
            return_intermediates: also return the `LayerIntermediates`, which a later call takes as `cache`.
            mask: `(b, n)` bool, valid positions; with a cache it covers cached and new ones.
            return_mems, mems, mem_masks: recurrent memory, a `(b, m, D)` tensor for each self-attention, detached.
            return_attn: also return the attention weights, `(b, h, i, j)` for each attention.
            pos: `(n,)` or `(b, n)` integer positions, or a floating tensor added instead of position embeddings.
            prepend_embeds, prepend_mask: `(b, p, E)` embeddings before the tokens, and their `(b, p)` mask. Their
                outputs come before the others'.
            sum_embeds: `(b, n, E)` or what broadcasts to it, added to the token embeddings.
            return_attn_z_loss, attn_z_loss_weight: fill `attn_z_loss` of the intermediates, and return them.
            return_aux_loss: return the intermediates too, with `aux_loss`, the losses of experts.
            seq_start_pos: `(b,)` number of positions of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            capture: what the stack records, instead of what `return_intermediates` implies.
            kwargs: of the stack; see `TransformerWrapper.forward`.

        Returns:
            Name -> logits `(b, p + n, v)`. Together with them what was requested: intermediates, or else memories, or
            else attention weights.

        Raises:
            InputError: with what was given and what is needed.
        """
        if return_logits_and_embeddings and self.to_logits is None:
            raise InputError("this model has no heads (`return_only_embed`); logits cannot be returned.")
        attn_z_loss_weight = z_loss_weight(self.attn_z_loss_weight, return_attn_z_loss, attn_z_loss_weight)
        inputs = ModelInputs(
            stack=kwargs,
            mask=mask,
            pos=pos,
            seq_start_pos=seq_start_pos,
            sum_embeds=sum_embeds,
            prepend_embeds=prepend_embeds,
            prepend_mask=prepend_mask,
            mems=mems,
            mem_masks=mem_masks,
            cache=cache,
            input_not_include_cache=input_not_include_cache,
            cache_age=cache_age,
            return_intermediates=return_intermediates,
            return_mems=return_mems,
            return_attn=return_attn,
            z_loss_weight=attn_z_loss_weight,
            return_aux_loss=return_aux_loss,
            capture=capture,
        )
        x, n = self._checked_input(x)
        span = self._token_span(n, inputs)
        embeds = self._add_positions(self._embed(x, span), inputs, span)
        features, record, _ = self._run_stack(embeds, inputs, span)
        out: Any = features
        if self.to_logits is not None and (return_logits_and_embeddings or not return_embeddings):
            logits = {name: head(features) for name, head in self.to_logits.items()}
            out = (logits, features) if return_logits_and_embeddings else logits
        return out if record is None else with_requested(out, record, inputs)

    def _checked_input(self, x: Mapping[str, Ids]) -> tuple[dict[str, Tensor], int]:
        """Return the streams, of an integer type, and their length."""
        if not isinstance(x, Mapping) or set(x) != set(self.num_tokens):
            found = sorted(x) if isinstance(x, Mapping) else f"a {type(x).__name__}"
            raise InputError(f"x is {found}; this model reads a dict of the streams {sorted(self.num_tokens)}.")
        given = {name: as_ids(ids, self, f"`x[{name!r}]`") for name, ids in x.items()}
        shapes = {name: tuple(ids.shape) for name, ids in given.items()}
        first = next(iter(shapes.values()))
        # sizes may be symbols of a graph, which cannot be members of a set
        if any(shape != first for shape in shapes.values()):
            raise ShapeError(f"the streams have shapes {shapes}; they must be the same.")
        streams = {name: checked_ids(ids, self) for name, ids in given.items()}
        return streams, next(iter(streams.values())).shape[1]

    def _embed(self, x: Mapping[str, Tensor], span: TokenSpan) -> Tensor:
        """Return the sum of the streams' embeddings, `(b, n, E)`."""
        total: Any = 0.0
        for name, size in self.num_tokens.items():
            ids = span.newest(x[name], 1).long()
            try:
                total = total + self.embeds[f"{name}_embed"](ids)
            except IndexError as error:
                raise TokenRangeError(
                    f"ids of `{name}` run from {int(ids.min())} to {int(ids.max())}; its vocabulary runs from 0 to "
                    f"{size - 1}."
                ) from error
        return total


def _check_streams(num_tokens: Mapping[str, int] | None) -> dict[str, int]:
    if not isinstance(num_tokens, Mapping) or not num_tokens:
        raise ConfigError(f"`num_tokens` is {num_tokens!r}; it must name at least one stream and its vocabulary.")
    for name, size in num_tokens.items():
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ConfigError(f"`num_tokens` names a stream {name!r}, which cannot name a module; choose another name.")
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"`num_tokens` gives {name!r} the vocabulary {size!r}; it must be at least 1.")
    return dict(num_tokens)


show_options(MultiInputTransformerWrapper, MULTI_INPUT)
