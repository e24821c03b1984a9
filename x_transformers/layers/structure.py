"""Options for the sublayers of a stack and their order (macaron 1906.02762, tied layers 1909.11942, sandwich order
1911.03864, PAR 2009.04534, parallel blocks 2204.02311), and for the stack as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from x_transformers.options.schema import Feature, Options, Rule, Surroundings, at_least, opt, require


@dataclass(frozen=True, kw_only=True)
class StructureOptions:
    depth: int | None = opt(None, "number of blocks")
    heads: int = opt(8, "number of query heads of every attention")
    cross_attend: bool = opt(False, "add cross-attention to each block; a forward pass then needs `context`")
    only_cross: bool = opt(False, "with `cross_attend`: build no self-attention")
    only_attn: bool = opt(False, "build no feedforwards")

    def __post_init__(self) -> None:
        require(self.depth is None or self.depth >= 1, f"`depth` is {self.depth}; it must be at least 1.")
        require(self.heads >= 1, f"`heads` is {self.heads}; it must be at least 1.")
        require(
            self.cross_attend or not self.only_cross,
            "`only_cross` leaves out self-attention, which leaves no attention here; it needs `cross_attend = True`.",
        )


@dataclass(frozen=True, kw_only=True)
class MacaronOptions:
    macaron: bool = opt(False, "a feedforward before attention and one after it, each with factor 1/2")


@dataclass(frozen=True, kw_only=True)
class TyingOptions:
    weight_tie_layers: bool = opt(False, "build one block and run it `depth` times")
    tie_blocks: int | None = opt(None, "build this number of blocks and run each `depth / tie_blocks` times")
    tie_order: Literal["cycle", "sequence"] = opt(
        "cycle", "order of `tie_blocks`: all of them again and again (0 1 0 1), or each several times (0 0 1 1)"
    )

    def __post_init__(self) -> None:
        at_least(1, tie_blocks=self.tie_blocks)
        require(
            not (self.weight_tie_layers and self.tie_blocks is not None),
            "`weight_tie_layers` ties all blocks to one, and `tie_blocks` to a number of them; keep one of the two.",
        )


@dataclass(frozen=True, kw_only=True)
class RelaxedOptions:
    tie_lora_rank: int | None = opt(
        None, "tied blocks share the matrices of their linear maps, and each adds matrices of this rank"
    )
    tie_own_norms: bool = opt(False, "tied blocks share the matrices of their linear maps, and each has its own norms")

    def __post_init__(self) -> None:
        at_least(1, tie_lora_rank=self.tie_lora_rank)


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    layers_execute_order: tuple[int, ...] | None = opt(
        None, "order of execution, as indices of built sublayers; an index may repeat"
    )


@dataclass(frozen=True, kw_only=True)
class CustomOptions:
    custom_layers: tuple[str, ...] | str | None = opt(
        None, "list of sublayers: a self-attention, c cross-attention, f feedforward, m mixer"
    )


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    mixer: str | tuple[str, ...] | None = opt(
        None, "token mixers instead of self-attention: a name, or one for each m in the list of sublayers"
    )


@dataclass(frozen=True, kw_only=True)
class PeriodOptions:
    layer_period: tuple[str, ...] | str | None = opt(
        None, "what mixes tokens in each block, repeated over the blocks: a self-attention, m mixer, c cross-attention"
    )


@dataclass(frozen=True, kw_only=True)
class SandwichOptions:
    sandwich_coef: int | None = opt(None, "sandwich order with k attentions first and k feedforwards last")


@dataclass(frozen=True, kw_only=True)
class ParOptions:
    par_ratio: int | None = opt(None, "PAR order: one attention per k sublayers, and only in the first two thirds")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    parallel_block: bool = opt(False, "all sublayers of a block read the stream before the block")
    parallel_block_one_norm: bool = opt(False, "they read it through one norm, that of the first sublayer")


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    disable_abs_pos_emb: bool | None = opt(
        None, "leave out absolute positions in wrappers; default: only with rotary positions or a T5 bias"
    )
    rel_pos_kwargs: dict[str, Any] = opt({}, "more arguments for the relative position bias (ALiBi: `slopes`)")
    verbose: bool = opt(True, "warn about options that have no effect or are unwise")


STRUCTURE = Feature(
    name="structure",
    group="stack",
    slot="structure",
    options=StructureOptions,
    summary="blocks of attention and feedforward",
    paper="1706.03762",
    examples=({"cross_attend": True}, {"only_attn": True}),
)

MACARON = Feature(
    name="macaron",
    group="stack",
    slot="structure",
    options=MacaronOptions,
    enabled=lambda options: options.macaron,
    summary="half a feedforward before and half a feedforward after attention",
    paper="1906.02762",
    examples=({"macaron": True},),
)


def _tied_by(o: Options | Surroundings) -> str:
    """Return the keyword that ties blocks, and what it does."""
    tying = o["weight_tying"]
    return "`weight_tie_layers` repeats one block" if tying.weight_tie_layers else "`tie_blocks` repeats blocks"


TYING = Feature(
    name="weight_tying",
    group="stack",
    slot="structure",
    options=TyingOptions,
    enabled=lambda options: options.weight_tie_layers or options.tie_blocks is not None,
    idle=lambda options: () if (options.tie_blocks or 1) > 1 else ("tie_order",),
    summary="blocks that run several times",
    paper="1909.11942",
    refuses=tuple(
        Rule(
            when=lambda o, other=other: o.on(other),
            why=lambda o, keyword=keyword: (
                f"{_tied_by(o)}, but `{keyword}` specifies another list of layers; keep one."
            ),
        )
        for other, keyword in (
            ("custom_layers", "custom_layers"),
            ("layer_period", "layer_period"),
            ("par", "par_ratio"),
            ("sandwich_order", "sandwich_coef"),
            ("execute_order", "layers_execute_order"),
        )
    ),
    examples=(
        {"weight_tie_layers": True},
        {"tie_blocks": 2, "depth": 4},
        {"tie_blocks": 2, "depth": 4, "tie_order": "sequence"},
    ),
)

RELAXED = Feature(
    name="relaxed_recursion",
    group="stack",
    slot="structure",
    options=RelaxedOptions,
    enabled=lambda options: options.tie_lora_rank is not None or options.tie_own_norms,
    summary="tied blocks that differ by low-rank maps and norms",
    paper="2410.20672",
    refuses=(
        Rule(
            when=lambda o: not o.on("weight_tying"),
            why="`tie_lora_rank` and `tie_own_norms` are what tied blocks do not share; set `weight_tie_layers = True` "
            "or `tie_blocks`.",
        ),
    ),
    exempt={
        "export": "the reference has no such blocks",
        "shards by attention": "tied attentions share matrices, so that they are sharded together",
    },
    examples=(
        {"weight_tie_layers": True, "tie_lora_rank": 2},
        {"weight_tie_layers": True, "tie_lora_rank": 3, "tie_own_norms": True, "use_rmsnorm": True, "ff_no_bias": True},
        {"tie_blocks": 2, "depth": 4, "tie_own_norms": True},
        {"tie_blocks": 1, "tie_lora_rank": 2, "sandwich_norm": True, "ff_glu": True, "attn_kv_heads": 2},
    ),
)

EXECUTE_ORDER = Feature(
    name="execute_order",
    group="stack",
    slot="structure",
    options=OrderOptions,
    enabled=lambda options: options.layers_execute_order is not None,
    summary="custom order of execution, in which sublayers may repeat",
    examples=({"layers_execute_order": (0, 1, 0, 1, 2, 3)},),
)

CUSTOM = Feature(
    name="custom_layers",
    group="stack",
    slot="structure",
    choice="order of layers",
    options=CustomOptions,
    enabled=lambda options: options.custom_layers is not None,
    summary="an explicit list of sublayers",
    examples=({"custom_layers": ("a", "f", "f", "a", "f"), "depth": None},),
)

MIXER = Feature(
    name="mixer",
    group="stack",
    slot="structure",
    options=MixerOptions,
    enabled=lambda options: options.mixer is not None,
    summary="token mixers instead of self-attention",
    paper="2111.11418",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "retention"},
        {"mixer": ("gated_delta", "conv"), "custom_layers": "mfamf", "depth": None, "mixer_dim_key": 4},
    ),
)

PERIOD = Feature(
    name="layer_period",
    group="stack",
    slot="structure",
    choice="order of layers",
    options=PeriodOptions,
    enabled=lambda options: options.layer_period is not None,
    summary="blocks of attention and of mixers in turn",
    paper="2403.19887",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": "linear", "layer_period": "ma"},),
)

SANDWICH_ORDER = Feature(
    name="sandwich_order",
    group="stack",
    slot="structure",
    choice="order of layers",
    options=SandwichOptions,
    enabled=lambda options: options.sandwich_coef is not None,
    summary="sandwich order: attentions first, feedforwards last",
    paper="1911.03864",
    examples=({"sandwich_coef": 1},),
)

PAR = Feature(
    name="par",
    group="stack",
    slot="structure",
    choice="order of layers",
    options=ParOptions,
    enabled=lambda options: options.par_ratio is not None,
    summary="PAR order: fewer attentions, in the first two thirds",
    paper="2009.04534",
    examples=({"par_ratio": 2},),
)

PARALLEL = Feature(
    name="parallel_block",
    group="stack",
    slot="structure",
    options=ParallelOptions,
    enabled=lambda options: options.parallel_block,
    summary="attention and feedforward of a block side by side",
    paper="2204.02311",
    refuses=(
        Rule(
            when=lambda o: o["structure"].only_attn or any(map(o.on, ("custom_layers", "sandwich_order", "par"))),
            why="`parallel_block` needs blocks of several sublayers; drop `only_attn`, `custom_layers`, "
            "`sandwich_coef` and `par_ratio`.",
        ),
        Rule(
            when=lambda o: o["norm_placement"].after,
            why="`parallel_block` adds the outputs of a block to one stream, which norms between them would change; "
            "drop `pre_norm = False` and `pre_and_post_norm`.",
        ),
        *(
            Rule(
                when=lambda o, other=other: o.on(other),
                why=f"`parallel_block` decides what sublayers read, and so does `{keyword}`; drop one of them.",
            )
            for other, keyword in (
                ("mv_split_residual", "mv_split_residual"),
                ("residual_streams", "num_residual_streams"),
                ("resi_dual", "resi_dual"),
                ("path_scales", "path_scales"),
                ("aggregated_residuals", "attn_aggregated_residuals"),
                ("lime", "integrate_layers"),
                ("unet_skips", "unet_skips"),
            )
        ),
        Rule(
            when=lambda o: (
                o["parallel_block"].parallel_block_one_norm and not o["norm_placement"].pre_norm_has_first_norm
            ),
            why="`parallel_block_one_norm` uses the norm before the first sublayer of a block for all of it; drop "
            "`pre_norm_has_first_norm`, or this keyword.",
        ),
        Rule(
            when=lambda o: o["parallel_block"].parallel_block_one_norm and not o["norm_placement"].before,
            why="`parallel_block_one_norm` is about the norm before sublayers, which `branch_norm` moves; drop one.",
        ),
    ),
    exempt={"export": "the reference has no parallel blocks"},
    examples=(
        {"parallel_block": True},
        {"parallel_block": True, "sandwich_norm": True, "use_rmsnorm": True},
        {"parallel_block": True, "parallel_block_one_norm": True},
    ),
)

FEATURES = (STRUCTURE, MACARON, TYING, RELAXED, EXECUTE_ORDER, CUSTOM, MIXER, PERIOD, SANDWICH_ORDER, PAR, PARALLEL)

STACK = Feature(
    name="stack",
    group="stack",
    slot="stack",
    options=StackOptions,
    summary="options of the stack as a whole",
    refuses=(
        Rule(
            when=lambda o: (
                bool(o["stack"].rel_pos_kwargs) and not (o.on("alibi") or o.on("t5_bias") or o.on("dynamic_bias"))
            ),
            why="`rel_pos_kwargs` are arguments of a relative position bias, but none is on; add one, or drop them.",
        ),
    ),
    examples=({"alibi_pos_bias": True, "rel_pos_kwargs": {"slopes": [0.5, 0.25, 0.125, 0.1]}},),
)
