"""Names of attention's weights in the reference's state dicts, and its order of heads, for reading and writing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from x_transformers.attention.base import AttentionShape, Part
from x_transformers.errors import StateDictError
from x_transformers.modules.param_attention import ParamAttention
from x_transformers.modules.state_dict import rename, rename_prefix
from x_transformers.ops import reference_head_order, reorder_heads

_PLAIN = {
    "to_q.weight": "projections.q.weight",
    "to_latent_q.weight": "latent_q.weight",
    "to_latent_kv.weight": "latent_kv.project.weight",
    "to_rotateable_k.weight": "latent_kv.sub_keys.weight",
    "to_k.weight": "projections.k.weight",
    "to_v.weight": "projections.v.weight",
    "to_out.weight": "out.weight",
    "to_out.0.weight": "out.projection.weight",
    "to_value_residual_mix.0.weight": "value_mix.project.weight",
    "to_value_residual_mix.0.bias": "value_mix.project.bias",
    "qk_norm_q_scale": "qk_norms.qk_norm.q_scale",
    "qk_norm_k_scale": "qk_norms.qk_norm.k_scale",
    "q_rmsnorm.gamma": "qk_norms.qk_rmsnorm.q_norm.gamma",
    "k_rmsnorm.gamma": "qk_norms.qk_rmsnorm.k_norm.gamma",
    "mem_k": "keys.memory_kv.keys",
    "mem_v": "keys.memory_kv.values",
    "attend.head_attn_sink": "sink.logits",
}

_PLAIN_PER_HEAD = (
    ("projections.q.weight", 0),
    ("out.weight", 1),
    ("out.projection.weight", 1),
    ("qk_norms.qk_norm.q_scale", 0),
    ("qk_norms.qk_rmsnorm.q_norm.gamma", 0),
    ("sink.logits", 0),
)
"""Our entries with query heads, and along which axis."""


def _with_adapted(name: str, axis: int | None = None) -> list[str]:
    """Return the name of an entry, and those that it has if the module is adapted at test time.

    A matrix of low rank, `weight_a @ weight_b`, has the rows of the first factor and the columns of the second.

    Args:
        name: of the entry.
        axis: only factors with this axis; None for all.
    """
    owner, _, last = name.rpartition(".")
    if last not in ("weight", "gamma"):
        return [name]
    factors = [f"{owner}.module.weight_{factor}" for factor in ("a", "b")] if last == "weight" else []
    return [name, f"{owner}.module.{last}", *(factors if axis is None else factors[axis : axis + 1])]


_REFERENCE = {
    old: new
    for theirs, ours in _PLAIN.items()
    for old, new in zip(_with_adapted(theirs), _with_adapted(ours), strict=True)
}
_PER_HEAD = tuple((each, axis) for name, axis in _PLAIN_PER_HEAD for each in _with_adapted(name, axis))
_QUERIES = tuple(_with_adapted("to_q.weight"))
_COLUMNS = tuple(name for name, axis in _PER_HEAD if axis == 1)


class NamedWeights(Protocol):
    """Widths and parts of an attention, which decide about the names and the order of its weights."""

    shape: AttentionShape
    projections: Any
    latent_kv: Any
    latent_q_norm: Any
    switch: Any
    qk_norms: Any
    values: Any

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        ...

    def parts(self) -> dict[str, Part]:
        """Return the parts with entries of their own, by path."""
        ...


def translate(attention: NamedWeights, state: dict[str, Any], prefix: str) -> None:
    """Turn the reference's entries of an attention into ours, and reorder their heads, in place.

    Args:
        attention: the attention.
        state: of the whole model.
        prefix: of this attention.
    """
    if not any(prefix + name in state for name in _QUERIES):
        return
    for old, new in _REFERENCE.items():
        rename(state, prefix + old, prefix + new)
    if attention.projections.k is None:
        state.pop(f"{prefix}projections.k.weight", None)  # it has no rows
    parts, shape = attention.parts(), attention.shape
    rename_parts(state, prefix, parts)
    # columns first: parts describe them in the reference's order of heads, which changes below
    for mod in attention.values:
        for name in _COLUMNS:
            if prefix + name in state:
                state[prefix + name] = mod.translate_columns(state[prefix + name], shape.heads)
    order = reference_head_order(shape.heads, shape.kv_heads)
    if order is None:
        return
    _permute(state, prefix, parts, order)


def export(attention: NamedWeights, state: dict[str, Any], prefix: str) -> None:
    """Turn our entries of an attention into those of the reference, in its order of heads, in place: undo `translate`.

    Args:
        attention, state, prefix: as in `translate`.

    Raises:
        StateDictError: if a part or an entry has no counterpart.
    """
    parts, shape = attention.parts(), attention.shape
    scales = [norm.scale for norm in attention.qk_norms if norm.scale is not None] or [shape.dim_head**-0.5]
    beyond = [norm.beyond_reference for norm in attention.qk_norms if norm.beyond_reference is not None]
    if attention.projections.clip is not None:
        beyond.append("bound of queries, keys and values (`attn_qkv_clip`)")
    latent = attention.latent_kv
    if attention.latent_q_norm is not None or (latent is not None and latent.norm is not None):
        beyond.append("norm of latents (`attn_latent_norm`)")
    if latent is not None and latent.shared:
        beyond.append("key that all heads share (`attn_latent_rope_dim`)")
    if isinstance(attention.projections.q, ParamAttention):
        beyond.append("attention to parameters (`attn_param_tokens`)")
    if attention.switch is not None:
        beyond.append("choice of matrices by heads (`attn_switch_experts`)")
    for what in beyond if attention.scale == scales[-1] else ["factor of the scores (`attn_scale`)", *beyond]:
        raise StateDictError(f"the reference has no {what}; a model with it cannot be exported.")
    order = reference_head_order(shape.heads, shape.kv_heads)
    if order is not None:
        _permute(state, prefix, parts, order.argsort())
    for mod in reversed(list(attention.values)):
        for name in _COLUMNS:
            if prefix + name in state:
                state[prefix + name] = mod.export_columns(state[prefix + name], shape.heads)
    ours = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    theirs: dict[str, Any] = {}
    if attention.projections.k is None:
        values_map = ours[f"{prefix}projections.v.weight"]
        theirs[f"{prefix}to_k.weight"] = values_map.new_zeros(0, values_map.shape[1])  # a map to no features
    for name, new in _REFERENCE.items():
        if prefix + new in ours:
            theirs[prefix + name] = ours.pop(prefix + new)
    export_parts(ours, prefix, parts, into=theirs)
    if ours:
        raise StateDictError(
            f"the reference has nothing like {', '.join(sorted(ours))}; a model with it cannot be exported."
        )
    state.update(theirs)


def _permute(state: dict[str, Any], prefix: str, parts: Mapping[str, Part], order: Tensor) -> None:
    """Reorder the query heads of all entries, in place."""
    for name, axis in _PER_HEAD:
        if prefix + name in state:
            state[prefix + name] = reorder_heads(state[prefix + name], axis, order)
    for path, part in parts.items():
        part.permute_heads(state, f"{prefix}{path}.", order)


def export_parts(
    state: dict[str, Any],
    prefix: str,
    parts: Mapping[str, Part],
    within: str = "",
    into: dict[str, Any] | None = None,
) -> None:
    """Give the entries of parts the names that the parts declare: undo `rename_parts`.

    Args:
        state, prefix, parts, within: as in `rename_parts`.
        into: another dict to move the entries to; default `state`.

    Raises:
        StateDictError: if the reference has nothing like a part.
    """
    into = state if into is None else into
    for path, part in parts.items():
        if part.beyond_reference is not None:
            raise StateDictError(f"the reference has no {part.beyond_reference}; a model with it cannot be exported.")
        for name, own in part.reference.items():
            theirs, ours = prefix + name.removeprefix(within), f"{prefix}{path}.{own}"
            for key in [key for key in state if own is not None and key.startswith(ours)]:
                if key == ours or ours.endswith(".") or theirs.endswith("."):
                    into[theirs + key[len(ours) :]] = state.pop(key)


def rename_parts(state: dict[str, Any], prefix: str, parts: Mapping[str, Part], within: str = "") -> None:
    """Rename the entries that the parts declare.

    Args:
        state: entries by name, changed in place.
        prefix: of the module that the parts belong to.
        parts: by path.
        within: the beginning of the declared names that the state omits.
    """
    for path, part in parts.items():
        for name, own in part.reference.items():
            old = prefix + name.removeprefix(within)
            if own is None:
                state.pop(old, None)
            elif old.endswith("."):
                rename_prefix(state, old, f"{prefix}{path}.{own}")
            else:
                rename(state, old, f"{prefix}{path}.{own}")
