"""The kinds of branches that a stack can run, one row each: self-attention, cross-attention, feedforward, mixer.

Everything that depends on the kind of a sublayer asks its row. A new kind is a module with a `BranchFunction` and a
function that builds it, and one more row of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from x_transformers.attention import catalog as attention
from x_transformers.attention.attention import Attention
from x_transformers.attention.heavy import why_not_causal
from x_transformers.errors import ConfigError
from x_transformers.feedforward import catalog as feedforward
from x_transformers.mixers import catalog as mixers
from x_transformers.mixers.base import Mixer
from x_transformers.modules.branch_function import BranchFunction
from x_transformers.options.schema import Options, Schema


class BuildBranchFunction(Protocol):
    """Builds the function of one sublayer."""

    def __call__(
        self, dim: int, keywords: dict[str, Any], options: Options, *, causal: bool, hides_future: bool, first: bool
    ) -> BranchFunction:
        """Build the function.

        Args:
            dim: width of the stack.
            keywords: the sublayer's own keywords, without prefix.
            options: the options of the stack.
            causal: the stack is causal.
            hides_future: tokens do not see later ones, by causality or by a mask.
            first: no earlier sublayer is of this kind, and runs the same function if layers choose (`chosen_by`).
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class BranchKind:
    """A kind of branch.

    Attributes:
        letter: its code in `custom_layers` and `layer_types`.
        words: its name in messages.
        label: its name in the table of `explain()`.
        module_name: attribute of the branch that holds the function, and its part in names of state dicts.
        schema: the keywords of the function.
        prefix: what users write before them.
        build: builds the function.
        is_self_attention: it attends to the tokens themselves: the stack gives it keys, positions, recurrent memory
            and the caller's mask, and the position parts of the stack act inside it.
        is_cross_attention: it attends to the context.
        is_feedforward: it does not attend, and its output may be scaled by deep embeddings.
        inherits: letter of the kind whose keywords it takes too, unless it is given its own.
        enabled_by: what brings such sublayers into a stack, for kinds that are not there by default.
        set_by_stack: keywords that the stack itself sets, and the option to use instead.
        meaningless: keywords that such a function cannot have, and why.
        misplaced: keywords of another kind that are easily written with this prefix, and what to write.
        documents_argument: the argument of a pass that contains the documents of packed rows.
        chosen_by: the keyword of the stack that says which function each of its layers runs: one value, or a tuple of
            them. The layers get it under the same name.
        unpackable: why packed rows are refused, and what to do; default that the function carries one document into
            the next.
    """

    letter: str
    words: str
    label: str
    module_name: str
    schema: Schema
    prefix: str
    build: BuildBranchFunction
    is_self_attention: bool = False
    is_cross_attention: bool = False
    is_feedforward: bool = False
    inherits: str | None = None
    enabled_by: str | None = None
    set_by_stack: Mapping[str, str] = field(default_factory=dict)
    meaningless: Mapping[str, str] = field(default_factory=dict)
    misplaced: Mapping[str, str] = field(default_factory=dict)
    documents_argument: str | None = None
    chosen_by: str | None = None
    unpackable: str | None = None

    def __reduce__(self) -> Any:
        # copies and pickles of stacks refer to the row of this table, which nothing changes
        return kind_of, (self.letter,)

    @property
    def is_attention(self) -> bool:
        """True for self-attention and cross-attention."""
        return self.is_self_attention or self.is_cross_attention

    def in_full(self, message: str) -> str:
        """Return a message with the keywords of this kind as users write them."""
        return self.schema.in_full(message, self.prefix)


def kind_of(letter: str) -> BranchKind:
    """Return the row of a letter."""
    return KINDS[letter]


def build_self_attention(
    dim: int, keywords: dict[str, Any], options: Options, *, causal: bool, hides_future: bool, first: bool
) -> Attention:
    """Build a self-attention; all but the first learn how much of the first one's values to mix in."""
    if options.on("value_residual") and options["value_residual"].learned_value_residual_mix and not first:
        keywords = {**keywords, "learned_value_residual_mix": True}
    fn = Attention(dim, heads=options["structure"].heads, causal=causal, **keywords)
    return _for_stack(fn, options, shares_scores=options["residual_scores"].residual_attn, hides_future=hides_future)


def build_cross_attention(
    dim: int, keywords: dict[str, Any], options: Options, *, causal: bool, hides_future: bool, first: bool
) -> Attention:
    """Build a cross-attention, which sees the whole context, also in a causal stack."""
    fn = Attention(dim, heads=options["structure"].heads, causal=False, **keywords)
    shares = options["residual_scores"].cross_residual_attn
    return _for_stack(fn, options, shares_scores=shares, hides_future=hides_future)


def _for_stack(fn: Attention, options: Options, *, shares_scores: bool, hides_future: bool) -> Attention:
    fn.leaves_values = options.on("value_residual")
    if shares_scores:
        fn.share_scores()
    if hides_future and fn.across_queries:
        raise ConfigError(
            "`inverted_attention` normalizes over the queries, so that in a causal stack earlier tokens would see "
            "later ones; use an Encoder or a CrossAttender, or drop it."
        )
    if hides_future and fn.heavy is not None:
        raise ConfigError(why_not_causal(instead="Use an Encoder, or `depth_routing = 'threshold'`."))
    return fn


def build_feedforward(
    dim: int, keywords: dict[str, Any], options: Options, *, causal: bool, hides_future: bool, first: bool
) -> BranchFunction:
    """Build a feedforward."""
    return feedforward.build(dim, keywords, hides_future=hides_future)


def build_mixer(
    dim: int, keywords: dict[str, Any], options: Options, *, causal: bool, hides_future: bool, first: bool
) -> Mixer:
    """Build a token mixer."""
    if hides_future and not causal:
        raise ConfigError(
            "`m` layers see one way or both, and a PrefixDecoder needs both at once; use attention there."
        )
    own = dict(keywords)
    return mixers.build(dim, own.pop("mixer"), own, heads=options["structure"].heads, causal=causal, first=first)


SELF_ATTENTION = BranchKind(
    letter="a",
    words="self-attention",
    label="attention",
    module_name="attention",
    schema=attention.SCHEMA,
    prefix="attn_",
    build=build_self_attention,
    is_self_attention=True,
    set_by_stack={
        "heads": "`heads`",
        "causal": "an Encoder or a Decoder",
        "dim": "`dim`",
        "dim_out": "`dim`",
        "rotate_num_heads": "`rotate_num_heads`",
        "qkv_receive_diff_residuals": "`qkv_receive_diff_residuals`",
        "learned_value_residual_mix": "`learned_value_residual_mix`",
    },
    misplaced={"dim_context": "belongs to cross-attention; write `cross_attn_dim_context`"},
    documents_argument="flash_pack_seq_kwargs",
)

CROSS_ATTENTION = BranchKind(
    letter="c",
    words="cross-attention",
    label="cross-attention",
    module_name="attention",
    schema=attention.SCHEMA,
    prefix="cross_attn_",
    build=build_cross_attention,
    is_cross_attention=True,
    inherits="a",
    enabled_by="`cross_attend = True`",
    set_by_stack={
        "heads": "`heads`",
        "learned_value_residual_mix": "`add_value_residual`, which mixes by 1/2 there",
    },
    meaningless={
        "causal": "would let a token see the context up to a place that depends on how many tokens follow",
        "qkv_receive_diff_residuals": "would give keys and values inputs besides the context",
    },
    documents_argument="flash_pack_seq_context_kwargs",
)

FEEDFORWARD = BranchKind(
    letter="f",
    words="feedforward",
    label="feedforward",
    module_name="feedforward",
    schema=feedforward.SCHEMA,
    prefix="ff_",
    build=build_feedforward,
    is_feedforward=True,
    set_by_stack={"dim": "`dim`", "dim_out": "`dim`"},
)

MIXER = BranchKind(
    letter="m",
    words="mixer",
    label="mixer",
    module_name="mixer",
    schema=mixers.SCHEMA,
    prefix="mixer_",
    build=build_mixer,
    enabled_by="`mixer`",
    chosen_by="mixer",
    unpackable="packed rows are not built for `m` layers yet; pass one document a row, with `mask`.",
)

KINDS: dict[str, BranchKind] = {kind.letter: kind for kind in (SELF_ATTENTION, CROSS_ATTENTION, FEEDFORWARD, MIXER)}
"""The kinds of branches by letter, in the order in which signatures list their keywords."""
