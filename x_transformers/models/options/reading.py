"""Reading of a model's keywords: checks, conflicts with its stack, signature.

The signature, the documentation and the checks of a model's constructor come from its schema. `attn_layers` and what a
model cannot be without (its vocabulary, the size of its images) are parameters of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from x_transformers.errors import ConfigError, Faults
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.embeddings import TokenEmbedding
from x_transformers.models.options.base import ModelOptions
from x_transformers.models.options.catalog import EVERY
from x_transformers.modules.unwrap import unwrapped
from x_transformers.notices import warn
from x_transformers.options.schema import Options, Schema, default_of
from x_transformers.options.signatures import show_keywords


def read_options(
    model: type[nn.Module],
    schema: Schema,
    layers: AttentionLayers,
    keywords: Mapping[str, Any],
    *,
    num_tokens: int | None = None,
    max_seq_len: int = 0,
) -> ModelOptions:
    """Check a model's keywords, and return all keywords that models share.

    Args:
        model: the class.
        schema: the keywords that the model has.
        layers: its stack.
        keywords: those that were given.
        num_tokens: vocabulary of the model, or None.
        max_seq_len: positions of the model; 0 means none.

    Raises:
        ConfigError: listing every unknown keyword, wrong value and conflict.
    """
    if not isinstance(unwrapped(layers), AttentionLayers):
        raise ConfigError(f"`attn_layers` is a {type(layers).__name__}; it must be a stack: an Encoder, a Decoder.")
    name, faults = model.__name__, Faults()
    known = {keyword: value for keyword, value in keywords.items() if keyword in schema.owner}
    for keyword in sorted(keywords.keys() - known.keys()):
        faults.add_unknown(keyword, inspect.signature(model).parameters)
    parsed = schema.parse(known, faults)
    options = replace(parsed, schema=EVERY, values={**EVERY.defaults, **parsed.values})
    schema.check_choices(parsed, faults)
    schema.check_rules(parsed, options, faults)
    shared = ModelOptions(**{keyword: getattr(options[owner.name], keyword) for keyword, owner in EVERY.owner.items()})
    with faults.catching():
        _check_stack(shared, layers)
    if shared.tie_embedding:
        with faults.catching():
            _check_tied(shared, layers.dim, num_tokens)
    if "a" in layers.packed:
        with faults.catching():
            _check_packed(parsed, layers, shared.use_abs_pos_emb and max_seq_len > 0)
    faults.raise_if_any(name)
    for sentence in (*_without_effect(parsed, keywords), *schema.unwise(parsed, options)):
        warn(f"{name}: {sentence}")
    if shared.use_cls_token and layers.causal:
        warn(
            f"{name}: `use_cls_token` puts class tokens first, where those of a causal stack see no other token, so "
            "that outputs do not depend on the input; use an Encoder."
        )
    return shared


def _check_stack(options: ModelOptions, layers: AttentionLayers) -> None:
    """Raise a `ConfigError` if an option needs another stack."""
    if options.looped and not layers.pre_and_post_norm:
        raise ConfigError(
            "`looped` runs the stack on its own output, which must stay at one scale; set `pre_and_post_norm = True` "
            "in the stack."
        )
    if options.exit_layers is not None:
        _check_exits(options, layers)
    if options.first_token_pool and layers.causal:
        raise ConfigError(
            "`first_token_pool` reads the first token, which sees no other in a causal stack; use an Encoder, or drop "
            "it."
        )
    if options.memory_tokens_interspersed_every is not None and not layers.causal:
        raise ConfigError("`memory_tokens_interspersed_every` needs a causal stack; use a Decoder, or drop it.")
    if options.ff_deep_embed and not layers.sequence.count("f", layers.sequence.order):
        raise ConfigError("`ff_deep_embed` scales the outputs of feedforwards, but the stack runs none; drop it.")


def _check_exits(options: ModelOptions, layers: AttentionLayers) -> None:
    """Raise a `ConfigError` for an exit after a block that does not run, or norms of exits without a final norm."""
    blocks = layers.sequence.blocks
    if options.exit_layers[-1] > blocks:
        raise ConfigError(
            f"`exit_layers` is {options.exit_layers}, but the stack runs {blocks} blocks; the exits are among these, "
            "counted from 1."
        )
    inside = [block for block in options.exit_layers if block % layers.parallel_blocks]
    if inside:
        raise ConfigError(
            f"`exit_layers` has an exit after block {inside[0]}, but with `parallel_blocks` = {layers.parallel_blocks} "
            f"there is a stream only after every {layers.parallel_blocks} blocks; choose multiples of it."
        )
    if options.exit_norms and layers.final_norm is None:
        raise ConfigError("`exit_norms` are copies of the final norm, which this stack does not have; drop it.")


def _check_tied(options: ModelOptions, dim: int, num_tokens: int | None) -> None:
    """Raise a `ConfigError` unless logits can be computed with the token table."""
    for name, value in (("logits_dim", options.logits_dim), ("to_logits", options.to_logits)):
        if value is not None and value != num_tokens:
            raise ConfigError(f"`tie_embedding` takes its logits from the token table; drop `{name}`, or untie.")
    if options.emb_dim not in (None, dim) and not options.logits_transform:
        raise ConfigError(
            f"`tie_embedding` needs embeddings of the stack's width {dim}; `emb_dim` is {options.emb_dim}. Drop one of "
            "them, or set `logits_transform`, which maps features to the width of the embeddings."
        )
    if options.token_emb is not None and not isinstance(options.token_emb, TokenEmbedding):
        raise ConfigError("`tie_embedding` needs a `TokenEmbedding`; untie, or pass one as `token_emb`.")


def _check_packed(options: Options, layers: AttentionLayers, positions: bool) -> None:
    """Raise a `ConfigError` if something around the tokens would join the documents of a packed row."""
    for feature in options.enabled():
        given = options[feature.name]
        if given.joins_documents is not None and given != feature.options():
            raise ConfigError(
                f"`attn_flash_pack_seq` packs documents into one row, and {options.switch(feature)} "
                f"{given.joins_documents}; drop one of them."
            )
    if positions and not layers.disable_abs_pos_emb:
        raise ConfigError(
            "`attn_flash_pack_seq` packs documents into one row, and absolute positions would not start again with "
            "each; drop `disable_abs_pos_emb = False`, or pass `use_abs_pos_emb = False`."
        )


def _without_effect(options: Options, keywords: Iterable[str]) -> Iterable[str]:
    """Name the keywords whose feature is off, and the one that turns it on."""
    schema = options.schema
    for keyword in keywords:
        owner = schema.owner[keyword]
        switch = fields(owner.options)[0].name
        changed = getattr(options[owner.name], keyword) != default_of(schema.fields[keyword])
        if changed and keyword != switch and not options.on(owner.name):
            yield f"`{keyword}` has no effect: it needs `{switch}`."


def show_options(model: type[nn.Module], schema: Schema) -> None:
    """Add a model's keywords to its signature and documentation, after the parameters of its constructor."""
    own = inspect.signature(model.__init__).parameters.values()
    show_keywords(model, [(schema, "")], [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY])
