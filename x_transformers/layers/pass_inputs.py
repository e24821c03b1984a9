"""Inputs of one pass through a stack: the arguments of its `forward`, as one object.

`AttentionLayers.forward` puts its arguments into `PassInputs` on its first line. The functions of `begin_pass.py` check
them and fill in the fields that the sublayers read; from then on nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from x_transformers.attention.base import QKTransform
from x_transformers.cache import KVCache
from x_transformers.forward_pass.call import Capture, Span
from x_transformers.forward_pass.documents import Documents
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.execution_order import Repeat

BlockTransform = Callable[[int, Tensor], Tensor]
KeysValues = tuple[Tensor, Tensor]


@dataclass(eq=False, slots=True)
class PassInputs:
    """Arguments of `AttentionLayers.forward`, which documents them, and what the sublayers read of them.

    Attributes:
        x: `(b, n, D)`; with a cache, from `begin_pass` on only the tokens that run.
        order: indices of the built sublayers, in the order of execution.
        causal_pass: True if tokens do not see later ones in this pass.
        attention_memories: recurrent memory `(b, l, D)` of each executed self-attention, or None.
        running_states: running states that the previous segment left, in the order of the sublayers that keep them.
        condition: from `begin_pass` on `(b, 1|n, c)`, the input of adaptive norms and scales.
        injection: `(b, 1|n, D)`, added to the input of each sublayer.
        deep_embeds: `(b, n, L, D)`, factors of the outputs of the first L executed feedforwards.
        block_transform: `(block, stream) -> stream` at the entry of each executed block but the first.
        rotations: query/key transforms of self-attention.
        additional: keys and values for each executed self-attention.
        kv_residuals: by letter of the kind, what is added to the source of keys and values of each such layer.
        documents: by letter of the kind, the documents of a packed row and of its keys.
    """

    x: Tensor
    context: Tensor | None = None
    mask: Tensor | None = None
    context_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    self_attn_kv_mask: Tensor | None = None
    mems: Sequence[Tensor | None] | None = None
    mem_masks: Sequence[Tensor | None] | None = None
    seq_start_pos: Tensor | None = None
    seq_pos_offset: int | None = None
    cache: LayerIntermediates | KVCache | None = None
    input_not_include_cache: bool = False
    cache_age: int | None = None
    return_hiddens: bool = False
    return_gumbel_log_probs: bool = False
    rotary_pos_emb: tuple[Tensor, Tensor | float] | None = None
    polar_pos_emb: tuple[Tensor, Tensor] | None = None
    pos: Tensor | None = None
    context_pos: Tensor | None = None
    attn_bias: Tensor | None = None
    deep_embeds_and_ids: tuple[Tensor, Tensor] | None = None
    self_attn_additional_kv: LayerIntermediates | Sequence[KeysValues] | None = None
    additional_kv_mask: Tensor | None = None
    detach_additional_kv: bool = False
    route_additional_kv_to_top: bool = True
    condition: Tensor | None = None
    in_attn_cond: Tensor | None = None
    layers_execute_order: Sequence[int] | None = None
    repeat_blocks: Sequence[Repeat] | Repeat | None = None
    self_attn_kv_residuals: Tensor | None = None
    cross_attn_kv_residuals: Tensor | None = None
    flash_pack_seq_kwargs: Mapping[str, Any] | None = None
    flash_pack_seq_context_kwargs: Mapping[str, Any] | None = None
    causal: bool | None = None
    transform_block_inputs: BlockTransform | Mapping[int, Callable[[Tensor], Tensor]] | None = None
    places: Tensor | None = None
    prefix: int | None = 0
    capture: Capture | None = None
    pairs: Callable[[Span, Span], Tensor] | None = None
    # filled in by `begin_pass`
    order: tuple[int, ...] = field(default=(), init=False)
    causal_pass: bool = field(default=False, init=False)
    attention_memories: Sequence[Tensor | None] = field(default=(), init=False)
    running_states: Sequence[Tensor | None] = field(default=(), init=False)
    injection: Tensor | None = field(default=None, init=False)
    deep_embeds: Tensor | None = field(default=None, init=False)
    block_transform: BlockTransform | None = field(default=None, init=False)
    rotations: tuple[QKTransform, ...] = field(default=(), init=False)
    additional: Sequence[KeysValues | None] = field(default=(), init=False)
    kv_residuals: Mapping[str, Sequence[Tensor | None]] | None = field(default=None, init=False)
    documents: Mapping[str, Documents] | None = field(default=None, init=False)
