"""Feedforwards of pretrained decoders that are mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from x_transformers.pretrained.base import Outline, Settings, multiple
from x_transformers.pretrained.layouts import SAME, SWAPPED, Layout, joined

STACKED_GATE_FIRST = Layout(
    lambda theirs: [theirs.roll(theirs.shape[1] // 2, 1)], lambda ours: [ours.roll(ours.shape[1] // 2, 1)]
)
"""Maps of all experts in one tensor `(E, 2 inner, D)`, of the gate first, which is last in ours."""


def pairs_of_experts(count: int) -> Layout:
    """Return the layout of the two maps `(inner, D)` into each expert, of the value and of the gate by turns.

    Args:
        count: number of experts.
    """
    return Layout(
        lambda *theirs: [torch.cat(theirs).unflatten(0, (count, -1))],
        lambda ours: list(ours.flatten(0, 1).chunk(2 * count)),
    )


STACKED_MAPS = Layout(lambda *theirs: [torch.stack(theirs)], lambda ours: list(ours.unbind(0)))
"""One map of each expert, `(D, inner)`, which are one tensor of ours."""


@dataclass(frozen=True)
class ExpertNames:
    """Names of the tensors in a block of a family.

    Attributes:
        router: the matrix of the router.
        experts: prefix of an expert, before its number; or of tensors that hold all experts.
        maps: value, gate and output of an expert; or the map into all experts and that out of them.
        shared: prefix of the shared feedforward.
        shared_maps: value, gate and output of it; or one map into it and that out of it.
        shared_gate: the row that gates the shared feedforward; "" for none.
        router_bias: the bias of the router's logits; "" for none.
        choice_bias: the bias of the choice of experts; "" for none.
        layouts: of the map into all experts and of that out of them.
        biases: the bias of the map into all experts, and of that out of them; empty for none.
        bias_layout: of the first of these.
    """

    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts."
    maps: tuple[str, ...] = ("up_proj.weight", "gate_proj.weight", "down_proj.weight")
    shared: str = ""
    shared_maps: tuple[str, ...] = ("up_proj.weight", "gate_proj.weight", "down_proj.weight")
    shared_gate: str = ""
    router_bias: str = ""
    choice_bias: str = ""
    layouts: tuple[Layout, Layout] = (STACKED_GATE_FIRST, SAME)
    biases: tuple[str, ...] = ()
    bias_layout: Layout = SAME


GATED_SHARED = ExpertNames(shared="mlp.shared_expert.", shared_gate="mlp.shared_expert_gate.weight")
"""Those of Qwen."""


@dataclass(frozen=True)
class ExpertBlocks:
    """Which blocks of a decoder have experts, and how many.

    Attributes:
        count, topk: numbers E and k.
        inner: width of one expert.
        normalize: weights of the chosen experts are divided by their sum.
        sparse: for each block, True if it has experts.
        shared: width of the shared feedforward; 0 for none.
        balance: weight of the balance loss.
        names: of the tensors.
        router: further keywords of the router.
    """

    count: int
    topk: int
    inner: int
    normalize: bool
    sparse: tuple[bool, ...]
    shared: int = 0
    balance: float = 0.0
    names: ExpertNames = ExpertNames()
    router: Mapping[str, Any] = field(default_factory=dict)

    def words(self, dim: int, dense: float) -> dict[str, Any]:
        """Return the keywords of the feedforwards of a stack of width `dim`, whose dense ones have a factor."""
        words: dict[str, Any] = {
            "ff_experts": self.count,
            "ff_mult": multiple(dim, self.inner),
            "ff_experts_topk": self.topk,
            "ff_router_normalize": self.normalize,
            # without their factor 1 / k
            "ff_balance_loss_weight": self.balance * self.topk,
            **self.router,
        }
        if self.names.router_bias:
            words["ff_router_bias"] = True
        if self.names.choice_bias:
            words["ff_balance_bias"] = True
        if self.shared:
            words |= {"ff_shared_mult": multiple(dim, self.shared), "ff_shared_gate": bool(self.names.shared_gate)}
        if not all(self.sparse):
            words["ff_experts"] = tuple(self.count if sparse else None for sparse in self.sparse)
            words["ff_mult"] = tuple(words["ff_mult"] if sparse else dense for sparse in self.sparse)
        return words if any(self.sparse) else {}

    def put(self, outline: Outline, ours: str, theirs: str) -> None:
        """Link the weights of one block, between the prefix of ours and that of the block in the files."""
        names = self.names
        for mine, name in (
            ("weight", names.router),
            ("bias", names.router_bias),
            ("score_bias", names.choice_bias),
        ):
            if name:
                outline.put(f"{ours}router.{mine}", theirs + name)
        *into, out = names.maps
        if len(into) == 1:
            for mine, name, layout in zip(("up", "down"), names.maps, names.layouts, strict=True):
                outline.put(ours + mine, f"{theirs}{names.experts}{name}", layout=layout)
        else:
            each = [f"{theirs}{names.experts}{expert}." for expert in range(self.count)]
            both = [expert + name for expert in each for name in into]
            outline.put(f"{ours}up", *both, layout=pairs_of_experts(self.count))
            outline.put(f"{ours}down", *(expert + out for expert in each), layout=STACKED_MAPS)
        if names.biases:
            for mine, name, layout in zip(("up", "down"), names.biases, (names.bias_layout, SAME), strict=True):
                outline.put(f"{ours}{mine}_bias", f"{theirs}{names.experts}{name}", layout=layout)
        if not self.shared:
            return
        *into, out = names.shared_maps
        layout = SWAPPED if len(into) == 1 else joined(2)
        outline.put(f"{ours}shared.up.weight", *(theirs + names.shared + name for name in into), layout=layout)
        outline.put(f"{ours}shared.down.weight", theirs + names.shared + out)
        if names.shared_gate:
            outline.put(f"{ours}shared_gate.weight", theirs + names.shared_gate)


def every_block(settings: Settings, names: ExpertNames, *, normalize: bool, shared: int = 0) -> ExpertBlocks:
    """Return blocks that all have experts, whose width is `intermediate_size`."""
    settings.rename(num_local_experts="num_experts")
    return ExpertBlocks(
        settings.need("num_experts"),
        settings.need("num_experts_per_tok"),
        settings.need("intermediate_size"),
        normalize,
        (True,) * settings.need("num_hidden_layers"),
        shared,
        settings.take("router_aux_loss_coef", 0.0),
        names,
    )


def some_blocks(
    settings: Settings, names: ExpertNames, *, count: int, topk: int, normalize: bool = False, shared: int = 0
) -> ExpertBlocks:
    """Return blocks of which every `decoder_sparse_step`-th has experts, apart from `mlp_only_layers`.

    Args:
        settings: the configuration.
        names: of the tensors.
        count, topk, normalize: values of entries that are missing.
        shared: width of the shared feedforward.
    """
    settings.rename(num_local_experts="num_experts")
    count, step = settings.take("num_experts", count), settings.take("decoder_sparse_step", 1)
    dense = settings.take("mlp_only_layers", ())
    sparse = [
        block not in dense and count > 0 and (block + 1) % step == 0
        for block in range(settings.need("num_hidden_layers"))
    ]
    return ExpertBlocks(
        count,
        settings.take("num_experts_per_tok", topk),
        # without experts nothing has this width
        settings.need("moe_intermediate_size") if any(sparse) else settings.take("moe_intermediate_size", 0),
        settings.take("norm_topk_prob", normalize),
        tuple(sparse),
        shared,
        settings.take("router_aux_loss_coef", 0.0),
        names,
    )


def inner_widths(words: Mapping[str, Any]) -> tuple[int, int]:
    """Return the widths of one expert and of the dense feedforwards in the keywords of a model.

    The second is that of an expert if there is none. Raises a `KeyError` without experts, and a `ValueError` if layers
    differ in more than that.
    """
    counts, mults = (
        each if isinstance(each, tuple) else (each,) * len(words["layers"])
        for each in (words["ff_experts"], words["ff_mult"])
    )
    sparse = {int(words["dim"] * mult) for count, mult in zip(counts, mults, strict=False) if count is not None}
    dense = {int(words["dim"] * mult) for count, mult in zip(counts, mults, strict=False) if count is None}
    (inner,) = sparse
    (other,) = dense or sparse
    return inner, other


def one_of(value: Any) -> Any:
    """Return the value of the layers with experts, of a keyword with one value or one for each layer.

    Raises a `ValueError` if they have several.
    """
    (found,) = {each for each in (value if isinstance(value, tuple) else (value,)) if each is not None}
    return found


def expert_entries(words: Mapping[str, Any], *, count: str = "num_experts") -> dict[str, Any]:
    """Return the entries of numbers of experts.

    Args:
        words: keywords of a model.
        count: the entry with the number of experts.
    """
    topk, weight = one_of(words["ff_experts_topk"]), one_of(words.get("ff_balance_loss_weight") or 0.0)
    return {count: one_of(words["ff_experts"]), "num_experts_per_tok": topk, "router_aux_loss_coef": weight / topk}


def shared_entries(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of the width of the shared feedforward."""
    return {"shared_expert_intermediate_size": int(words["dim"] * one_of(words["ff_shared_mult"]))}


def sparse_entries(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that say which blocks have experts, and how wide they are."""
    experts = words["ff_experts"]
    inner, dense = inner_widths(words)
    by_block = experts if isinstance(experts, tuple) else ()
    return {
        "moe_intermediate_size": inner,
        "intermediate_size": dense,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [block for block, each in enumerate(by_block) if each is None],
        "norm_topk_prob": one_of(words["ff_router_normalize"]),
    }
