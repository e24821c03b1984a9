"""The parts of a stack: sublayers in their order, and the parts before, between and after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.base import QKTransform, ScoreMod
from x_transformers.attention.qk.by_layer import TransformsByLayer
from x_transformers.cache import Shape
from x_transformers.errors import ConfigError, Faults, InputError
from x_transformers.layers.branch import Branch
from x_transformers.layers.branches.norm_placement import norm_places
from x_transformers.layers.branches.shared_norm import share_norms
from x_transformers.layers.build import build_branch, check_value_residual, norm_of
from x_transformers.layers.compile_blocks import CompiledBlocks
from x_transformers.layers.conditioning import build_condition, build_injection
from x_transformers.layers.depth_routing import CHOSEN, DepthRouter, build_depth_routers, check_whole_blocks
from x_transformers.layers.execution_order import Repeat, check_order, repeated
from x_transformers.layers.kinds import CROSS_ATTENTION, FEEDFORWARD, MIXER, SELF_ATTENTION
from x_transformers.layers.packing import check_apart, packed_kinds
from x_transformers.layers.parallel_blocks import check_groups
from x_transformers.layers.plan import StackPlan
from x_transformers.layers.residuals.streams import HyperConnection
from x_transformers.layers.tied_blocks import tie_blocks
from x_transformers.layers.unet import ConcatCombine, check_sources, skip_sources
from x_transformers.modules.norms import ADAPTIVE
from x_transformers.modules.prepbn import number_norms
from x_transformers.options.values import accepts, shown


class LayerStack(nn.Module):
    """Abstract base class of stacks: the parts, built from a plan. A pass through them is in `begin_pass` and `runner`.

    Args:
        plan: options and sublayers.
        dim: width D of the residual stream.
        causal: self-attention sees only the past.

    Attributes:
        depth: number of blocks. heads: number of query heads.
        layers: the built sublayers. sequence: their order. steps: what runs in this order.
        layer_types: the letter of each built sublayer's kind.
        parallel: the sublayers of a block read the same stream.
        pre_norm, sandwich_norm, pre_and_post_norm: placement of the norms.
        residual_attn, cross_residual_attn: scores are added to those of the next attention.
        frame: expands the input to several residual streams and collapses them, or None.
        rel_pos: the score modification that all self-attentions share, or None.
        rotary_pos_emb, polar_pos_emb: query/key transforms of self-attention, or None.
        rotates_by_layer: self-attentions have different transforms.
        skip_sources: built sublayer -> the place in the order of execution whose stream it reads too.
        skip_combines: the maps that join the two.
        parallel_blocks: number of blocks that read the same stream.
        depth_routers: built block -> the choice of the tokens that it runs; None if blocks run all tokens.
        checkpoint_every: one of this number of blocks runs again for its gradients; None: none does.
        context_dropout: fraction of the context's tokens that is dropped in training.
        one_context: all cross-attentions see the same part of the context.
        output_clamp: bound of the output, or None. final_norm: norm of the output, or None.
        reference_mix: residual streams are mixed as in the reference.
        packed: letters of the kinds that keep the documents of packed rows apart.
        batch_norms: some norms need statistics of batches.
        compiled: runs each sublayer by a graph of its own, after `compile_blocks()`; else None.

    Raises:
        ConfigError: listing everything that the parts refuse.
    """

    looks_back = False
    """Tokens see their past although the stack is not causal, so that parts that mix neighbors must look back only."""

    def __init__(self, plan: StackPlan, dim: int, causal: bool) -> None:
        super().__init__()
        options, structure = plan.options, plan.options["structure"]
        self.dim, self.depth, self.heads, self.causal = dim, plan.sequence.depth, structure.heads, causal
        self.sequence = plan.sequence
        self.steps = plan.sequence.steps(plan.sequence.order)
        self.cross_attend, self.only_cross = structure.cross_attend, structure.only_cross
        self.layer_types = plan.sequence.kinds
        self.parallel: bool = options["parallel_block"].parallel_block
        self.features = tuple(feature.name for feature in options.enabled())
        norms, scores = options["norm_placement"], options["residual_scores"]
        self.pre_norm: bool = norms.before
        self.sandwich_norm, self.pre_and_post_norm = norms.sandwich_norm, norms.pre_and_post_norm
        self.residual_attn, self.cross_residual_attn = scores.residual_attn, scores.cross_residual_attn

        faults = Faults()
        norm = norm_of(plan)
        self.layers = nn.ModuleList()
        for index, layer in enumerate(plan.layers):
            with faults.catching(layer.kind.in_full):
                self.layers.append(build_branch(self, plan, index, norm))
        with faults.catching():
            if not faults.messages:
                tie_blocks(self.sublayers, plan)
        if self.parallel and options["parallel_block"].parallel_block_one_norm:
            share_norms(self.sublayers, plan.sequence.block)
        if options.on("value_residual"):
            for letter in dict.fromkeys(self.layer_types):
                check_value_residual(self.branches(letter), faults)
        self.rotary_pos_emb: QKTransform | None = None
        self.polar_pos_emb: QKTransform | None = None
        self.rel_pos: ScoreMod | None = None
        self.rotates_by_layer = False
        with faults.catching():
            self._build_positions(plan)
        with faults.catching():
            self._build_surroundings(plan)
        self.parallel_blocks: int = options["parallel_blocks"].parallel_blocks
        with faults.catching():
            check_groups(self.sequence.order, self.sequence.block, self.parallel_blocks)
        self.depth_routers: nn.ModuleDict | None = None
        if options.on("depth_routing"):
            seen = "causal" if causal else "prefix" if self.looks_back else None
            with faults.catching():
                self.depth_routers = build_depth_routers(
                    options["depth_routing"], dim, self.sequence, self.sublayers, order_seen=seen
                )
        with faults.catching():
            self.packed = packed_kinds(plan)
            check_apart(self.packed, self.sublayers)
        faults.raise_if_any(type(self).__name__)
        self.final_norm = norm(dim) if norm_places(options).final else None
        self.batch_norms = number_norms(self)
        self.compiled: CompiledBlocks | None = None

    def _build_positions(self, plan: StackPlan) -> None:
        """Build the position parts that all self-attentions share; without one, the rotation of cross-attentions."""
        kinds = [layer.kind for layer in plan.layers if layer.kind.is_attention]
        crossing = not any(kind.is_self_attention for kind in kinds)
        if crossing:
            _refuse_positions(plan, why_not=None if kinds else "has none, nor any other attention")
        reading = [
            layer.options
            for layer in plan.layers
            if layer.kind.is_self_attention or (crossing and layer.kind.is_attention)
        ]
        if not reading:
            return
        widths = [options["heads"].dim_head for options in reading]
        if len(set(widths)) > 1:
            raise ConfigError("`attn_dim_head` differs between layers, but positions are shared; give one width.")
        rotated = plan.options["rotary"].rotary_emb_dim
        if rotated is not None and rotated > widths[0]:
            raise ConfigError(f"`rotary_emb_dim` is {rotated}; heads have `attn_dim_head` = {widths[0]} features.")
        surroundings = {
            "dim": self.dim,
            "heads": self.heads,
            "dim_head": widths[0],
            "causal": self.causal,
            "kv_heads": {fn.kv_heads for fn in self.attentions(*(() if crossing else SELF_ATTENTION.letter))},
            "layers": [index for index, layer in enumerate(plan.layers) if layer.kind.is_self_attention],
            "shared_keys": {options["latent_rope"].latent_rope_dim for options in reading},
            "kwargs": plan.options["stack"].rel_pos_kwargs,
        }
        for slot, name in (("qk", "rotary_pos_emb"), ("polar qk", "polar_pos_emb"), ("score", "rel_pos")):
            for feature in plan.options.enabled(slot):
                assert feature.build is not None
                setattr(self, name, feature.build(plan.options[feature.name], **surroundings))
        self.rotates_by_layer = isinstance(self.rotary_pos_emb, TransformsByLayer)

    def _build_surroundings(self, plan: StackPlan) -> None:
        """Build the parts before, between and after the sublayers."""
        options = plan.options
        # the residual connection is chosen for the whole stack, so that any sublayer can make the entry and exit
        self.frame = self.sublayers[0].residual.frame() if len(self.layers) else None
        self.injection = build_injection(options["reinject_input"], self.dim) if options.on("reinject_input") else None
        self.need_condition = any(options.on(name) for name in ADAPTIVE)
        self.dim_condition = options["condition"].given_width(self.dim)
        self.condition_mlp = build_condition(options, self.dim) if self.need_condition else None
        self.skip_sources = skip_sources(self.sequence) if options.on("unet_skips") else {}
        self.skip_combines = nn.ModuleDict(
            {str(index): ConcatCombine(self.dim, source) for index, source in self.skip_sources.items()}
        )
        clamp = options["softclamp_output"]
        self.output_clamp: float | None = clamp.softclamp_output_value if clamp.softclamp_output else None
        self.num_residual_streams = options["residual_streams"].num_residual_streams
        self.reference_mix = options["residual_streams"].hyper_conn_reference_mix
        self.runs_in_order = options.on("lime")
        self.checkpoint_every: int | None = options["checkpointing"].checkpoint_every
        self.context_dropout: float = options["context_dropout"].cross_attn_tokens_dropout
        # values and scores that one cross-attention leaves for the next must belong to the same keys
        self.one_context = options.on("value_residual") or options["residual_scores"].cross_residual_attn
        requested = options["stack"].disable_abs_pos_emb
        relative = any(options.on(name) for name in ("rotary", "polar", "t5_bias"))
        self.disable_abs_pos_emb: bool = relative if requested is None else requested

    def mix_streams_as_reference(self, on: bool = True) -> None:
        """Mix residual streams by a matrix of ones from now on, as the reference does.

        Args:
            on: False returns to the matrix that the streams determine.
        """
        self.reference_mix = on
        for branch in self.sublayers:
            if isinstance(branch.residual, HyperConnection):
                branch.residual.reference_mix = on

    @property
    def num_attn_layers(self) -> int:
        """Number of built self-attentions."""
        return self.layer_types.count(SELF_ATTENTION.letter)

    @property
    def num_cross_attn_layers(self) -> int:
        """Number of built cross-attentions."""
        return self.layer_types.count(CROSS_ATTENTION.letter)

    @property
    def num_ff_layers(self) -> int:
        """Number of built feedforwards."""
        return self.layer_types.count(FEEDFORWARD.letter)

    @property
    def layers_execute_order(self) -> tuple[int, ...]:
        """Indices of built sublayers in the order of execution. An assignment sets the order of later passes.

        Raises:
            InputError: if the layers cannot run in the order that is assigned.
        """
        return self.sequence.order

    @layers_execute_order.setter
    def layers_execute_order(self, order: Sequence[int]) -> None:
        self.sequence = replace(self.sequence, order=self.order_of(order, None))
        self.steps = self.sequence.steps(self.sequence.order)

    @property
    def layer_dropouts(self) -> tuple[float, ...]:
        """Probability of skipping each built sublayer in training. An assignment, one value each, sets it."""
        return tuple(branch.dropout for branch in self.sublayers)

    @layer_dropouts.setter
    def layer_dropouts(self, values: Sequence[float]) -> None:
        if len(values) != len(self.layers) or not all(0 <= value < 1 for value in values):
            raise InputError(
                f"`layer_dropouts` is {tuple(values)}; it must hold a probability in [0, 1) for each of the "
                f"{len(self.layers)} sublayers."
            )
        for branch, value in zip(self.sublayers, values, strict=True):
            branch.dropout = float(value)

    @property
    def sublayers(self) -> list[Branch]:
        """The built sublayers, in order."""
        return list(self.layers)  # type: ignore[arg-type]

    def branches(self, *letters: str) -> list[Branch]:
        """Return the sublayers of the given kinds, in order.

        Args:
            letters: of the kinds, as in `KINDS`.
        """
        return [branch for branch in self.sublayers if branch.kind.letter in letters]

    def attentions(self, *letters: str) -> list[Attention]:
        """Return the attentions of the given kinds, in order.

        Args:
            letters: of the kinds, as in `KINDS`; all kinds if there are none.
        """
        branches = self.branches(*letters) if letters else self.sublayers
        return [branch.fn for branch in branches if isinstance(branch.fn, Attention)]

    @property
    def rotations(self) -> tuple[QKTransform, ...]:
        """The transforms of queries and keys by position."""
        rotary, polar = self.rotary_pos_emb, self.polar_pos_emb
        if polar is None:
            return () if rotary is None else (rotary,)
        return (polar,) if rotary is None else (rotary, polar)

    def rotations_of(self, index: int) -> tuple[QKTransform, ...]:
        """Return the transforms of one self-attention.

        Args:
            index: of its sublayer.
        """
        rotary = self.rotary_pos_emb
        return rotary.of_layer(index) if isinstance(rotary, TransformsByLayer) else self.rotations

    @property
    def sees_future(self) -> bool:
        """True if tokens read later ones: neither causality nor a mask of the stack itself hides them."""
        if self.causal or self.looks_back:
            return False
        mixing = (SELF_ATTENTION.letter, MIXER.letter)
        return any(branch.kind.letter in mixing or branch.fn.mixes_rows for branch in self.sublayers)

    @property
    def can_cache_kv(self) -> bool:
        """True if decoding may keep keys and values, as in every causal stack."""
        return self.causal

    def may_show_scores(self) -> bool:
        """Return True unless an attention demands fused kernels, which keep no scores."""
        return all(attention.attend.backends.flash is not True for attention in self.attentions())

    def order_of(self, given: Sequence[int] | None, repeats: Sequence[Repeat] | Repeat | None) -> tuple[int, ...]:
        """Return the order of execution of a pass.

        Args:
            given: indices of built sublayers (`layers_execute_order`), or None.
            repeats: blocks to run repeatedly (`repeat_blocks`), or None.

        Raises:
            InputError: if the layers cannot run in this order.
        """
        if given is None and repeats is None:
            return self.sequence.order
        if given is not None and not accepts(Sequence[int], given):
            raise InputError(f"`layers_execute_order` is {shown(given)}; it must hold the numbers of sublayers.")
        if given is not None and repeats is not None:
            raise InputError("`repeat_blocks` and `layers_execute_order` both set the order; pass one of them.")
        try:
            order = repeated(repeats, self.sequence) if repeats is not None else check_order(given, len(self.layers))
            check_sources(order, self.skip_sources)
            check_groups(order, self.sequence.block, self.parallel_blocks)
            if self.depth_routers is not None:
                check_whole_blocks(order, self.sequence.block)
        except ConfigError as error:
            raise InputError(str(error)) from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"`repeat_blocks` is {shown(repeats)}; it must be (block, times), or several.") from error
        if self.runs_in_order and order != tuple(range(len(order))):
            raise InputError(
                f"layers {order} are to run, but with `integrate_layers` they must run in order, each once, since "
                "there is one weight for each earlier layer."
            )
        return order

    def cache_streams(self) -> list[dict[str, Shape]]:
        """Return the growing streams of each executed sublayer, as `{name: (heads, width)}`."""
        return [self.kept_streams_of(index) for index in self.sequence.order]

    def kept_streams_of(self, index: int) -> dict[str, Shape]:
        """Return the growing streams of one built sublayer.

        Args:
            index: of the sublayer.
        """
        branch = self.sublayers[index]
        if branch.kind.is_cross_attention:  # the keys of a context do not grow
            return {}
        streams = branch.fn.cache_streams(self.rotations)
        if branch.kind.is_self_attention and self.router_of(index) is not None:
            streams = {**streams, CHOSEN: (1, 1)}
        return streams

    def router_of(self, index: int) -> DepthRouter | None:
        """Return what chooses the tokens of the block of a built sublayer, or None if it runs all of them.

        Args:
            index: of the sublayer.
        """
        block = str(index // self.sequence.block)
        routers = self.depth_routers
        return None if routers is None or block not in routers else routers[block]  # type: ignore[return-value]

    def reaches(self, order: tuple[int, ...]) -> tuple[int | None, ...]:
        """Return how many slots each executed sublayer looks back at most; None for all.

        Args:
            order: indices of sublayers, in the order of execution.
        """
        branches = self.sublayers
        run = [branches[index] for index in order]
        # what keeps no streams has nothing to drop, and a context is kept whole
        return tuple(None if b.kind.is_cross_attention or not b.fn.cache_streams() else b.fn.reach for b in run)


def _refuse_positions(plan: StackPlan, why_not: str | None) -> None:
    """Refuse encodings of positions in a stack without self-attention.

    Args:
        plan: of the stack.
        why_not: why it has no use for rotary positions either; None if its cross-attentions have, with `context_pos`.
    """
    slots = ("polar qk", "score") if why_not is None else ("qk", "polar qk", "score")
    for slot in slots:
        for feature in plan.options.enabled(slot):
            raise ConfigError(
                f"{plan.options.switch(feature)} is about the positions of self-attention, of which this stack "
                f"{why_not or 'has none'}; drop it."
            )
