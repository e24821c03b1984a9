"""What every model over a sequence is: a stack, what stands around its tokens, and how a pass goes through both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor, nn

from x_transformers.cache import KVCache, StaticCache
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.explain import Explanation, count
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.token_layout import check_start
from x_transformers.models.embeddings import AbsolutePositionalEmbedding, build_positions
from x_transformers.models.internal_sequence import framed
from x_transformers.models.memory_layout import Layout
from x_transformers.models.recurrence import moved_down, new_memories, recycled
from x_transformers.models.requested_outputs import RequestedOutputs, z_loss
from x_transformers.models.tokens import Tokens, new_tokens
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.configured import Configured


class Model(Configured, ReadsReference):
    """A stack over embedded tokens. Abstract: a model's `forward` embeds its input and makes something of features.

    Args:
        attn_layers: the stack.
        max_seq_len: length of the absolute position table; 0 means none and no limit.
        emb_dim: width of positions.
        use_abs_pos_emb, scaled_sinu_pos_emb, l2norm_embed: which absolute positions.
        max_mem_len, shift_mem_down: recurrent memory.
        emb_dropout: dropout of what the stack reads.
        num_memory_tokens, memory_tokens_interspersed_every: learned tokens around the others.
        num_cls_tokens: class tokens in front.
        attn_z_loss_weight: default of the argument of a pass.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        attn_layers: AttentionLayers,
        *,
        max_seq_len: int,
        emb_dim: int,
        use_abs_pos_emb: bool = True,
        scaled_sinu_pos_emb: bool = False,
        l2norm_embed: bool = False,
        max_mem_len: int = 0,
        shift_mem_down: int = 0,
        emb_dropout: float = 0.0,
        num_memory_tokens: int | None = None,
        memory_tokens_interspersed_every: int | None = None,
        num_cls_tokens: int = 0,
        attn_z_loss_weight: float = 1e-4,
    ) -> None:
        super().__init__()
        self.emb_dim, self.max_seq_len = emb_dim, max_seq_len
        self.max_mem_len, self.shift_mem_down = max_mem_len, shift_mem_down
        self.emb_dropout, self.attn_z_loss_weight = emb_dropout, attn_z_loss_weight
        self.num_cls_tokens, self.num_memory_tokens = num_cls_tokens, num_memory_tokens or 0
        self.layout = Layout(self.num_memory_tokens, memory_tokens_interspersed_every)
        self.attn_layers = attn_layers
        dim = attn_layers.dim
        without = _why_no_positions(max_seq_len, use_abs_pos_emb, attn_layers)
        if scaled_sinu_pos_emb and without:
            logger.warning(f"{type(self).__name__}: `scaled_sinu_pos_emb` has no effect: {without}.")
        self.pos_emb = (
            None
            if without
            else build_positions(emb_dim, max_seq_len, sinusoids=scaled_sinu_pos_emb, l2norm_embed=l2norm_embed)
        )
        self.project_emb: nn.Module | None = nn.Linear(emb_dim, dim) if emb_dim != dim else None
        self.memory_tokens = nn.Parameter(torch.randn(self.num_memory_tokens, dim)) if num_memory_tokens else None

    last_alone: ClassVar[Mapping[str, Any]] = {}
    """Arguments with which a pass gives the output of the last position alone, for models that can."""

    joins_memories = True
    """New memories are the old ones and what was read behind them, rather than what was read alone."""

    # what other code reads

    @property
    def can_cache_kv(self) -> bool:
        """Whether decoding may keep keys and values."""
        return self.attn_layers.can_cache_kv

    @property
    def can_cache_kv_outside_max_seq_len(self) -> bool:
        """Whether positions go on beyond `max_seq_len` while a cache is in use."""
        return not isinstance(self.pos_emb, AbsolutePositionalEmbedding)

    def muon_parameters(self) -> Iterator[Tensor]:
        """What Muon may orthogonalise; see `AttentionLayers.muon_parameters`."""
        yield from self.attn_layers.muon_parameters()

    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """Bound attention's logits by shrinking weights in place; see `AttentionLayers.attn_qk_clip_`."""
        self.attn_layers.attn_qk_clip_(intermediates, tau)

    def explain(
        self,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        training: bool | None = None,
        seq_len: int | None = None,
    ) -> Explanation:
        """For each layer: features, backend and why, parameters, FLOPs; see `AttentionLayers.explain`."""
        seq_len = seq_len or self.max_seq_len or 1024
        inner = self.attn_layers.explain(device, dtype, training, seq_len)
        return replace(inner, title=f"{type(self).__name__}: {inner.title}", parameters=count(self))

    def static_cache(
        self,
        batch: int,
        max_len: int,
        *,
        prepended: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        step: int = 1,
    ) -> StaticCache:
        """A cache of fixed buffers for rows of `max_len` tokens behind `prepended` embeddings.

        Attentions with a window have room for the window alone, and for `step` tokens that are read at a time.

        Raises:
            InputError: if the model cannot decode with a cache.
        """
        self._refuse_cache()
        # between tokens, memory needs the whole axis
        prefix = None if self.layout.every is not None else self.layout.memory + prepended
        return self.attn_layers.static_cache(
            batch, self.layout.slots(prepended + max_len), device, dtype, prefix=prefix, step=step
        )

    # the steps of one pass

    def _tokens(
        self,
        n: int,
        cache: LayerIntermediates | KVCache | None,
        prepend_embeds: Tensor | None,
        *,
        only_new: bool,
        age: int | None,
    ) -> Tokens:
        """Which of the n tokens given are new; prepended embeddings that are cached already do not run again."""
        kv: KVCache | None = None
        if cache is not None:
            kv = self._kv(cache)
        if kv is not None and kv.started:
            leading = 0
        else:
            leading = self.num_cls_tokens + (0 if prepend_embeds is None else prepend_embeds.shape[1])
        return new_tokens(n, kv, leading, only_new=only_new, age=age, layout=self.layout)

    def _kv(self, cache: LayerIntermediates | KVCache) -> KVCache:
        self._refuse_cache()
        kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
        if kv is None:
            raise InputError("the intermediates given as `cache` hold none; ask for them with `return_intermediates`.")
        if kv.capacity is not None and self.layout.every is not None and torch.compiler.is_compiling():
            raise InputError(
                "interspersed memory tokens make steps of different lengths; compiled decoding needs memory tokens in "
                "front alone."
            )
        return kv

    def _refuse_cache(self) -> None:
        if not self.attn_layers.can_cache_kv:
            raise InputError("only a causal model can use a cache; build a Decoder, or pass no `cache`.")
        if not self.can_cache_kv:
            raise InputError(
                "this model's output is made of all tokens at once (class tokens, pooling or recycling), so that a "
                "step of new ones cannot give it; pass no `cache`."
            )

    def _place(
        self, embeds: Tensor, tokens: Tokens, pos: Tensor | None, seq_start_pos: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings with their positions, and the integer positions for the stack, if a caller gave any."""
        if seq_start_pos is not None:
            check_start(seq_start_pos, embeds.shape[0])
        if pos is not None and pos.is_floating_point():
            return embeds + tokens.newest(pos, -2), None
        stack_pos = own = None
        if pos is not None:
            stack_pos, own = self._integer_positions(pos.long(), tokens)
        if self.pos_emb is not None:
            start = seq_start_pos if own is None else None
            embeds = embeds + self.pos_emb(embeds, own, start, tokens.first).to(embeds.dtype)
        return embeds, stack_pos

    def _integer_positions(self, pos: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What the stack and what the position table reads, of positions over tokens or over prefix and tokens."""
        prefix = self.layout.memory + tokens.leading
        if tokens.starts and prefix and self.layout.every is None and pos.shape[-1] == prefix + tokens.count:
            return pos, (pos[..., prefix:] - prefix).clamp(min=0)
        pos = tokens.newest(pos, -1)
        return pos, pos

    def _check_prepended(self, embeds: Tensor, batch: int) -> Tensor:
        if embeds.ndim != 3 or embeds.shape[0] != batch or embeds.shape[2] != self.emb_dim:
            raise ShapeError(
                f"`prepend_embeds` has shape {tuple(embeds.shape)}; it must be ({batch}, p, {self.emb_dim})."
            )
        return embeds

    def _run(
        self,
        x: Tensor,
        tokens: Tokens,
        asked: RequestedOutputs,
        arguments: dict[str, Any],
        *,
        seq_start_pos: Tensor | None = None,
        prepend_mask: Tensor | None = None,
        mems: Sequence[Tensor | None] | None = None,
        detach_mems: bool = True,
        dropout: float = 0.0,
        recycling: tuple[int, Any] | None = None,
    ) -> tuple[Tensor, LayerIntermediates | None]:
        """From items to features: `(b, leading + n, D)` both; with the record, if something of it was asked for.

        Args:
            x: class tokens, prepended embeddings and tokens.
            tokens: which of them are tokens.
            asked: what to keep.
            arguments: of the stack, over tokens; None is no argument.
            seq_start_pos: tokens of left padding.
            prepend_mask: `(b, p)`.
            mems, detach_mems: recurrent memory.
            dropout: of all that the stack reads.
            recycling: how many passes, and what their outputs go through on the way back to the input.
        """
        framing = framed(x, tokens, self.layout, self.memory_tokens, seq_start_pos)
        if prepend_mask is not None and tokens.starts:
            framing.hide(prepend_mask, self.num_cls_tokens)
        if mems is not None:
            arguments["mems"] = mems
            if self.shift_mem_down:
                arguments["mems"] = moved_down(mems, self.shift_mem_down, self.attn_layers, arguments)
        if arguments.get("return_gumbel_log_probs"):
            asked.intermediates = True
        arguments = framing.over_columns(arguments, seq_start_pos)
        x = framing.x
        if dropout:
            x = F.dropout(x, dropout, self.training)
        if recycling is not None:
            x = recycled(x, recycling[0], self.attn_layers, recycling[1], arguments)
        if tokens.kv is None and not asked.record:
            return framing.unframe(self.attn_layers(x, **arguments)), None
        out, record = self.attn_layers(
            x,
            cache=tokens.kv,
            input_not_include_cache=True,
            return_hiddens=True,
            capture=asked.kept(self.attn_layers, tokens.kv is not None),
            header=framing.header(),
            **arguments,
        )
        framing.remember(record, out)
        if asked.mems:
            past = arguments.get("mems") if self.joins_memories else None
            record.mems = new_memories(record, past, self.max_mem_len, detach_mems)
        if asked.z_loss is not None:
            record.attn_z_loss = z_loss(record.attn_intermediates or [], asked.z_loss)
        return framing.unframe(out), record


def _why_no_positions(max_seq_len: int, use_abs_pos_emb: bool, layers: AttentionLayers) -> str | None:
    """Why a model has no absolute positions, or None if it has."""
    if max_seq_len <= 0:
        return "without `max_seq_len` there are no absolute positions"
    if not use_abs_pos_emb:
        return "`use_abs_pos_emb` is False, which turns all absolute positions off"
    if layers.disable_abs_pos_emb:
        return "the stack has `disable_abs_pos_emb`, the default beside rotary positions and the T5 bias"
    return None


def given(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The arguments, and those of `more` that are not None and not there yet."""
    for name, value in more.items():
        if value is not None and arguments.get(name) is None:
            arguments[name] = value
    return arguments


def valid_tokens(
    tokens: Tokens, batch: int, mask: Tensor | None, seq_start_pos: Tensor | None, device: torch.device
) -> Tensor | None:
    """`(b, n)` bool of the new tokens that are no padding, or None if all are; for what pools over them."""
    valid = None if mask is None else tokens.newest(mask.bool(), -1)
    if seq_start_pos is not None:
        behind = torch.arange(tokens.count, device=device) >= seq_start_pos.unsqueeze(-1)
        valid = behind if valid is None else valid & behind
    if valid is None and tokens.count == 0:
        return torch.ones(batch, 0, dtype=torch.bool, device=device)
    return valid


def check_common(given: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` unless the options that models share are what they must be; absent ones are their own."""
    layers = given["attn_layers"]
    if not isinstance(layers, AttentionLayers):
        raise ConfigError(f"`attn_layers` is a {type(layers).__name__}; it must be a stack: an Encoder, a Decoder.")
    if "a" in layers.packed:
        _check_packed(given, layers)
    for name, least in (
        ("num_tokens", 1),
        ("max_seq_len", 0),
        ("max_mem_len", 0),
        ("shift_mem_down", 0),
        ("num_memory_tokens", 0),
        ("emb_dim", 1),
        ("logits_dim", 1),
        ("dim_in", 1),
        ("dim_out", 1),
    ):
        value = given.get(name)
        optional = name not in given or name not in ("num_tokens", "max_seq_len")
        if not (value is None and optional) and (not isinstance(value, int) or value < least):
            raise ConfigError(f"`{name}` is {value!r}; it must be a whole number, at least {least}.")
    if not 0 <= given.get("emb_dropout", 0.0) < 1:
        raise ConfigError(f"`emb_dropout` is {given['emb_dropout']}; it must lie in [0, 1).")
    if not 0 < given.get("emb_frac_gradient", 1.0) <= 1:
        raise ConfigError(f"`emb_frac_gradient` is {given['emb_frac_gradient']}; it must lie in (0, 1].")
    every = given.get("memory_tokens_interspersed_every")
    if every is not None:
        if every < 1 or not given["num_memory_tokens"]:
            raise ConfigError(
                f"`memory_tokens_interspersed_every` is {every}; it must be at least 1 and needs `num_memory_tokens`."
            )
        if not layers.causal:
            raise ConfigError("`memory_tokens_interspersed_every` needs a causal stack; use a Decoder, or drop it.")


UNPACKABLE = {
    "num_memory_tokens": "belong to no document",
    "use_cls_token": "stand for all documents at once",
    "average_pool_embed": "would be the mean of all documents",
    "attn_pool": "would read all documents at once",
    "max_mem_len": "would be of the last documents of a row, whatever the next row begins with",
}
"""What the documents of a packed row have no place for, and why."""


def _check_packed(given: Mapping[str, Any], layers: AttentionLayers) -> None:
    """Raise a `ConfigError` if something around the tokens would join the documents of a packed row."""
    for name, why in UNPACKABLE.items():
        if given.get(name):
            raise ConfigError(
                f"`attn_flash_pack_seq` packs documents into one row, and `{name}` {why}; drop one of them."
            )
    if given.get("max_seq_len") and given.get("use_abs_pos_emb", True) and not layers.disable_abs_pos_emb:
        raise ConfigError(
            "`attn_flash_pack_seq` packs documents into one row, and absolute positions would not begin anew with "
            "each; drop `disable_abs_pos_emb = False`, or pass `use_abs_pos_emb = False`."
        )
