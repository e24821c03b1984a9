"""A stack between token embeddings and logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.attention_pool import AttentionPool
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.base import Model, given, valid_tokens
from x_transformers.models.embeddings import (
    AbsolutePositionalEmbedding,
    TokenEmbedding,
    check_ids,
    frac_gradient,
)
from x_transformers.models.heads import (
    Heads,
    LinearNoBias,
    MixtureOfSoftmax,
    TiedLogits,
    each_head,
    next_embedding_head,
    sigsoftmax,
)
from x_transformers.models.options import check_options
from x_transformers.models.requested_outputs import RequestedOutputs, calc_entropy
from x_transformers.models.tokens import Tokens
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.state_dict import rename
from x_transformers.ops import masked_mean


class TransformerWrapper(Model):
    """Token ids to logits, through a stack.

    Args:
        num_tokens: vocabulary.
        max_seq_len: length of the absolute position table; 0 means none and no limit.
        attn_layers: the stack.
        embed_num_tokens: further id embeddings, name -> vocabulary (`embed_ids` of a pass).
        emb_dim: width of the embeddings; default the stack's, else a linear map leads there.
        max_mem_len: positions of recurrent memory to keep (1901.02860).
        shift_mem_down: layer i reads the memory of layer i + shift (2012.15688).
        emb_dropout: dropout of the embedded sequence.
        post_emb_norm: LayerNorm behind the embeddings.
        num_memory_tokens: learned tokens in front (2006.11527).
        memory_tokens_interspersed_every: put them in front of every group of that many positions; causal stacks.
        tie_embedding: logits from the token table. tie_embedding_scale: their factor; default `dim ** -0.5`.
        logits_dim: width of the logits; default `num_tokens`.
        return_only_embed: no head; a pass returns features.
        num_output_heads: several heads; logits are a tuple of as many.
        use_abs_pos_emb: absolute positions, unless the stack has rotary positions or T5's bias.
        scaled_sinu_pos_emb: sinusoids with a learned scale in place of the table.
        l2norm_embed: embeddings of unit length with a tiny initialisation.
        recycling: the stack runs several times, and reads `R y` of its own output y beside its input, as AlphaFold 2
            does. Only the last time has gradients.
        train_max_recycle_steps: in training a pass draws how often, from 1 to this; in evaluation it is the default.
        looped, max_looped_steps: not available in this version.
        emb_frac_gradient: fraction of the gradient that reaches the embeddings (2105.13290).
        attn_z_loss_weight: default of the argument of a pass.
        average_pool_embed: the features are the mean over the tokens, `(b, D)`.
        use_cls_token, num_cls_tokens: learned class tokens in front; the features are theirs, `(b, D)` or `(b, c, D)`.
        attn_pool: learned queries read the tokens' features (1810.00825). The output of an encoder is what they pool.
        num_pooled_tokens, attn_pool_depth, dim_pooled_tokens: queries, blocks and width (default the stack's) of it.
        squeeze_out_last_dim: drop the logits' last axis if it has size 1.
        token_emb: this module in place of a new `TokenEmbedding`; its weights are left alone.
        mixture_of_softmax, mixture_of_softmax_k: logits are log-probabilities of a mixture of k softmaxes (1711.03953).
        sigsoftmax_logits: `z + log sigmoid(z)` in place of logits z (1805.10829).
        ff_deep_embed: each token has a learned factor per channel on the output of each of the first `depth`
            feedforwards that run (of all, if fewer run).
        to_logits: this module in place of a new head.
        add_continuous_pred_head: a second head predicts the next token's embedding.
        input_not_include_cache: default of the argument of a pass.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        embed_num_tokens: Mapping[str, int] | None = None,
        emb_dim: int | None = None,
        max_mem_len: int = 0,
        shift_mem_down: int = 0,
        emb_dropout: float = 0.0,
        post_emb_norm: bool = False,
        num_memory_tokens: int | None = None,
        memory_tokens_interspersed_every: int | None = None,
        tie_embedding: bool = False,
        tie_embedding_scale: float | None = None,
        logits_dim: int | None = None,
        return_only_embed: bool = False,
        num_output_heads: int = 1,
        use_abs_pos_emb: bool = True,
        scaled_sinu_pos_emb: bool = False,
        l2norm_embed: bool = False,
        recycling: bool = False,
        train_max_recycle_steps: int = 4,
        looped: bool = False,
        max_looped_steps: int = 4,
        emb_frac_gradient: float = 1.0,
        attn_z_loss_weight: float = 1e-4,
        average_pool_embed: bool = False,
        use_cls_token: bool = False,
        num_cls_tokens: int = 1,
        attn_pool: bool = False,
        num_pooled_tokens: int = 1,
        attn_pool_depth: int = 1,
        dim_pooled_tokens: int | None = None,
        squeeze_out_last_dim: bool = False,
        token_emb: nn.Module | None = None,
        mixture_of_softmax: bool = False,
        mixture_of_softmax_k: int = 4,
        sigsoftmax_logits: bool = False,
        ff_deep_embed: bool = False,
        to_logits: nn.Module | None = None,
        add_continuous_pred_head: bool = False,
        input_not_include_cache: bool = False,
    ) -> None:
        check_options(locals())
        dim = attn_layers.dim
        emb_dim = dim if emb_dim is None else emb_dim
        super().__init__(
            attn_layers,
            max_seq_len=max_seq_len,
            emb_dim=emb_dim,
            use_abs_pos_emb=use_abs_pos_emb,
            scaled_sinu_pos_emb=scaled_sinu_pos_emb,
            l2norm_embed=l2norm_embed,
            max_mem_len=max_mem_len,
            shift_mem_down=shift_mem_down,
            emb_dropout=emb_dropout,
            num_memory_tokens=num_memory_tokens,
            memory_tokens_interspersed_every=memory_tokens_interspersed_every,
            num_cls_tokens=num_cls_tokens if use_cls_token else 0,
            attn_z_loss_weight=attn_z_loss_weight,
        )
        self.num_tokens, self.emb_frac_gradient = num_tokens, emb_frac_gradient
        self.l2norm_embed, self.squeeze_out_last_dim = l2norm_embed, squeeze_out_last_dim
        self.input_not_include_cache = input_not_include_cache
        self.average_pool_embed, self.sigsoftmax_logits = average_pool_embed, sigsoftmax_logits
        self.recycling, self.train_max_recycle_steps = recycling, train_max_recycle_steps
        self.has_multiple_heads = num_output_heads > 1
        self.output_is_log_prob = mixture_of_softmax
        self.add_continuous_pred_head = add_continuous_pred_head

        self.own_token_emb = token_emb is None
        self.token_emb = token_emb if token_emb is not None else TokenEmbedding(emb_dim, num_tokens, l2norm_embed)
        self.embeds = nn.ModuleDict(
            {f"{name}_embed": nn.Embedding(size, emb_dim) for name, size in (embed_num_tokens or {}).items()}
        )
        self.embedded = frozenset(embed_num_tokens or ())
        self.post_emb_norm = LayerNorm(emb_dim) if post_emb_norm else None
        self.init_()
        deep = min(attn_layers.depth, attn_layers.sequence.count("f", attn_layers.sequence.order))
        self.ff_deep_embed = nn.Parameter(torch.ones(num_tokens, deep, dim)) if ff_deep_embed else None
        self.recycled_proj = LinearNoBias(dim, dim) if recycling else None
        self.cls_token = nn.Parameter(torch.randn(num_cls_tokens, dim) * 0.02) if use_cls_token else None
        self.attn_pool = None
        if attn_pool:
            self.attn_pool = AttentionPool(
                dim=dim if dim_pooled_tokens is None else dim_pooled_tokens,
                num_pooled_tokens=num_pooled_tokens,
                dim_context=dim,
                depth=attn_pool_depth,
                heads=attn_layers.attn_heads,
                dim_head=attn_layers.attn_dim_head,
            )
        self.mixture = MixtureOfSoftmax(dim, mixture_of_softmax_k) if mixture_of_softmax else None
        self.to_logits: nn.Module | None = None
        if not return_only_embed:
            width = num_tokens if logits_dim is None else logits_dim
            if tie_embedding:
                assert isinstance(self.token_emb, TokenEmbedding)
                scale = dim**-0.5 if tie_embedding_scale is None else tie_embedding_scale
                self.to_logits = TiedLogits(self.token_emb, scale)
            elif to_logits is not None:
                self.to_logits = to_logits
            else:
                several = self.has_multiple_heads
                self.to_logits = Heads(num_output_heads, dim, width) if several else LinearNoBias(dim, width)
        self.own_to_logits = to_logits is None
        self.to_next_embed_pred = next_embedding_head(dim, emb_dim) if add_continuous_pred_head else None

    def init_(self) -> None:
        """Draw the token embeddings anew (and positions, where rows are normalised), but not a module passed in."""
        if self.own_token_emb:
            self.token_emb.init_()  # type: ignore[operator]
        if self.l2norm_embed and isinstance(self.pos_emb, AbsolutePositionalEmbedding):
            nn.init.normal_(self.pos_emb.emb.weight, std=1e-5)

    # what other code reads

    last_alone: ClassVar[Mapping[str, Any]] = {"logits_to_keep": 1}
    looped = False

    @property
    def can_cache_kv(self) -> bool:
        """Whether decoding may keep keys and values: where what is new does not change what came out before."""
        whole = self.average_pool_embed or self.num_cls_tokens or self.recycling
        return not whole and self.attn_layers.can_cache_kv

    @property
    def pools(self) -> bool:
        """Whether the features are of the whole sequence, in place of one for each token."""
        return self.average_pool_embed or self.num_cls_tokens > 0

    @property
    def returns_pooled(self) -> bool:
        """Whether a pass returns what an attention pool reads, in place of logits."""
        return self.attn_pool is not None and not self.attn_layers.causal

    # one pass

    def forward(
        self,
        x: Tensor | None,
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        return_intermediates: bool = False,
        return_embeddings_and_intermediates: bool = False,
        return_logit_entropies: bool = False,
        return_next_embed_pred: bool = False,
        mask: Tensor | None = None,
        return_mems: bool = False,
        return_attn: bool = False,
        mems: Sequence[Tensor | None] | None = None,
        mem_masks: Sequence[Tensor | None] | None = None,
        detach_mems: bool = True,
        recycle_steps: int | None = None,
        pos: Tensor | None = None,
        prepend_embeds: Tensor | None = None,
        prepend_mask: Tensor | None = None,
        excise_prepend_embeds: bool = False,
        embed_ids: Mapping[str, Tensor] | None = None,
        sum_embeds: Tensor | None = None,
        transform_token_embeds: Callable[[Tensor], Tensor] | None = None,
        return_attn_z_loss: bool = False,
        attn_z_loss_weight: float | None = None,
        seq_start_pos: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        input_not_include_cache: bool | None = None,
        cache_age: int | None = None,
        token_emb_kwargs: Mapping[str, Any] | None = None,
        to_logits_kwargs: Mapping[str, Any] | None = None,
        attn_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        self_attn_kv_mask: Tensor | None = None,
        *,
        logits_to_keep: int | None = None,
        capture: Capture | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n)` token ids; None stands for no tokens behind `prepend_embeds`. With a cache: the whole
                sequence, of which the tokens that are not cached run, or the new ones (`input_not_include_cache`).
            return_embeddings: features `(b, n, D)` in place of logits.
            return_logits_and_embeddings: both.
            return_intermediates: also the `LayerIntermediates`, which a later call takes as `cache`.
            return_embeddings_and_intermediates: features and intermediates.
            return_logit_entropies: fill `logit_entropies` of the intermediates, and return them.
            return_next_embed_pred: the output becomes `(output, (pred, initial_embeds))`, pred `(b, n, E)`.
            mask: `(b, n)` bool, valid tokens; with a cache it covers cached and new ones.
            return_mems, mems, mem_masks, detach_mems: recurrent memory, a `(b, m, D)` tensor for each self-attention.
            return_attn: also the attention weights, `(b, h, i, j)` for each attention.
            recycle_steps: how often a recycling model runs its stack.
            pos: `(n,)` or `(b, n)` integer positions, or a floating tensor added in place of position embeddings.
            prepend_embeds, prepend_mask: `(b, p, E)` embeddings before the tokens, and their `(b, p)` mask.
            excise_prepend_embeds: cut their positions off logits and features.
            embed_ids: name -> `(b, n)` ids of the further embeddings.
            sum_embeds: `(b, n, E)`, added to the token embeddings.
            transform_token_embeds: applied to the token embeddings before positions are added.
            return_attn_z_loss, attn_z_loss_weight: fill `attn_z_loss` of the intermediates, and return them.
            seq_start_pos: `(b,)` tokens of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            token_emb_kwargs, to_logits_kwargs: passed on to modules that were given as `token_emb` and `to_logits`.
            attn_mask, attn_bias, self_attn_kv_mask: of the stack, over tokens; slots around them are always seen.
            logits_to_keep: only the last so many positions get logits; None or 0: all.
            capture: what to keep of the stack for the caller, in place of what `return_intermediates` keeps.
            kwargs: of the stack: `context`, `context_mask`, `causal`, `condition`, `transform_block_inputs` and others.
                Those over tokens do not speak of memory tokens and prepended embeddings, which get zeros. What
                `transform_block_inputs` holds for block 1 is applied to the token embeddings, unless
                `transform_token_embeds` is given.

        Raises:
            InputError: with what was given and what is needed.
        """
        if return_embeddings_and_intermediates:
            return_embeddings = return_intermediates = True
        z_loss = None
        if return_attn_z_loss:
            z_loss = self.attn_z_loss_weight if attn_z_loss_weight is None else attn_z_loss_weight
        asked = RequestedOutputs(
            return_intermediates,
            return_mems,
            return_attn,
            z_loss,
            return_logit_entropies,
            capture,
            return_embeddings,
            return_logits_and_embeddings,
            return_next_embed_pred,
        )
        self._check_asked(asked, logits_to_keep)
        x = self._ids(x, prepend_embeds)
        only_new = self.input_not_include_cache if input_not_include_cache is None else input_not_include_cache
        tokens = self._tokens(x.shape[1], cache, prepend_embeds, only_new=only_new, age=cache_age)
        prepend_embeds = prepend_embeds if tokens.starts else None
        if kwargs:
            transform_token_embeds = _read_more(kwargs, transform_token_embeds)

        ids = tokens.newest(x, 1)
        embeds = self._embed(ids, token_emb_kwargs, transform_token_embeds)
        embeds, stack_pos = self._place(embeds, tokens, pos, seq_start_pos)
        embeds = self._add(embeds, tokens, embed_ids, sum_embeds)
        items, initial_embeds = self._items(embeds, prepend_embeds)

        arguments = given(
            kwargs,
            mask=mask,
            self_attn_kv_mask=self_attn_kv_mask,
            attn_mask=attn_mask,
            attn_bias=attn_bias,
            pos=stack_pos,
            mem_masks=mem_masks,
            deep_embeds_and_ids=self._deep_embeds(ids),
        )
        features, record = self._run(
            items,
            tokens,
            asked,
            arguments,
            seq_start_pos=seq_start_pos,
            prepend_mask=prepend_mask,
            mems=mems,
            detach_mems=detach_mems,
            recycling=self._recycling(recycle_steps),
        )

        valid = None
        if self.average_pool_embed or self.attn_pool is not None:
            valid = valid_tokens(tokens, len(ids), mask, seq_start_pos, ids.device)
        pooled = None
        if self.attn_pool is not None and tokens.kv is None and (self.returns_pooled or asked.intermediates):
            pooled = self._pooled(features, tokens, valid, prepend_mask)
        if record is not None:
            record.initial_embeds, record.last_layer_hiddens = initial_embeds, features[:, self.num_cls_tokens :]
            record.attn_pooled_tokens = pooled
        excised = tokens.leading if excise_prepend_embeds and tokens.kv is None else 0
        features = self._summary(features, tokens.leading, excised, valid)
        logits = self._logits(features, logits_to_keep, to_logits_kwargs) if self._reads_logits(asked) else None
        out = self._output(features, logits, pooled, record, asked)
        if self.to_next_embed_pred is not None and asked.next_embed:
            prepended = max(excised - self.num_cls_tokens, 0)
            out = (out, (self.to_next_embed_pred(features), initial_embeds[:, prepended:]))
        return asked.results(out, record)

    # its steps

    def _check_asked(self, asked: RequestedOutputs, logits_to_keep: int | None) -> None:
        if (asked.both or asked.entropies) and self.to_logits is None:
            raise InputError("this model has no head (`return_only_embed`); logits and entropies cannot be returned.")
        if asked.next_embed and self.to_next_embed_pred is None:
            raise InputError("this model does not predict embeddings; build it with `add_continuous_pred_head = True`.")
        if logits_to_keep and (self.pools or logits_to_keep < 0):
            raise InputError(
                f"`logits_to_keep` is {logits_to_keep}; it is how many of the last tokens get logits, at least 0, and "
                "needs a model that does not pool its features."
            )

    def _ids(self, x: Tensor | None, prepend_embeds: Tensor | None) -> Tensor:
        if x is not None:
            check_ids(x)
            return x
        if prepend_embeds is None:
            raise InputError("there is nothing to run: pass token ids, or `prepend_embeds`.")
        return torch.zeros(prepend_embeds.shape[0], 0, dtype=torch.long, device=prepend_embeds.device)

    def _embed(
        self, ids: Tensor, arguments: Mapping[str, Any] | None, transform: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """Token embeddings `(b, n, E)`."""
        if arguments and self.own_token_emb:
            raise InputError("`token_emb_kwargs` are for a module given as `token_emb`; this model made its own.")
        embeds = self.token_emb(ids, **(arguments or {}))
        return embeds if transform is None else transform(embeds)

    def _add(
        self, embeds: Tensor, tokens: Tokens, embed_ids: Mapping[str, Tensor] | None, sum_embeds: Tensor | None
    ) -> Tensor:
        """What is added to the token embeddings, and the norm behind it."""
        if embed_ids or self.embedded:
            if set(embed_ids or ()) != self.embedded:
                raise InputError(
                    f"`embed_ids` names {sorted(embed_ids or ())}; this model embeds {sorted(self.embedded)}."
                )
            for name, more in (embed_ids or {}).items():
                embeds = embeds + self.embeds[f"{name}_embed"](tokens.newest(more, -1))
        if sum_embeds is not None:
            embeds = embeds + (sum_embeds if sum_embeds.shape[-2] == 1 else tokens.newest(sum_embeds, -2))
        return embeds if self.post_emb_norm is None else self.post_emb_norm(embeds)

    def _items(self, embeds: Tensor, prepend_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(b, leading + n, D)` class tokens, prepended embeddings and tokens; and the embeddings, `(b, p + n, E)`."""
        if prepend_embeds is not None:
            embeds = torch.cat((self._check_prepended(prepend_embeds, embeds.shape[0]), embeds), dim=1)
        x = embeds = frac_gradient(embeds, self.emb_frac_gradient)
        if self.emb_dropout:
            x = F.dropout(x, self.emb_dropout, self.training)
        if self.project_emb is not None:
            x = self.project_emb(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        return x, embeds

    def _deep_embeds(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.ff_deep_embed is None else (self.ff_deep_embed, ids)

    def _recycling(self, steps: int | None) -> tuple[int, nn.Module] | None:
        """How often the stack runs, if that is more than once or can be, and the way back to its input."""
        if self.recycled_proj is None:
            if steps is not None:
                raise InputError("`recycle_steps` is for a recycling model; build it with `recycling = True`.")
            return None
        if steps is None:
            most = self.train_max_recycle_steps
            steps = int(torch.randint(1, most + 1, ())) if self.training else most
        if steps < 1:
            raise InputError(f"`recycle_steps` is {steps}; the stack must run at least once.")
        return steps, self.recycled_proj

    def _pooled(self, features: Tensor, tokens: Tokens, valid: Tensor | None, prepend_mask: Tensor | None) -> Tensor:
        """What the attention pool reads of prepended embeddings and tokens, those that are valid."""
        assert self.attn_pool is not None
        keys = None
        if valid is not None or prepend_mask is not None:
            ones = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
            before = ones[:, : tokens.leading] if prepend_mask is None else prepend_mask.bool()
            keys = torch.cat((before, ones[:, tokens.leading :] if valid is None else valid), dim=-1)
        return self.attn_pool(features, keys)

    def _summary(self, features: Tensor, leading: int, excised: int, valid: Tensor | None) -> Tensor:
        """What the heads read: the class tokens, the mean over the tokens, or each place of its own."""
        if self.num_cls_tokens:
            classes = features[:, : self.num_cls_tokens]
            return classes[:, 0] if self.num_cls_tokens == 1 else classes
        if self.average_pool_embed:
            return masked_mean(features[:, leading:], valid)
        return features[:, excised:] if excised else features

    def _reads_logits(self, asked: RequestedOutputs) -> bool:
        """Whether logits are asked for, as the output, beside it, or in the record."""
        if self.to_logits is None:
            return False
        return asked.both or asked.entropies or not (asked.features or (self.returns_pooled and not asked.record))

    def _output(
        self,
        features: Tensor,
        logits: Any,
        pooled: Tensor | None,
        record: LayerIntermediates | None,
        asked: RequestedOutputs,
    ) -> Any:
        """Which of them is the output; the record gets what else there is."""
        if record is not None:
            record.logit_entropies = each_head(logits, calc_entropy) if asked.entropies else None
            record.logits = logits if self.returns_pooled else None
        if asked.both:
            return logits, features
        if asked.features:
            return features
        if self.returns_pooled:
            return pooled
        return features if logits is None else logits

    def _logits(self, features: Tensor, keep: int | None, arguments: Mapping[str, Any] | None) -> Any:
        """Logits `(..., v)` of the last `keep` places, or of all; a tuple of them if there are several heads."""
        return self.logits_of(features[:, -keep:] if keep else features, arguments)

    def logits_of(self, features: Tensor, arguments: Mapping[str, Any] | None = None) -> Any:
        """Logits `(..., v)` of features `(..., D)`, as a pass makes them of its own (`return_embeddings`).

        Args:
            features: what `return_embeddings` gives, or a part of it.
            arguments: of the head; see `to_logits_kwargs`.

        Raises:
            InputError: if the model has no head, or made its own and arguments are given.
        """
        if self.to_logits is None:
            raise InputError("this model has no head (`return_only_embed`), and so no logits.")
        if arguments and self.own_to_logits:
            raise InputError("`to_logits_kwargs` are for a module given as `to_logits`; this model made its own.")
        head: Callable[[Tensor], Any] = functools.partial(self.to_logits, **arguments) if arguments else self.to_logits
        if self.sigsoftmax_logits:
            head = functools.partial(_sigsoftmax_of, head)
        logits = head(features) if self.mixture is None else self.mixture(features, head)
        return each_head(logits, _squeezed) if self.squeeze_out_last_dim else logits

    # checkpoints

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        for name in ("to_mixture.0.weight", "combine_mixture.weight"):
            rename(state, prefix + name, f"{prefix}mixture.{name}")


def _read_more(
    arguments: dict[str, Any], transform: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor] | None:
    """What changes the token embeddings: the caller's function, or what changes the input of block 1."""
    for name in arguments:
        if name.startswith("looped_") or name == "max_looped_steps":
            raise InputError(f"`{name}` is for looped models, which are not available in this version; drop it.")
    blocks: Any = arguments.get("transform_block_inputs")
    if transform is not None or blocks is None:
        return transform
    first: Any = functools.partial(blocks, 1) if callable(blocks) else blocks.get(1)
    return first


def _sigsoftmax_of(head: Callable[[Tensor], Any], features: Tensor) -> Any:
    return each_head(head(features), sigsoftmax)


def _squeezed(logits: Tensor) -> Tensor:
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits
