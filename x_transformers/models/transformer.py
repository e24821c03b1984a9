"""A stack between token embeddings and logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.call import Capture, check_kinds
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import check_names, passes_on
from x_transformers.layers.attention_pool import AttentionPool
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.pass_state import ARGUMENTS, KINDS_OF_INPUTS
from x_transformers.models.base import Model
from x_transformers.models.embeddings import (
    AbsolutePositionalEmbedding,
    TokenEmbedding,
    build_embedding_norm,
    checked_ids,
    further_embeddings,
    whole_numbers,
)
from x_transformers.models.exits import HasExits, exit_outputs, exits_by_confidence, exits_of
from x_transformers.models.heads import (
    FirstTokenPool,
    Heads,
    HeadTransform,
    LinearNoBias,
    LogitChanges,
    MixtureOfSoftmax,
    TiedLogits,
    build_linear_head,
    each_head,
    next_embedding_head,
)
from x_transformers.models.inputs import ModelInputs, TokenSpan, check_own, z_loss_weight
from x_transformers.models.options.base import ModelOptions, check_size
from x_transformers.models.options.catalog import TRANSFORMER
from x_transformers.models.options.reading import read_options, show_options
from x_transformers.models.repeated import Around, add_loops, looping, recycling
from x_transformers.models.requested_outputs import calc_entropy, with_requested
from x_transformers.ops import masked_mean
from x_transformers.options.signatures import shows_keywords_of
from x_transformers.options.values import shown


class TransformerWrapper(HasExits, Model):
    """Token ids to logits, through a stack.

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: length of the absolute position table; 0 for none and no limit.
        attn_layers: the stack.
        keywords: see below.

    Attributes:
        pools: features are of the whole sequence, instead of one for each token.
        returns_pooled: a pass returns the output of the attention pool instead of logits.

    Raises:
        ConfigError: listing every keyword that is unknown, wrong or in conflict, and what to change.
    """

    last_position_only: ClassVar[Mapping[str, Any]] = {"logits_to_keep": 1}

    def __init__(self, *, num_tokens: int, max_seq_len: int, attn_layers: AttentionLayers, **keywords: Any) -> None:
        options = read_options(
            type(self), TRANSFORMER, attn_layers, keywords, num_tokens=num_tokens, max_seq_len=max_seq_len
        )
        check_size("num_tokens", num_tokens)
        check_size("max_seq_len", max_seq_len, least=0)
        dim = attn_layers.dim
        super().__init__(
            attn_layers,
            options,
            max_seq_len=max_seq_len,
            emb_dim=dim if options.emb_dim is None else options.emb_dim,
            num_cls_tokens=options.num_cls_tokens if options.use_cls_token else 0,
        )
        self.num_tokens, self.l2norm_embed = num_tokens, options.l2norm_embed
        self.input_not_include_cache: bool = options.input_not_include_cache
        self.recycling: bool = options.recycling
        self.train_max_recycle_steps: int = options.train_max_recycle_steps
        self._build_embeddings(options)
        deep = min(attn_layers.depth, attn_layers.sequence.count("f", attn_layers.sequence.order))
        self.ff_deep_embed = nn.Parameter(torch.ones(num_tokens, deep, dim)) if options.ff_deep_embed else None
        self.recycled_proj = LinearNoBias(dim, dim) if options.recycling else None
        self.looped, self.max_looped_steps = options.looped, options.max_looped_steps
        self.exit_gate = LinearNoBias(dim, 1) if options.looped else None
        self._build_summaries(options)
        self._build_heads(options)
        self._build_exits(options.exit_layers, options.exit_norms)

    def _build_embeddings(self, options: ModelOptions) -> None:
        width = self.emb_dim
        self.own_token_emb = options.token_emb is None
        self.token_emb = _build_token_emb(options, self.emb_dim, self.num_tokens)
        further: Mapping[str, int] = options.embed_num_tokens or {}
        self.embeds = nn.ModuleDict({f"{name}_embed": nn.Embedding(size, width) for name, size in further.items()})
        self.embed_default_id: int | None = options.embed_default_id
        self.embedded = tuple(sorted(further))
        self.post_emb_norm = build_embedding_norm(options, width)
        self.init_()

    def _build_summaries(self, options: ModelOptions) -> None:
        """Build what makes one output of many tokens."""
        layers, dim = self.attn_layers, self.attn_layers.dim
        self.cls_token = nn.Parameter(torch.randn(self.num_cls_tokens, dim) * 0.02) if self.num_cls_tokens else None
        self.average_pool_embed = options.average_pool_embed
        self.pools = options.average_pool_embed or options.use_cls_token
        self.attn_pool = _build_pool(options, layers)
        self.returns_pooled = self.attn_pool is not None and not layers.causal

    def _build_heads(self, options: ModelOptions) -> None:
        dim = self.attn_layers.dim
        self.has_multiple_heads = options.num_output_heads > 1
        self.squeeze_out_last_dim: bool = options.squeeze_out_last_dim
        self.sigsoftmax_logits, self.output_is_log_prob = options.sigsoftmax_logits, options.mixture_of_softmax
        self.mixture = MixtureOfSoftmax(dim, options.mixture_of_softmax_k) if options.mixture_of_softmax else None
        self.logit_changes = _build_logit_changes(options, dim, self.emb_dim)
        self.own_to_logits, self.to_logits = options.to_logits is None, _build_head(options, self, self.num_tokens)
        self.add_continuous_pred_head = options.add_continuous_pred_head
        self.to_next_embed_pred = next_embedding_head(dim, self.emb_dim) if self.add_continuous_pred_head else None

    def init_(self) -> None:
        """Initialize the token embeddings (and positions, if rows are normalized), but not a module passed in."""
        if self.own_token_emb:
            self.token_emb.init_()
        if self.l2norm_embed and isinstance(self.pos_emb, AbsolutePositionalEmbedding):
            nn.init.normal_(self.pos_emb.emb.weight, std=1e-5)

    @property
    def can_cache_kv(self) -> bool:
        """True if decoding may cache keys and values: new tokens must not change earlier outputs."""
        return self.attn_layers.can_cache_kv and not (self.pools or self.recycling)

    @shows_keywords_of(AttentionLayers.forward, but=("return_hiddens", "transform_block_inputs"))
    @passes_on("attn_layers", but=("return_hiddens",))
    def forward(
        self,
        x: Ids | None = None,
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
        looped_steps: int | None = None,
        max_looped_steps: int | None = None,
        looped_pred_all_logits: bool | None = None,
        looped_inference: bool = False,
        looped_exit_prob_threshold: float = 0.9,
        pos: Tensor | None = None,
        prepend_embeds: Tensor | None = None,
        prepend_mask: Tensor | None = None,
        excise_prepend_embeds: bool = False,
        embed_ids: Mapping[str, Tensor] | None = None,
        sum_embeds: Tensor | float | None = None,
        transform_token_embeds: Callable[[Tensor], Tensor] | None = None,
        transform_block_inputs: Any = None,
        return_attn_z_loss: bool = False,
        attn_z_loss_weight: float | None = None,
        seq_start_pos: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        input_not_include_cache: bool | None = None,
        token_emb_kwargs: Mapping[str, Any] | None = None,
        to_logits_kwargs: Mapping[str, Any] | None = None,
        cache_age: int | None = None,
        attn_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        self_attn_kv_mask: Tensor | None = None,
        *,
        logits_to_keep: int | None = None,
        capture: Capture | None = None,
        return_aux_loss: bool = False,
        return_exits: bool | Sequence[int] = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n)` token ids, or None for no tokens after `prepend_embeds`. With a cache, see
                `AttentionLayers.forward`: the whole sequence or its end, of which the new tokens run.
            return_embeddings: return features `(b, n, D)` instead of logits.
            return_logits_and_embeddings: return both.
            return_intermediates: also return the `LayerIntermediates`, which a later call takes as `cache`.
            return_embeddings_and_intermediates: return features and intermediates.
            return_logit_entropies: fill `logit_entropies` of the intermediates, and return them.
            return_next_embed_pred: the output becomes `(output, (pred, initial_embeds))`, pred `(b, n, E)`.
            mask: `(b, n)` bool, valid tokens; with a cache it covers cached and new ones, or the new ones only.
            return_mems, mems, mem_masks, detach_mems: recurrent memory, a `(b, m, D)` tensor for each self-attention.
            return_attn: also return the attention weights, `(b, h, i, j)` for each attention.
            recycle_steps: number of times that a recycling model runs its stack.
            pos: integer positions `(n,)`, `(b, n)` or, for ALiBi, `(b, h, n)`; or floating position embeddings.
            prepend_embeds, prepend_mask: `(b, p, E)` embeddings before the tokens, and their `(b, p)` mask.
            excise_prepend_embeds: remove their positions from logits and features.
            embed_ids: name -> `(b, n)` ids of the further embeddings.
            sum_embeds: `(b, n, E)` or what broadcasts to it, added to the token embeddings.
            transform_token_embeds: applied to the token embeddings before positions are added.
            transform_block_inputs: of the stack; that of block 1 is applied to the token embeddings, unless
                `transform_token_embeds` is given.
            return_attn_z_loss, attn_z_loss_weight: fill `attn_z_loss` of the intermediates, and return them.
            return_aux_loss: return the intermediates too, with `aux_loss`, the losses of experts.
            return_exits: the output becomes `(output, {block: output after it})`, of `exit_layers` or some of them.
            seq_start_pos: `(b,)` number of tokens of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            token_emb_kwargs, to_logits_kwargs: passed to modules that were given as `token_emb` and `to_logits`.
            attn_mask, attn_bias, self_attn_kv_mask: of the stack, over tokens; other slots are always visible.
            logits_to_keep: number of last positions that get logits; None or 0: all.
            capture: what the stack records, instead of what `return_intermediates` implies.
            looped_steps: number of loops of a looped model; default at most `max_looped_steps`.
            max_looped_steps: largest number of loops, instead of the constructor's.
            looped_pred_all_logits: record the logits of every loop; default in training.
            looped_inference: of a looped model; a pass with a cache decodes as generation does in any case.
            looped_exit_prob_threshold: probability of having stopped with which a generated token leaves the loops.
            kwargs: of the stack: `context`, `context_mask`, `causal`, `condition` and others. Those over tokens do not
                cover memory tokens and prepended embeddings, which get zeros.

        Returns:
            Logits `(b, p + n, v)` (a tuple of them for several heads), features, or what an attention pool reads, `(b,
            k, d)`. Together with it what was requested: intermediates, or else memories, or else attention weights.

        Raises:
            InputError: with what was given and what is needed.
        """
        flags = return_embeddings, return_intermediates, return_embeddings_and_intermediates, excise_prepend_embeds
        check_own(flags, transform_token_embeds, token_emb_kwargs, to_logits_kwargs)
        attn_z_loss_weight = z_loss_weight(self.attn_z_loss_weight, return_attn_z_loss, attn_z_loss_weight)
        if input_not_include_cache is None:
            input_not_include_cache = self.input_not_include_cache
        inputs = ModelInputs(
            stack=kwargs,
            mask=mask,
            self_attn_kv_mask=self_attn_kv_mask,
            attn_mask=attn_mask,
            attn_bias=attn_bias,
            pos=pos,
            seq_start_pos=seq_start_pos,
            sum_embeds=sum_embeds,
            embed_ids=embed_ids,
            prepend_embeds=prepend_embeds,
            prepend_mask=prepend_mask,
            mems=mems,
            mem_masks=mem_masks,
            detach_mems=detach_mems,
            cache=cache,
            input_not_include_cache=input_not_include_cache,
            cache_age=cache_age,
            return_embeddings=return_embeddings or return_embeddings_and_intermediates,
            return_logits_and_embeddings=return_logits_and_embeddings,
            return_intermediates=return_intermediates or return_embeddings_and_intermediates,
            return_logit_entropies=return_logit_entropies,
            return_next_embed_pred=return_next_embed_pred,
            return_mems=return_mems,
            return_attn=return_attn,
            z_loss_weight=attn_z_loss_weight,
            return_aux_loss=return_aux_loss,
            return_exits=return_exits,
            capture=capture,
            logits_to_keep=logits_to_keep,
        )
        if return_logits_and_embeddings or return_logit_entropies or return_next_embed_pred or logits_to_keep:
            _check_requested(self, inputs)
        if transform_block_inputs is not None:
            kwargs["transform_block_inputs"] = transform_block_inputs
        if kwargs:
            transform_token_embeds = _read_stack_arguments(self, kwargs, transform_token_embeds, to_logits_kwargs)
        if x is None:
            x = _no_ids(prepend_embeds)
        x = checked_ids(x, self)
        span = self._token_span(x.shape[1], inputs)
        ids = span.newest(x, 1)
        if token_emb_kwargs and self.own_token_emb:
            raise InputError("`token_emb_kwargs` are for a module given as `token_emb`; this model made its own.")
        embeds = self.token_emb(ids, **token_emb_kwargs) if token_emb_kwargs else self.token_emb(ids)
        if transform_token_embeds is not None:
            embeds = transform_token_embeds(embeds)
        embeds = self._add_positions(embeds, inputs, span)
        if embed_ids or self.embedded:
            embeds = _add_further_embeddings(self, embeds, inputs, span)
        if self.ff_deep_embed is not None and kwargs.get("deep_embeds_and_ids") is None:
            kwargs["deep_embeds_and_ids"] = (self.ff_deep_embed, ids)
        if return_exits:
            kwargs["exits"] = exits_of(self, return_exits)
        around: Around | None = None
        if self.recycling or recycle_steps is not None:
            around = recycling(self.recycled_proj, recycle_steps, self.train_max_recycle_steps, self.training)
        if self.looped or looped_inference or looped_steps is not None or max_looped_steps is not None:
            numbers = looped_steps, max_looped_steps, self.max_looped_steps
            around = looping(self.exit_gate, *numbers, looped_exit_prob_threshold)
        features, record, initial_embeds = self._run_stack(embeds, inputs, span, around)
        pooled = None
        if self.pools or self.attn_pool is not None:
            features, pooled = self._summarize(features, inputs, span)
        excised = span.leading if excise_prepend_embeds and cache is None else 0
        if excised and not self.pools:
            features = features[:, excised:]
        logits = None
        if self.to_logits is not None and (
            return_logits_and_embeddings
            or return_logit_entropies
            or not (inputs.return_embeddings or (self.returns_pooled and record is None))
        ):
            kept = features[:, -logits_to_keep:] if logits_to_keep else features
            logits = self.logits_of(kept, to_logits_kwargs)

        if return_logits_and_embeddings:
            out = (logits, features)
        elif inputs.return_embeddings:
            out = features
        elif self.returns_pooled:
            out = pooled
        else:
            out = features if logits is None else logits
        if return_exits:
            out = (out, exit_outputs(self, record, inputs, span, excised, to_logits_kwargs))
        if return_next_embed_pred and self.to_next_embed_pred is not None:
            prepended = max(excised - self.num_cls_tokens, 0)
            out = (out, (self.to_next_embed_pred(features), initial_embeds[:, prepended:]))
        if record is None:
            return out
        if self.exit_gate is not None:
            every = self.training if looped_pred_all_logits is None else looped_pred_all_logits
            heads = (
                functools.partial(self.logits_of, arguments=to_logits_kwargs) if every and logits is not None else None
            )
            add_loops(record, self.exit_gate, heads, self.layout, span)
        record.attn_pooled_tokens = pooled
        record.logits = logits if self.returns_pooled else None
        record.logit_entropies = each_head(logits, calc_entropy) if return_logit_entropies else None
        return with_requested(out, record, inputs)

    def _summarize(self, features: Tensor, inputs: ModelInputs, span: TokenSpan) -> tuple[Tensor, Tensor | None]:
        """Return the features that heads read, and the output of the attention pool, if it is requested."""
        if self.num_cls_tokens:
            classes = features[:, : self.num_cls_tokens]
            return classes[:, 0] if self.num_cls_tokens == 1 else classes, None
        valid = span.valid(features.shape[0], inputs.mask, inputs.seq_start_pos, features.device)
        if self.average_pool_embed:
            return masked_mean(features[:, span.leading :], valid), None
        requested = span.kv is None and (self.returns_pooled or inputs.return_intermediates)
        return features, self._pool(features, span, valid, inputs.prepend_mask) if requested else None

    def _pool(self, features: Tensor, span: TokenSpan, valid: Tensor | None, prepend_mask: Tensor | None) -> Tensor:
        """Let the attention pool read the valid ones of prepended embeddings and tokens: `(b, k, d)`."""
        assert self.attn_pool is not None
        keys = None
        if valid is not None or prepend_mask is not None:
            ones = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
            before = ones[:, : span.leading] if prepend_mask is None else prepend_mask
            keys = torch.cat((before, ones[:, span.leading :] if valid is None else valid), dim=-1)
        return self.attn_pool(features, keys)

    def logits_of(self, features: Tensor, arguments: Mapping[str, Any] | None = None) -> Any:
        """Return logits of features, as a pass does.

        Args:
            features: `(..., D)`, what `return_embeddings` returns, or a part of it.
            arguments: of the head; see `to_logits_kwargs`.

        Returns:
            `(..., v)`, or a tuple of these if there are several heads.

        Raises:
            InputError: if the model has no head, or made its own and arguments are given.
        """
        if self.to_logits is None:
            raise InputError("this model has no head (`return_only_embed`), and so no logits.")
        if arguments and self.own_to_logits:
            raise InputError("`to_logits_kwargs` are for a module given as `to_logits`; this model made its own.")
        head: Callable[[Tensor], Any] = functools.partial(self.to_logits, **arguments) if arguments else self.to_logits
        if self.logit_changes is not None:
            head = functools.partial(self.logit_changes, head)
        logits = head(features) if self.mixture is None else self.mixture(features, head)
        return each_head(logits, _squeezed) if self.squeeze_out_last_dim else logits

    # checkpoints

    def reference_names(self) -> Mapping[str, str]:
        return {name: f"mixture.{name}" for name in ("to_mixture.0.weight", "combine_mixture.weight")}


def _check_requested(model: TransformerWrapper, inputs: ModelInputs) -> None:
    logits = inputs.return_logits_and_embeddings or inputs.return_logit_entropies
    if logits and model.to_logits is None:
        raise InputError("this model has no head (`return_only_embed`); logits and entropies cannot be returned.")
    if inputs.return_next_embed_pred and model.to_next_embed_pred is None:
        raise InputError("this model does not predict embeddings; build it with `add_continuous_pred_head = True`.")
    keep = inputs.logits_to_keep
    if keep and (model.pools or keep < 0):
        raise InputError(
            f"`logits_to_keep` is {keep}; it is the number of last tokens that get logits, at least 0, and needs a "
            "model that does not pool its features."
        )


def _build_head(options: ModelOptions, model: Model, num_tokens: int) -> nn.Module | None:
    """Build the map from features to logits, or None if a pass returns features."""
    if options.return_only_embed:
        return None
    dim = model.attn_layers.dim
    if options.tie_embedding:
        scale = dim**-0.5 if options.tie_embedding_scale is None else options.tie_embedding_scale
        return TiedLogits(model, scale, num_tokens if options.logits_bias else 0)
    if options.to_logits is not None:
        return options.to_logits
    width = num_tokens if options.logits_dim is None else options.logits_dim
    heads, bias = options.num_output_heads, options.logits_bias
    return Heads(heads, dim, width, bias) if heads > 1 else build_linear_head(dim, width, bias)


def _build_token_emb(options: ModelOptions, width: int, num_tokens: int) -> Any:
    """Build the table of token embeddings, or return the module that was given."""
    if options.token_emb is not None:
        return options.token_emb
    return TokenEmbedding(width, num_tokens, options.l2norm_embed, options.emb_scale)


def _build_pool(options: ModelOptions, layers: AttentionLayers) -> AttentionPool | FirstTokenPool | None:
    """Build what makes one output of many tokens, apart from their logits."""
    if options.first_token_pool:
        return FirstTokenPool(layers.dim)
    if not options.attn_pool:
        return None
    return AttentionPool(
        dim=layers.dim if options.dim_pooled_tokens is None else options.dim_pooled_tokens,
        num_pooled_tokens=options.num_pooled_tokens,
        dim_context=layers.dim,
        depth=options.attn_pool_depth,
        heads=layers.attn_heads,
        dim_head=layers.attn_dim_head,
    )


def _build_logit_changes(options: ModelOptions, dim: int, emb_dim: int) -> LogitChanges | None:
    """Build what changes features before the head and logits after it, or None if nothing does."""
    if options.return_only_embed:
        return None
    transform = None
    if options.logits_transform:
        transform = HeadTransform(
            dim,
            emb_dim if options.tie_embedding else dim,
            activation=options.logits_transform_activation,
            bias=options.logits_transform_bias,
            eps=options.logits_transform_eps,
        )
    given = options.logits_scale, options.logits_softcap, options.sigsoftmax_logits, transform
    return None if given == (1, None, False, None) else LogitChanges(*given)


def _no_ids(prepend_embeds: Tensor | None) -> Tensor:
    """Return `(b, 0)` ids for a pass over prepended embeddings only."""
    if prepend_embeds is None:
        raise InputError("there is nothing to run: pass token ids, or `prepend_embeds`.")
    return torch.zeros(prepend_embeds.shape[0], 0, dtype=torch.long, device=prepend_embeds.device)


def _add_further_embeddings(model: TransformerWrapper, embeds: Tensor, inputs: ModelInputs, span: TokenSpan) -> Tensor:
    """Add the embeddings of further ids to those of the tokens."""
    given, default = inputs.embed_ids or {}, model.embed_default_id
    missing = [name for name in model.embedded if name not in given]
    if len(given) + len(missing) > len(model.embedded) or (missing and default is None):
        raise InputError(f"`embed_ids` names {sorted(given)}; this model embeds {[*model.embedded]}.")
    for name, ids in given.items():
        embeds = embeds + _further(model.embeds[f"{name}_embed"], ids, name, embeds.shape[0], span)
    for name in missing:
        embeds = embeds + model.embeds[f"{name}_embed"](embeds.new_full((1, 1), default, dtype=torch.long))
    return embeds


def _further(table: nn.Module, ids: Tensor, name: str, batch: int, span: TokenSpan) -> Tensor:
    """Return the embeddings `(1|b, n, E)` of the further ids of the new tokens."""
    if not isinstance(ids, Tensor):
        raise InputError(f"`embed_ids[{name!r}]` is {shown(ids)}; it must be a tensor of ids.")
    ids = whole_numbers(ids, f"`embed_ids[{name!r}]` has")
    if ids.ndim != 2 or ids.shape[0] not in (1, batch):
        raise ShapeError(f"`embed_ids[{name!r}]` has shape {tuple(ids.shape)}; it must be ({batch}, n).")
    return further_embeddings(table, span.newest(ids, -1), name)


def _read_stack_arguments(
    model: TransformerWrapper,
    arguments: dict[str, Any],
    transform: Callable[[Tensor], Tensor] | None,
    of_head: Mapping[str, Any] | None,
) -> Callable[[Tensor], Tensor] | None:
    """Check arguments of the stack, give it what exits read of the model, and return the function that changes the
    token embeddings: the caller's, or that for the input of block 1.
    """
    for name in arguments:
        if name not in ARGUMENTS:
            check_names(model, TransformerWrapper.forward, arguments)
    if "exits" in arguments:
        raise InputError(
            "`exits` are of the stack; build the model with `exit_layers`, and pass `return_exits = True`."
        )
    check_kinds(arguments, KINDS_OF_INPUTS)
    if arguments.get("early_exit") is not None:
        arguments["early_exit"] = exits_by_confidence(model, arguments["early_exit"], of_head)
    blocks: Any = arguments.get("transform_block_inputs")
    if transform is not None or blocks is None:
        return transform
    # the compiler knows no `callable` of a dict
    first: Any = blocks.get(1) if isinstance(blocks, Mapping) else functools.partial(blocks, 1)
    return first


def _squeezed(logits: Tensor) -> Tensor:
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits


show_options(TransformerWrapper, TRANSFORMER)
