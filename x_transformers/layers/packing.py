"""Packed rows in a stack: which attentions keep documents apart, and what a caller says of the documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from x_transformers.errors import ConfigError
from x_transformers.forward_pass.documents import Documents, check_packing, documents_of
from x_transformers.layers.plan import StackPlan

ARGUMENTS = {"a": "flash_pack_seq_kwargs", "c": "flash_pack_seq_context_kwargs"}
"""The arguments that tell self- and cross-attention of documents."""

KEYWORDS = {"a": "attn_flash_pack_seq", "c": "cross_attn_flash_pack_seq"}


def packed_kinds(plan: StackPlan) -> frozenset[str]:
    """The kinds of attention that keep the documents of a packed row apart.

    Raises:
        ConfigError: if only some layers of a kind do, or the stack could not keep documents apart.
    """
    kinds = set()
    for kind, keyword in KEYWORDS.items():
        asked = {layer.options["backend"].flash_pack_seq for layer in plan.of(kind)}
        if len(asked) > 1:
            raise ConfigError(f"`{keyword}` differs between layers, but a row is packed for all of them or for none.")
        if True in asked:
            kinds.add(kind)
    if "a" in kinds and not plan.options.on("rotary"):
        raise ConfigError(
            "`attn_flash_pack_seq` counts positions within each document, which absolute ones do not; it needs "
            "`rotary_pos_emb = True`."
        )
    if "c" in kinds and plan.options.on("context_dropout"):
        raise ConfigError(
            "`cross_attn_flash_pack_seq` divides the context into documents, of which `cross_attn_tokens_dropout` may "
            "leave nothing; drop one of them."
        )
    return frozenset(kinds)


def read_documents(
    packed: frozenset[str], given: Mapping[str, Any], x: Tensor, context: Tensor | None, *, cached: bool
) -> dict[str, Documents]:
    """The documents that each kind of attention sees, from the arguments of a pass.

    Args:
        packed: the kinds that keep documents apart.
        given: the arguments, by name; None where there is none.
        x: `(1, n, D)`. context: `(1, m, Dc)`.
        cached: the pass has a cache.

    Raises:
        InputError: if documents are told of where none are meant, or the other way round.
    """
    documents = {}
    for kind, name in ARGUMENTS.items():
        check_packing(given[name], packed=kind in packed, cached=cached, name=name, keyword=KEYWORDS[kind])
        if given[name] is not None:
            keys = context.shape[1] if kind == "c" and context is not None else None
            documents[kind] = documents_of(given[name], batch=x.shape[0], queries=x.shape[1], keys=keys, name=name)
    return documents
