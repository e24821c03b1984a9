"""Packed rows in a stack: the attentions that keep documents apart, and the documents that a caller specifies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from x_transformers.errors import ConfigError
from x_transformers.forward_pass.documents import Documents, check_packing, documents_of
from x_transformers.layers.plan import StackPlan

ARGUMENTS = {"a": "flash_pack_seq_kwargs", "c": "flash_pack_seq_context_kwargs"}
"""Arguments of a pass that specify the documents, for each kind of attention."""

KEYWORDS = {"a": "attn_flash_pack_seq", "c": "cross_attn_flash_pack_seq"}
"""Keywords that switch packed rows on, for each kind of attention."""


def packed_kinds(plan: StackPlan) -> frozenset[str]:
    """Return the kinds of attention that keep the documents of a packed row apart.

    Raises:
        ConfigError: if only some layers of a kind do, or if another option of the stack would mix documents.
    """
    kinds = set()
    for kind, keyword in KEYWORDS.items():
        requested = {layer.options["backend"].flash_pack_seq for layer in plan.of(kind)}
        if len(requested) > 1:
            raise ConfigError(
                f"`{keyword}` differs between layers, but a row is packed for all layers or for none; pass one value."
            )
        if True in requested:
            kinds.add(kind)
    if "a" in kinds and not plan.options.on("rotary"):
        raise ConfigError(
            "`attn_flash_pack_seq` counts positions within each document, which absolute positions do not; it needs "
            "`rotary_pos_emb = True`."
        )
    if "c" in kinds and plan.options.on("context_dropout"):
        raise ConfigError(
            "`cross_attn_flash_pack_seq` divides the context into documents, and `cross_attn_tokens_dropout` may drop "
            "all tokens of one; drop one of the two options."
        )
    return frozenset(kinds)


def read_documents(
    packed: frozenset[str], given: Mapping[str, Any], x: Tensor, context: Tensor | None, *, cached: bool
) -> dict[str, Documents]:
    """Return the documents that each kind of attention keeps apart in a pass.

    Args:
        packed: kinds of attention that keep documents apart.
        given: arguments of the pass by name, those of `ARGUMENTS` among them; None if not given.
        x: `(1, n, D)` input.
        context: `(1, m, Dc)` source of cross-attention, or None.
        cached: True if the pass has a cache.

    Raises:
        InputError: if documents are specified for a kind that does not keep them apart, or missing for one that does.
    """
    documents = {}
    for kind, name in ARGUMENTS.items():
        check_packing(given[name], packed=kind in packed, cached=cached, name=name, keyword=KEYWORDS[kind])
        if given[name] is not None:
            keys = context.shape[1] if kind == "c" and context is not None else None
            documents[kind] = documents_of(given[name], batch=x.shape[0], queries=x.shape[1], keys=keys, name=name)
    return documents
