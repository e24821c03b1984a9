"""The modules that are adapted at test time: paths to wrappers, in whose place they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from x_transformers.errors import ConfigError
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.layers.branch import Branch
from x_transformers.layers.depth.base import DepthReader
from x_transformers.layers.stack import LayerStack
from x_transformers.models.embeddings import TokenEmbedding
from x_transformers.models.heads import TiedLogits
from x_transformers.modules.lora import LoRALinear
from x_transformers.modules.norms import MultiheadRMSNorm, Norm
from x_transformers.modules.second_names import View
from x_transformers.options.values import accepts, shown
from x_transformers.test_time.episodic import PATH, EpisodicMemories, EpisodicMemoryWrapper
from x_transformers.test_time.row_weights import LowRankLinear, TTTModuleWrapper

ADAPTABLE = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    Norm,
    MultiheadRMSNorm,
    LoRALinear,
    LowRankLinear,
    TokenEmbedding,
    FeedForward,
    EpisodicMemories,
)
"""Modules that map each token by itself, so that rows of a batch may have weights of their own."""

Path = str | tuple[str, str] | Sequence[str]


class Pair(NamedTuple):
    """Two wrappers, perhaps the same: gradients of the source's weights update the target's."""

    source: TTTModuleWrapper
    target: TTTModuleWrapper


class _Place(NamedTuple):
    """A place that is to be adapted.

    Attributes:
        option: the keyword that names it.
        path: its path.
        owner: the module that contains it.
        name: the attribute of the owner.
        module: what is there.
        rank: of the matrix that replaces it, or None.
    """

    option: str
    path: str
    owner: nn.Module
    name: str
    module: nn.Module
    rank: int | None = None


def get_module_by_path(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path.

    Raises:
        ConfigError: naming the path, and the part that is not there.
    """
    found: Any = model
    for name in path.split("."):
        inner = getattr(found, name, None)
        if not isinstance(inner, nn.Module):
            parts = ", ".join(dict(found.named_children())) or "none"
            raise ConfigError(
                f"there is no module {path!r} in {type(model).__name__}: {type(found).__name__} has no part {name!r} "
                f"(its parts: {parts})."
            )
        found = inner
    return found


def set_module_by_path(model: nn.Module, path: str, new_mod: nn.Module) -> None:
    """Put a module into the place at a dotted path.

    Raises:
        ConfigError: if there is no such place.
    """
    get_module_by_path(model, path)
    owner, _, name = path.rpartition(".")
    setattr(get_module_by_path(model, owner) if owner else model, name, new_mod)


def adapt_places(
    net: nn.Module, module_paths: Sequence[Path], low_rank_paths: Sequence[tuple[str, int]]
) -> tuple[Pair, ...]:
    """Wrap the modules at paths, and return which one updates which. Either all are wrapped or none.

    Args:
        net: the model, perhaps in an `EpisodicMemoryWrapper`, whose memory then has the path "episodic_mems".
        module_paths: paths in the model, or pairs of them, source and target.
        low_rank_paths: pairs of the path of a linear map and the rank of the matrix that replaces its own.

    Raises:
        ConfigError: naming a path that does not lead to a module, or to one that cannot be adapted.
    """
    both = [_both(each) for each in module_paths]
    places = {path: _find(net, "ttt_module_paths", path) for pair in both for path in pair}
    for each in low_rank_paths:
        if not (isinstance(each, Sequence) and len(each) == 2 and accepts(str, each[0]) and accepts(int, each[1])):
            raise ConfigError(f"`ttt_low_rank_paths` contains {shown(each)}; it holds pairs of a path and a rank.")
        path, rank = each
        if path in places:
            raise ConfigError(f"{path!r} is named twice, in `ttt_low_rank_paths` for a second time; name it once.")
        places[path] = _find(net, "ttt_low_rank_paths", path, rank)
        both.append((path, path))
    for place in places.values():
        _check_adaptable(net, place)
    modules = {path: _replacement(place) for path, place in places.items()}
    _check_apart(places)
    for source, target in both:
        _check_shapes(source, modules[source], target, modules[target])
    wrappers: dict[int, TTTModuleWrapper] = {}
    for path, place in places.items():
        # two paths may lead to one module, and another wrapper may have adapted it before
        wrapper = place.module if isinstance(place.module, TTTModuleWrapper) else wrappers.get(id(place.module))
        if wrapper is None:
            wrapper = TTTModuleWrapper(modules[path]).train(place.module.training)
            setattr(place.owner, place.name, wrapper)
        wrappers[id(place.module)] = wrapper
    by_path = {path: wrappers[id(place.module)] for path, place in places.items()}
    return tuple(Pair(by_path[source], by_path[target]) for source, target in both)


def _both(path: Any) -> tuple[str, str]:
    if isinstance(path, str):
        return path, path
    if isinstance(path, Sequence) and len(path) == 2 and all(isinstance(each, str) for each in path):
        return path[0], path[1]
    raise ConfigError(
        f"`ttt_module_paths` contains {shown(path)}; it holds paths, or pairs of the paths of a source and a target."
    )


def _find(net: nn.Module, option: str, path: str, rank: int | None = None) -> _Place:
    root: nn.Module = net
    if isinstance(net, EpisodicMemoryWrapper) and path.partition(".")[0] != PATH:
        root = net.net
    try:
        module = get_module_by_path(root, path)
    except ConfigError as error:
        raise ConfigError(f"`{option}`: {error}") from None
    owner, _, name = path.rpartition(".")
    return _Place(option, path, get_module_by_path(root, owner) if owner else root, name, module, rank)


def _replacement(place: _Place) -> nn.Module:
    """Return the module that is to be wrapped."""
    module = place.module.module if isinstance(place.module, TTTModuleWrapper) else place.module
    if place.rank is None:
        return module
    if not isinstance(module, nn.Linear) or isinstance(place.module, TTTModuleWrapper):
        what = "is adapted already" if module is not place.module else f"is of type {type(module).__name__}"
        raise ConfigError(
            f"`{place.option}` names {place.path!r}, which {what}; it must be a linear map (`nn.Linear`)."
        )
    try:
        return LowRankLinear(module, place.rank).train(module.training)
    except ConfigError as error:
        raise ConfigError(f"`{place.option}` names {place.path!r}: {error}") from None


def _check_adaptable(net: nn.Module, place: _Place) -> None:
    module, start = place.module, f"`{place.option}` names {place.path!r}"
    if isinstance(module, TTTModuleWrapper):
        return
    if isinstance(module, View):
        names = " or ".join(f"'{place.path}.{name}'" for name, each in module.named_children())
        raise ConfigError(f"{start}, several modules in a row; name one of them: {names}.")
    if not isinstance(module, ADAPTABLE) or (isinstance(module, Norm) and module.adaptive):
        raise ConfigError(
            f"{start}, which is of type {type(module).__name__}; only modules that map each token by itself can have "
            "weights for each row: linear maps, norms without a condition, embeddings and feedforwards."
            f"{_adaptable_inside(place)}"
        )
    if not any(True for _ in module.parameters()):
        raise ConfigError(f"{start}, which has no parameters, so that nothing could be adapted.")
    if any(isinstance(each, TTTModuleWrapper) for each in module.modules()):
        raise ConfigError(f"{start}, and a module inside of it is adapted too; name one of both.")
    for where, why in _read_at_once(net):
        if module in where.modules():
            raise ConfigError(f"{start}, {why}, so that it cannot have weights for each row; adapt another module.")
    tied = [each for each in net.modules() if isinstance(each, TiedLogits)]
    if any(module in (each._model[0].token_emb, *each._model[0].token_emb.modules()) for each in tied):
        raise ConfigError(
            f"{start}, whose table is also that of the logits (`tie_embedding`), where it would not be adapted; set "
            "`tie_embedding = False`, or adapt another module."
        )


def _read_at_once(net: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield parts of a model that are not called with the tokens of one layer `(b, n, D)`, and what they read."""
    for each in net.modules():
        if isinstance(each, DepthReader):
            yield each, "a part of a depth reader, which reads all layers at once"
        elif isinstance(each, Branch):
            if each.views > 1 and each.norm is not None:
                yield each.norm, "which reads separate inputs of queries, keys and values at once"
        elif isinstance(each, LayerStack) and each.rel_pos is not None:
            yield each.rel_pos, "a part of a bias of positions, which reads no tokens"


def _check_apart(places: Mapping[str, _Place]) -> None:
    for path, place in places.items():
        for other, inner in places.items():
            if inner.module is not place.module and inner.module in place.module.modules():
                raise ConfigError(
                    f"{path!r} and {other!r} are to be adapted, and one is inside of the other; name one."
                )


def _adaptable_inside(place: _Place) -> str:
    found = list(_adaptable_names(place.module, place.path))[:3]
    return f" Inside of it there are {', '.join(map(repr, found))}." if found else ""


def _adaptable_names(module: nn.Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, ADAPTABLE):
            yield f"{path}.{name}"
        else:
            yield from _adaptable_names(child, f"{path}.{name}")


def _check_shapes(source: str, one: nn.Module, target: str, other: nn.Module) -> None:
    shapes = [[tuple(p.shape) for p in module.parameters()] for module in (one, other)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"`ttt_module_paths` pairs {source!r} with parameters {shapes[0]} and {target!r} with {shapes[1]}; their "
            "shapes must be equal, since gradients of the one update the other."
        )
