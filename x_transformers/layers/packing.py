"""Packed rows in a stack: the attentions that keep documents apart, and the documents that a caller specifies."""

from __future__ import annotations

from collections.abc import Sequence

from x_transformers.errors import ConfigError
from x_transformers.forward_pass.documents import Documents, check_packing, documents_of, refuse_beside
from x_transformers.layers.branch import Branch
from x_transformers.layers.kinds import KINDS
from x_transformers.layers.pass_state import PassInputs
from x_transformers.layers.plan import StackPlan

PACKABLE = {letter: kind for letter, kind in KINDS.items() if kind.documents_argument is not None}
"""The kinds of branches that can keep the documents of packed rows apart."""


def packed_kinds(plan: StackPlan) -> frozenset[str]:
    """Return the letters of the kinds that keep the documents of a packed row apart.

    Raises:
        ConfigError: if only some layers of a kind do, or if another option of the stack would mix documents.
    """
    packed = set()
    for letter, kind in PACKABLE.items():
        requested = {layer.options["backend"].flash_pack_seq for layer in plan.of(letter)}
        if len(requested) > 1:
            raise ConfigError(
                f"`{kind.prefix}flash_pack_seq` differs between layers, but a row is packed for all of them or for "
                "none; pass one value."
            )
        if True not in requested:
            continue
        packed.add(letter)
        if kind.is_self_attention and not plan.options.on("rotary"):
            raise ConfigError(
                "`attn_flash_pack_seq` counts positions within each document, which absolute positions do not; it "
                "needs `rotary_pos_emb = True`."
            )
        if kind.is_cross_attention and plan.options.on("context_dropout"):
            raise ConfigError(
                "`cross_attn_flash_pack_seq` divides the context into documents, and `cross_attn_tokens_dropout` may "
                "drop all tokens of one; drop one of the two options."
            )
        # without self-attention, nothing but such features could join the documents of the queries
        mixing = plan.options.unpackable() if kind.is_cross_attention else []
        if mixing and not any(layer.kind.is_self_attention for layer in plan.layers):
            raise ConfigError(kind.in_full(" ".join(mixing)))
    return frozenset(packed)


def check_apart(packed: frozenset[str], branches: Sequence[Branch]) -> None:
    """Check that nothing but the attentions mixes the tokens of a packed row.

    Raises:
        ConfigError: if another function does.
    """
    for branch in branches if packed else ():
        if not branch.kind.is_attention and not branch.fn.keeps_documents_apart:
            features = branch.kind.schema.features
            reasons = [features[name].unpackable for name in branch.fn.features if name in features]
            reason = next((each for each in reasons if isinstance(each, str)), None)
            raise ConfigError(
                branch.kind.unpackable
                or "`attn_flash_pack_seq` keeps the documents of a row apart, but "
                f"{reason or f'{branch.kind.words} carries one into the next'}; drop one of them."
            )


def read_documents(packed: frozenset[str], inputs: PassInputs) -> dict[str, Documents]:
    """Return the documents that each kind of attention keeps apart in a pass, by letter.

    Args:
        packed: letters of the kinds that keep documents apart.
        inputs: the arguments of the pass.

    Raises:
        InputError: if documents are specified for a kind that does not keep them apart, or missing for one that does,
            or if an argument contradicts them.
    """
    documents = {}
    x, context = inputs.x, inputs.context
    for letter, kind in PACKABLE.items():
        name, keyword = str(kind.documents_argument), f"{kind.prefix}flash_pack_seq"
        given = getattr(inputs, name)
        check_packing(given, packed=letter in packed, cached=inputs.cache is not None, name=name, keyword=keyword)
        if given is None:
            continue
        keys = context.shape[1] if kind.is_cross_attention and context is not None else None
        documents[letter] = documents_of(given, batch=x.shape[0], queries=x.shape[1], keys=keys, name=name)
        if kind.is_self_attention:
            names = ("mask", "self_attn_kv_mask", "attn_mask", "seq_start_pos", "mems", "self_attn_additional_kv")
            refuse_beside(name, **{each: getattr(inputs, each) for each in names})
        else:
            refuse_beside(name, context_mask=inputs.context_mask)
    return documents
