"""Recursive models from trained ones: tied blocks, and low-rank maps for what differs (2410.20672)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.folders.saved import SavesFolders
from x_transformers.layers.experts import TrainsExperts, stack_of
from x_transformers.layers.stack import LayerStack
from x_transformers.layers.tied_blocks import linear_maps
from x_transformers.modules.tied_linear import TiedLinear
from x_transformers.options.values import hints_of, misfits, plain, shown

Net = TypeVar("Net", bound=SavesFolders)
Start = Literal["average", "lower", "stepwise"]


def to_recursive(
    model: Net,
    blocks: int,
    rank: int | None,
    init: Start = "stepwise",
    order: Literal["cycle", "sequence"] = "cycle",
    **objects: Any,
) -> Net:
    """Return a model with fewer different blocks, each of which runs several times.

    Blocks that become tied share the matrices W of their linear maps. What block t had more than W, `W_t - W`, becomes
    a product `B A` of this rank, the best one: what is missing are the smallest singular values. Everything else
    (norms, biases, gains) is each block's own, so that at full rank the model computes what it did before.

    Args:
        model: a stack, or a model with a stack as `attn_layers`, of blocks of equal widths. It is not changed.
        blocks: number of different blocks; it divides the number of blocks.
        rank: of the products; None: there are none, and biases are tied too.
        init: where W comes from: "average" of the tied blocks, the "lower" ones (the first `blocks`), or "stepwise",
            those at equal distances.
        order: `tie_order` of the new model: which blocks are tied.
        objects: arguments of the constructors that are no plain data, as `from_config` takes them.

    Returns:
        A new model of the same class, with `tie_blocks`, `tie_lora_rank` and `tie_own_norms`.

    Raises:
        ConfigError: if blocks differ or are tied already, or a number does not fit.
    """
    given = {
        name: plain(value) for name, value in (("blocks", blocks), ("rank", rank), ("init", init), ("order", order))
    }
    for sentence in misfits(hints_of(to_recursive), given):
        raise ConfigError(sentence)
    if not isinstance(model, TrainsExperts):
        raise ConfigError(
            f"`model` is {shown(model)}; it must be a stack, or a model with a stack as `attn_layers`, without what is "
            "around it."
        )
    stack = stack_of(model)
    if {"weight_tying", "execute_order"} & set(stack.features):
        raise ConfigError("blocks of the model run several times already; convert a model that runs each block once.")
    config = copy.deepcopy(model.config)
    options = config["options"] if isinstance(model, LayerStack) else config["options"]["attn_layers"]["options"]
    options |= {"tie_blocks": given["blocks"], "tie_lora_rank": given["rank"], "tie_own_norms": True}
    options |= {"tie_order": order} if blocks > 1 else {}
    found = type(model).from_config(config, **objects)
    like = next(model.parameters())
    found.to(like.device, like.dtype).train(model.training)
    prefix = "layers." if isinstance(model, LayerStack) else "attn_layers.layers."
    new, size = stack_of(found), stack.sequence.block
    before = model.state_dict()
    state = dict(before)
    names = [f"{prefix}{index}.{branch.kind.module_name}." for index, branch in enumerate(new.sublayers)]
    for maps in _tied_maps(new):
        number, part = divmod(maps[0].sublayer, size)
        group = number % blocks if order == "cycle" else number * blocks // new.depth
        # of the first blocks, or of those at equal distances
        source = size * (group if init == "lower" else group * (new.depth // blocks)) + part
        chosen = None if init == "average" else names[source] + maps[0].path
        _tie(state, before, [names[each.sublayer] + each.path for each in maps], maps[-1].module, chosen)
    found.load_state_dict(state)
    return found


class _Map(NamedTuple):
    """A linear map: the number of its sublayer, its path in the function of this, and the module."""

    sublayer: int
    path: str
    module: TiedLinear | nn.Linear


def _tied_maps(stack: LayerStack) -> Iterator[list[_Map]]:
    """Yield the maps that share each matrix, the owner first."""
    found: dict[int, list[_Map]] = {}
    for index, branch in enumerate(stack.sublayers):
        plain = [_Map(index, path, linear) for path, _, _, linear in linear_maps(branch.fn)]
        tied = [_Map(index, path, linear) for path, _, _, linear in linear_maps(branch.fn, TiedLinear)]
        for each in (*plain, *tied):
            owner = each.module.owner if isinstance(each.module, TiedLinear) else each.module
            found.setdefault(id(owner), []).append(each)
    for maps in found.values():
        if isinstance(maps[-1].module, TiedLinear):
            yield maps


def _tie(
    state: dict[str, Tensor],
    before: Mapping[str, Tensor],
    names: Sequence[str],
    module: TiedLinear | nn.Linear,
    chosen: str | None,
) -> None:
    """Replace the entries of maps by those of tied ones, in place.

    Args:
        state: entries of all maps.
        before: the same, which are not changed.
        names: of the maps, that of the owner first.
        module: one of the new maps.
        chosen: the map whose matrix is shared; None: the average of all. The first one, if there is no such map.
    """
    low_rank = module.lora_a if isinstance(module, TiedLinear) else None
    for entry in ("weight", "bias") if low_rank is None else ("weight",):
        if f"{names[0]}.{entry}" not in before:
            continue
        own = [before[f"{name}.{entry}"].double() for name in names]
        shared = torch.stack(own).mean(dim=0)
        if chosen is not None:
            shared = before.get(f"{chosen}.{entry}", own[0]).double()
        for name, values in zip(names, own, strict=True):
            del state[f"{name}.{entry}"]
            if low_rank is not None:
                left, sizes, right = torch.linalg.svd(values - shared, full_matrices=False)
                rank = low_rank.out_features
                state[f"{name}.lora_a.weight"] = right[:rank]
                state[f"{name}.lora_b.weight"] = left[:, :rank] * sizes[:rank]
        state[f"{names[0]}.{entry}"] = shared
