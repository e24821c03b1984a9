"""Experts that emerge in dense feedforwards: a trained model, cut into experts without training (2310.10908)."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.feedforward.activations import SoLU
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.feedforward.rational import GroupRational
from x_transformers.folders.saved import SavesFolders
from x_transformers.layers.experts import TrainsExperts, stack_of
from x_transformers.layers.stack import LayerStack
from x_transformers.modules.param_attention import ParamWeights
from x_transformers.options.values import accepts, shown

ROUNDS = 10
"""Rounds of clustering."""

Net = TypeVar("Net", bound=SavesFolders)


def to_experts(model: Net, experts: int, topk: int, **objects: Any) -> Net:
    """Return a model whose feedforwards are cut into experts, of which each token uses the ones that it excites most.

    Hidden units whose rows point in similar directions become one expert: the rows that the activation sees (in a gated
    feedforward those of the gate), as unit vectors, are clustered into groups of equal size. The router is "keys",
    which has no parameters. With `topk = experts` the model computes what the dense one does; with fewer it
    approximates it.

    Args:
        model: a stack, or a model with a stack as `attn_layers`. It is not changed.
        experts: number of experts of each feedforward; it divides their inner widths.
        topk: number of experts that each token uses.
        objects: arguments of the constructors that are no plain data, as `from_config` takes them.

    Returns:
        A new model of the same class, with the weights of the first one.

    Raises:
        ConfigError: if a feedforward cannot be cut, or a number does not fit.
    """
    for name, value, most in (("experts", experts, None), ("topk", topk, experts)):
        if not accepts(int, value) or value < 1 or (most is not None and value > most):
            bound = "at least 1" if most is None else f"between 1 and the `experts` = {most}"
            raise ConfigError(f"`{name}` is {value!r}; it must be a whole number, {bound}.")
    if not isinstance(model, TrainsExperts):
        raise ConfigError(
            f"`model` is {shown(model)}; it must be a stack, or a model with a stack as `attn_layers`, without what is "
            "around it."
        )
    stack = stack_of(model)
    functions = [branch.fn for branch in stack.sublayers if branch.kind.is_feedforward]
    dense = [_checked(fn, experts) for fn in functions]
    if not dense:
        raise ConfigError("the model has no feedforward that could be cut into experts.")
    config = copy.deepcopy(model.config)
    options = config["options"] if isinstance(model, LayerStack) else config["options"]["attn_layers"]["options"]
    widths = [mult_for(fn.down.in_features // experts, fn.dim) for fn in dense]
    options |= {"ff_experts": experts, "ff_experts_topk": topk, "ff_router": "keys", "ff_mult": tuple(widths)}
    # the map into a gated feedforward may have a bias where the output map has none, which experts share
    options["ff_no_bias"] = tuple(fn.up.bias is None and fn.down.bias is None for fn in dense)
    found = type(model).from_config(config, **objects)
    like = next(model.parameters())
    found.to(like.device, like.dtype).train(model.training)
    prefix = "" if isinstance(model, LayerStack) else "attn_layers."
    state = dict(model.state_dict())
    for index, branch in enumerate(stack.sublayers):
        if branch.kind.is_feedforward:
            assert isinstance(branch.fn, FeedForward)
            place = f"{prefix}layers.{index}.{branch.kind.module_name}."
            _cut(state, place, branch.fn, experts, topk)
    found.load_state_dict(state)
    return found


def _checked(fn: nn.Module, experts: int) -> FeedForward:
    """Return a feedforward that can be cut.

    Raises:
        ConfigError: if it cannot.
    """
    if not isinstance(fn, FeedForward):
        raise ConfigError(f"a layer of the model runs {type(fn).__name__}; only a FeedForward can be cut into experts.")
    inner = fn.down.in_features
    if type(fn.up) is not nn.Linear or type(fn.down) is not nn.Linear:
        raise ConfigError(
            f"a map of a feedforward is a {type(fn.up).__name__}; only `nn.Linear` maps can be cut into experts, not "
            "those of tied blocks or adapters."
        )
    if inner % experts:
        raise ConfigError(
            f"`experts` is {experts}, which does not divide the inner width {inner} of a feedforward; choose a divisor."
        )
    if fn.norm is not None or isinstance(fn.activation, (SoLU, ParamWeights)):
        raise ConfigError(
            "`ff_post_act_ln`, `ff_solu` and `ff_param_attention` normalize over all hidden units of a feedforward, "
            "which no expert sees; such a model cannot be cut."
        )
    if isinstance(fn.activation, GroupRational):
        raise ConfigError(
            "`ff_rational` has an activation for each group of neighboring hidden units, which clusters would mix; "
            "such a model cannot be cut."
        )
    return fn


def mult_for(inner: int, dim: int) -> float:
    """Return a factor with `int(dim * factor) == inner`."""
    exact = inner / dim
    return exact if int(dim * exact) == inner else (inner + 0.5) / dim


def _cut(state: dict[str, Tensor], place: str, fn: FeedForward, experts: int, topk: int) -> None:
    """Replace the entries of a feedforward by those of its experts, in place."""
    up, bias, down = fn.up.weight.detach(), fn.up.bias, fn.down.weight.detach()
    seen = up.chunk(2)[1] if fn.glu else up
    order = order_by_cluster(cluster_rows(seen, experts))

    def cut(t: Tensor) -> Tensor:
        """Sort the first axis of each half by cluster, and split it: to `(E, rows, ...)`."""
        halves = [half[order].unflatten(0, (experts, -1)) for half in t.chunk(2 if fn.glu else 1)]
        return torch.cat(halves, dim=1)

    for name in ("up.weight", "up.bias", "down.weight", "down.bias"):
        state.pop(f"{place}{name}", None)
    state[f"{place}up"] = cut(up)
    state[f"{place}down"] = down[:, order].unflatten(1, (experts, -1)).transpose(0, 1).contiguous()
    if bias is None and fn.down.bias is None:
        return
    # every token adds the biases of k experts
    added = down.new_zeros(down.shape[0]) if fn.down.bias is None else fn.down.bias.detach() / topk
    state[f"{place}down_bias"] = added.expand(experts, -1).contiguous()
    if bias is not None:
        state[f"{place}up_bias"] = cut(bias.detach())
    if fn.gate_scale is not None:
        state[f"{place}gate_scale"] = fn.gate_scale.detach()[order].unflatten(0, (experts, -1))


def order_by_cluster(cluster: Tensor) -> Tensor:
    """Return the order `(H,)` of units by their cluster `(H,)`, in which those of one cluster keep their order."""
    return cluster.argsort(stable=True)


def cluster_rows(rows: Tensor, count: int) -> Tensor:
    """Return the cluster `(H,)` of each row `(H, D)`, of `count` clusters of equal size.

    Spherical k-means: centers are means of unit vectors. In each round the rows choose one after the other, those first
    that would lose most by their second choice. Nothing is random.
    """
    rows = F.normalize(rows.detach().double(), dim=-1)
    size = rows.shape[0] // count
    centers = rows[_far_apart(rows, count)]
    cluster = torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)
    for _ in range(ROUNDS):
        chosen = _assign(rows @ centers.T, size)
        if torch.equal(chosen, cluster):
            break
        cluster = chosen
        centers = torch.stack([rows[cluster == each].mean(dim=0) for each in range(count)])
        centers = F.normalize(centers, dim=-1)
    return cluster


def _far_apart(rows: Tensor, count: int) -> list[int]:
    """Return `count` rows, each the least similar to those before it, from the first one on."""
    chosen = [0]
    nearest = rows @ rows[0]
    for _ in range(count - 1):
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, rows @ rows[chosen[-1]])
    return chosen


def _assign(similarity: Tensor, size: int) -> Tensor:
    """Return the cluster `(H,)` of each row by similarities `(H, E)`, of `size` rows each."""
    best = similarity.topk(min(2, similarity.shape[1]), dim=-1).values
    loss = best[:, 0] - best[:, -1]
    preferred = similarity.argsort(dim=-1, descending=True, stable=True).tolist()
    left = [size] * similarity.shape[1]
    cluster = [0] * similarity.shape[0]
    for row in loss.argsort(descending=True, stable=True).tolist():
        cluster[row] = next(each for each in preferred[row] if left[each])
        left[cluster[row]] -= 1
    return torch.tensor(cluster, device=similarity.device)
