"""Blocks that share their linear maps, and differ in what is small (relaxed recursion, 2410.20672).

Such blocks are built one by one, as those of a stack without tied layers are: caches, records and values by layer see
no difference. Afterwards each linear map of a tied block uses the matrix of the first block that it is tied to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import nn

from x_transformers.attention.head_maps import HeadMaps, HeadOutput
from x_transformers.errors import ConfigError
from x_transformers.feedforward.expert_networks import ExpertNetworks
from x_transformers.layers.branch import Branch
from x_transformers.layers.branches.shared_norm import SharedNorm
from x_transformers.layers.execution_order import tied_to
from x_transformers.layers.plan import StackPlan
from x_transformers.modules.tied_linear import TiedLinear

Map = TypeVar("Map", nn.Linear, TiedLinear)

NORMS = ("norm", "output_norm", "stream_norm")
"""Attributes of sublayers that hold norms."""

CHOOSING = (ExpertNetworks, HeadMaps, HeadOutput)
"""Modules with stacks of matrices that tokens choose among, or mix."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
PACKAGE = __name__.partition(".")[0]


def tie_blocks(sublayers: Sequence[Branch], plan: StackPlan) -> None:
    """Tie the blocks of a stack, in place, if its options say so.

    Args:
        sublayers: all of the stack, as they were built.
        plan: of the stack.

    Raises:
        ConfigError: if blocks do not fit each other, or the rank does not fit the maps.
    """
    options = plan.options
    if not options.on("relaxed_recursion"):
        return
    own, block = options["relaxed_recursion"], plan.sequence.block
    groups: dict[tuple[int, int], list[Branch]] = {}
    for index, branch in enumerate(sublayers):
        number, place = divmod(index, block)
        groups.setdefault((tied_to(options, number), place), []).append(branch)
    _check_rank(own.tie_lora_rank, groups.values())
    for branches in groups.values():
        tie_maps([branch.fn for branch in branches], own.tie_lora_rank)
        if not own.tie_own_norms:
            _tie_norms(branches)


def tie_maps(functions: Sequence[nn.Module], rank: int | None) -> None:
    """Let functions use the matrices of the first one that has a map of the same path, in place.

    Args:
        functions: of the same class.
        rank: of what each map adds, at most that of the map; None: nothing, and biases are tied too.

    Raises:
        ConfigError: if the functions or their maps differ.
    """
    owners: dict[str, tuple[nn.Module, nn.Linear]] = {}
    for fn in functions:
        if type(fn) is not type(functions[0]):
            raise ConfigError(
                f"tied blocks run the same functions, but a {type(functions[0]).__name__} and a {type(fn).__name__} "
                "are to be tied; choose one of them for all blocks."
            )
        for path, parent, name, linear in list(linear_maps(fn)):
            owner, first = owners.get(path, (None, linear))
            if (first.weight.shape, first.bias is None) != (linear.weight.shape, linear.bias is None):
                raise ConfigError(
                    f"tied blocks share the matrix of `{path}`, which is {_described(first)} in one of them and "
                    f"{_described(linear)} in another; give keywords of widths and biases one value for all layers."
                )
            tied: nn.Module = linear
            if rank is not None:
                tied = TiedLinear(linear, owner, min(rank, linear.in_features, linear.out_features))
            elif owner is not None:
                tied = TiedLinear(linear, owner)
            if tied is not linear:
                setattr(parent, name, tied)
            owners.setdefault(path, (tied, linear))


def linear_maps(
    module: nn.Module, kind: type[Map] = nn.Linear, prefix: str = ""
) -> Iterator[tuple[str, nn.Module, str, Map]]:
    """Yield the path, parent, name and module of each linear map in modules of this library.

    Args:
        module: where to look. Modules of the user's in it are left out, which may do anything with the maps in them.
        kind: class of the maps: those that are not tied, or those that are.
        prefix: of the paths.
    """
    for name, child in module._modules.items():
        path = f"{prefix}{name}"
        if isinstance(child, kind) and type(child) is kind:
            yield path, module, name, child
        elif isinstance(child, CONTAINERS) or type(child).__module__.partition(".")[0] == PACKAGE:
            assert child is not None
            yield from linear_maps(child, kind, f"{path}.")


def _described(linear: nn.Linear) -> str:
    bias = "without" if linear.bias is None else "with"
    return f"{linear.out_features} x {linear.in_features} {bias} a bias"


def _check_rank(rank: int | None, groups: Iterable[Sequence[Branch]]) -> None:
    """Raise a `ConfigError` if no map has this rank, or if there are experts."""
    functions = [branch.fn for branches in groups for branch in branches]
    if any(isinstance(module, CHOOSING) for fn in functions for module in fn.modules()):
        raise ConfigError(
            "`tie_lora_rank` and `tie_own_norms` tie blocks by their linear maps, and those of experts and of "
            "`attn_switch_experts` are stacks of matrices; drop them, or give fewer layers more experts instead."
        )
    maps = [linear for fn in functions for *_, linear in linear_maps(fn)]
    most = max((min(linear.weight.shape) for linear in maps), default=0)
    if rank is not None and rank > most:
        raise ConfigError(
            f"`tie_lora_rank` is {rank}, and no map of the tied blocks has a higher rank than {most}, so that more "
            f"adds nothing; it must lie between 1 and {most}."
        )


def _tie_norms(branches: Sequence[Branch]) -> None:
    """Let sublayers use the norms of the first of them."""
    for name in NORMS:
        owner = next((branch for branch in branches if getattr(branch, name) is not None), None)
        for branch in branches:
            if owner is not None and branch is not owner and getattr(branch, name) is not None:
                setattr(branch, name, SharedNorm(owner, name))
