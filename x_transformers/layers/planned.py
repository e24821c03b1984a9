"""Keywords of the reference that are not built yet. They are refused by name, so that none is ignored in silence."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STACK = _words("")

ATTENTION = _words(
    """
    flash_pack_seq
    """
)

FEEDFORWARD = _words("")

WRAPPER = _words(
    """
    add_continuous_pred_head attn_pool attn_pool_depth average_pool_embed dim_pooled_tokens looped
    max_looped_steps mixture_of_softmax mixture_of_softmax_k num_cls_tokens num_output_heads num_pooled_tokens
    recycling sigsoftmax_logits train_max_recycle_steps use_cls_token
    """
)


def is_planned(keyword: str) -> bool:
    """Whether a stack's keyword belongs to the reference but not to this version."""
    if keyword in STACK:
        return True
    for prefix, names in (("cross_attn_", ATTENTION), ("attn_", ATTENTION), ("ff_", FEEDFORWARD)):
        if keyword.startswith(prefix) and keyword[len(prefix) :] in names:
            return True
    return False
