"""Early exits: predictions after a part of the blocks, and models of the first blocks (LayerSkip, 2404.16710)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from x_transformers.errors import ConfigError, InputError, StateDictError
from x_transformers.forward_pass.arguments import check_whole, checked
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.early_exit import EarlyExit
from x_transformers.layers.kinds import SELF_ATTENTION
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.parallel_blocks import check_end
from x_transformers.models.inputs import ModelInputs, TokenSpan
from x_transformers.modules.norms import Norm
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.values import shown

Shared = TypeVar("Shared", bound=nn.Module)
Given = TypeVar("Given", bound="HasExits")


class ExitNorms(ReadsReference, nn.ModuleDict):
    """Norms of the features at exits, by the number of the block.

    Args:
        blocks: numbers of the blocks.
        norm: the final norm, of which each is a copy.
    """

    def __init__(self, blocks: tuple[int, ...], norm: nn.Module) -> None:
        super().__init__()
        self.update({str(block): copy.deepcopy(norm) for block in blocks})

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no exits; a model with `exit_norms` cannot be exported.")


class HasExits(nn.Module):
    """Base class of models whose head may also predict after earlier blocks.

    Attributes:
        exit_layers: numbers of the blocks, counted from 1, in ascending order.
        exit_norms: the norms of their features, or None if the final norm serves all.
        has_config: False of a model of the first blocks of another one.
    """

    attn_layers: AttentionLayers
    exit_layers: tuple[int, ...]
    exit_norms: ExitNorms | None
    has_config: bool

    def _build_exits(self, blocks: tuple[int, ...] | None, own_norms: bool) -> None:
        stack = unwrapped(self.attn_layers)
        self.exit_layers, self.exit_norms = blocks or (), None
        if blocks and stack.batch_norms:
            raise ConfigError(
                "`exit_layers` read the stream through the final norm after several blocks, and `use_prepbn` would "
                "need statistics for each of them; use another norm."
            )
        if own_norms and blocks:
            assert stack.final_norm is not None
            self.exit_norms = ExitNorms(tuple(b for b in blocks if b < stack.sequence.blocks), stack.final_norm)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor as plain data, see `Configured.config`.

        Raises:
            ConfigError: if the model consists of the first blocks of another one.
        """
        if not self.has_config:
            raise ConfigError(
                "a model of the first blocks of another one has no configuration of its own; save that one, and call "
                "`shallow` again."
            )
        return super().config  # type: ignore[misc]

    @checked
    def shallow(self: Given, exit_layer: int) -> Given:
        """Return a model of the first blocks, which guesses tokens cheaply, for example as a `draft_model`.

        It is a view: its modules, the final norm (or that of the exit, with `exit_norms`) and the head are those of
        this model, so that training one of the two changes both.

        Args:
            exit_layer: number of the last block that runs, from 1 to the number of blocks that run minus 1.

        Raises:
            InputError: if there is no such block, or the stack cannot be used without its other blocks.
        """
        stack = unwrapped(self.attn_layers)
        if stack.skip_sources:
            raise InputError(
                "`shallow` leaves out the later blocks, but with `unet_skips` the second half reads the first; build "
                "the stack without it."
            )
        if stack.looks_back:
            raise InputError(
                "`shallow` makes a model that guesses tokens with a cache, which a PrefixDecoder cannot have; use a "
                "Decoder."
            )
        check_whole(exit_layer=exit_layer)
        check_end(exit_layer, stack.parallel_blocks)
        blocks = stack.sequence.blocks
        if not 1 <= exit_layer < blocks:
            raise InputError(
                f"a model of the first {exit_layer} blocks was requested; it must have at least 1 block, and fewer "
                f"than the {blocks} that run."
            )
        return first_blocks(self, exit_layer)


def exits_of(model: HasExits, requested: bool | Sequence[int]) -> dict[int, nn.Module | None]:
    """Return the norm of each exit, None for the final norm.

    Args:
        model: the model.
        requested: blocks of the exits; True for all of them.

    Raises:
        InputError: if the model does not have these exits.
    """
    blocks = model.exit_layers if requested is True else requested
    assert not isinstance(blocks, bool)
    if not blocks or not set(blocks) <= set(model.exit_layers):
        raise InputError(
            f"`return_exits` is {shown(requested)}, but this model has the exits {model.exit_layers}; build it with "
            "`exit_layers`, or request some of these."
        )
    norms = model.exit_norms
    return {block: None if norms is None or str(block) not in norms else norms[str(block)] for block in blocks}


def exit_outputs(
    model: Any,
    record: LayerIntermediates | None,
    inputs: ModelInputs,
    span: TokenSpan,
    excised: int,
    arguments: Mapping[str, Any] | None,
) -> dict[int, Any]:
    """Return what the model would return after each exit: logits, or features if these are requested.

    Args:
        model: the model.
        record: of the pass.
        inputs: of the pass.
        span: tokens of the pass.
        excised: number of first items that are left out.
        arguments: of the head.
    """
    assert record is not None
    assert record.exits is not None
    outputs = {}
    for block, features in record.exits.items():
        if model.pools:
            features = model._summarize(features, inputs, span)[0]
        elif excised:
            features = features[:, excised:]
        keep = inputs.logits_to_keep
        if not inputs.return_embeddings and model.to_logits is not None:
            features = model.logits_of(features[:, -keep:] if keep else features, arguments)
        outputs[block] = features
    return outputs


def exits_by_confidence(model: Any, rule: EarlyExit, arguments: Mapping[str, Any] | None) -> EarlyExit:
    """Return the rule of early exits with the head, the exits and the norms of a model.

    Args:
        model: the model.
        rule: as the caller gave it.
        arguments: of the head.

    Raises:
        InputError: if the model runs its stack several times, or predicts nothing for single tokens.
    """
    if model.recycling or model.looped:
        raise InputError(
            "`early_exit` lets tokens leave one run of the stack, and this model (`recycling` or `looped`) runs it "
            "several times; drop it."
        )
    head, norms = rule.head, model.exit_norms
    if head is None and model.to_logits is not None:
        if (model.pools or model.returns_pooled) and rule.measure != "similarity":
            raise InputError(
                f'`early_exit` has the measure "{rule.measure}", which reads logits of single tokens, and this model '
                'predicts for whole rows; use the measure "similarity".'
            )
        head = functools.partial(model.logits_of, arguments=arguments)
    return EarlyExit(
        rule.confidence,
        rule.measure,
        rule.layers or model.exit_layers or None,
        head,
        rule.norms if norms is None else {int(block): norms[block] for block in norms},
    )


def up_to_exit(model: Given, exit_layer: int | None) -> Given:
    """Return the model that predicts after a block: the first blocks, or the model itself after the last one.

    Args:
        model: the model.
        exit_layer: number of the block, counted from 1, or None for the last one.

    Raises:
        InputError: if no such block runs.
    """
    stack = unwrapped(model.attn_layers)
    blocks = stack.sequence.blocks
    if exit_layer is not None and not 1 <= exit_layer <= blocks:
        raise InputError(f"`exit_layer` is {exit_layer}; it must lie between 1 and {blocks}, the blocks that run.")
    if exit_layer is not None:
        check_end(exit_layer, stack.parallel_blocks)
    return model if exit_layer in (None, blocks) else first_blocks(model, exit_layer)


def first_blocks(model: Given, count: int) -> Given:
    """Return a model that shares the modules of another one, of which it runs the first blocks.

    Args:
        model: the model.
        count: number of blocks, at least 1.
    """
    whole = unwrapped(model.attn_layers)
    sequence = whole.sequence
    order = sequence.order[: count * sequence.block]
    built = max(order) + 1
    stack = _sharing(whole)
    stack.sequence = replace(sequence, kinds=sequence.kinds[:built], order=order, depth=min(sequence.depth, count))
    stack.depth, stack.layer_types = stack.sequence.depth, stack.sequence.kinds
    stack.steps = stack.sequence.steps(order)
    stack.layers = nn.ModuleList(list(whole.layers)[:built])
    stack.skip_sources = {layer: source for layer, source in whole.skip_sources.items() if layer < built}
    stack.skip_combines = nn.ModuleDict({str(layer): whole.skip_combines[str(layer)] for layer in stack.skip_sources})
    if whole.depth_routers is not None:
        stack.depth_routers = _sharing(whole.depth_routers)
        for block in [name for name in whole.depth_routers if int(name) * sequence.block >= built]:
            del stack.depth_routers[block]
    view = _sharing(model)
    view.attn_layers, view.has_config = stack, False
    view.exit_layers = tuple(block for block in model.exit_layers if block < count)
    norms = model.exit_norms
    if norms is not None and str(count) in norms:
        stack.final_norm = cast(Norm, norms[str(count)])
    if norms is not None:
        view.exit_norms = _sharing(norms)
        for block in [name for name in norms if int(name) >= count]:
            del view.exit_norms[block]
    return view


def arguments_of_first_blocks(model: HasExits, view: HasExits, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pass of the first blocks, without the memories of the other ones.

    Args:
        model: with all blocks.
        view: with the first ones; see `first_blocks`.
        arguments: of a pass of the model.
    """
    given, whole, part = dict(arguments), unwrapped(model.attn_layers), view.attn_layers
    letter = SELF_ATTENTION.letter
    every, kept = (stack.sequence.count(letter, stack.sequence.order) for stack in (whole, part))
    if given.get("mems") is not None:
        # memories of the self-attentions, then running states
        states = sum(len(part.sublayers[index].running) for index in part.sequence.order)
        given["mems"] = [*given["mems"][:kept], *given["mems"][every : every + states]]
    if given.get("mem_masks") is not None:
        given["mem_masks"] = given["mem_masks"][:kept]
    return given


def _sharing(module: Shared) -> Shared:
    """Return a module with the same tensors and children, which may be exchanged without changing the first one."""
    copied = copy.copy(module)
    for name, value in vars(copied).items():
        if isinstance(value, dict):
            copied.__dict__[name] = value.copy()
    return copied
