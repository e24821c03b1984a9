"""Catalog of token mixers, and their keywords.

A new paper is one new file and one line here. The arguments of a mixer's constructor are the keywords that it reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from x_transformers.errors import ConfigError, Faults
from x_transformers.mixers import (
    aaren,
    activator,
    atlas,
    convolution,
    delta_rule,
    gated_linear_attention,
    h3,
    hyena,
    identity,
    linear_attention,
    lmu,
    log_linear,
    mamba,
    mamba2,
    mlstm,
    mossformer,
    pooling,
    random_mixing,
    recurrent_networks,
    retention,
    rglru,
    rwkv4,
    rwkv7,
    shallow,
    slab,
    sparse_state,
    spectral,
    titans,
)
from x_transformers.mixers.base import Mixer, arguments_of, depends_on_causality
from x_transformers.mixers.parts import MixerGain
from x_transformers.options.schema import Feature, Options, Schema, at_least, default_of, opt, require


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    heads: int | None = opt(None, "heads of mixers; default `heads`")
    dim_key: int | None = opt(None, "width of a head's queries and keys")
    dim_value: int | None = opt(None, "width of a head's values")
    dim: int | None = opt(None, "inner width of mixers, if it is not that of the model")
    expand: float | None = opt(None, "inner width over that of the model")
    state: int | None = opt(None, "states of each inner channel")
    conv: int | None = opt(None, "taps of the convolution; of a short one next to a recurrence also 0, for none")
    chunk: int | None = opt(
        None, "tokens that a recurrence computes at once; changes rounding only, but for titans and atlas"
    )
    gate: bool | None = opt(None, "gate the output")
    window: int | None = opt(None, "tokens of the window of a pooling, or of a Legendre memory")
    len: int | None = opt(
        None, "most tokens of a row in a shallow or random, `max_seq_len`; tokens with own levels in a log_linear"
    )
    norm_eps: float | None = opt(None, "added to mean squares in norms inside of mixers")
    norm_unit_offset: bool = opt(True, "store gains of norms inside of mixers minus 1, as weight decay needs it")
    bidirectional: bool = opt(False, "add a second mixer that reads from right to left, in stacks that see both ways")
    grid: tuple[int, int] | None = opt(None, "height and width of the images that tokens are of")
    dropout: float = opt(0.0, "dropout on the output")
    zero_init_output: bool = opt(False, "initialize the output map to zero")
    output_proj_depth: int | None = opt(None, "initialize the output map with std (2 * fan_in * depth) ** -0.5")

    def __post_init__(self) -> None:
        at_least(1, dim=self.dim, output_proj_depth=self.output_proj_depth)
        require(0 <= self.dropout < 1, f"`dropout` is {self.dropout}; it must lie in [0, 1).")


SHARED = Feature(
    name="mixer_parts",
    group="mixer",
    slot="mixer parts",
    options=SharedOptions,
    summary="widths, convolutions, gates and directions of mixers",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "gated_delta", "mixer_dim_key": 4, "mixer_dropout": 0.1, "mixer_zero_init_output": True},
        {
            "mixer": "gated_delta",
            "mixer_conv": 2,
            "mixer_gate": False,
            "mixer_output_proj_depth": 2,
            "mixer_norm_unit_offset": False,
        },
    ),
)

PAPERS = (
    identity.FEATURE,
    pooling.FEATURE,
    random_mixing.FEATURE,
    convolution.FEATURE,
    *delta_rule.FEATURES,
    mamba.FEATURE,
    mamba2.FEATURE,
    rglru.FEATURE,
    mlstm.FEATURE,
    *recurrent_networks.FEATURES,
    aaren.FEATURE,
    rwkv4.FEATURE,
    rwkv7.FEATURE,
    retention.FEATURE,
    gated_linear_attention.FEATURE,
    log_linear.FEATURE,
    sparse_state.FEATURE,
    titans.FEATURE,
    atlas.FEATURE,
    *linear_attention.FEATURES,
    hyena.FEATURE,
    h3.FEATURE,
    lmu.FEATURE,
    spectral.FEATURE,
    *mossformer.FEATURES,
    activator.FEATURE,
    shallow.FEATURE,
    slab.FEATURE,
)
"""The mixers, by whose names `mixer` chooses; `build` is the class."""

MIXERS: dict[str, Feature] = {feature.name: feature for feature in PAPERS}

OF_ALL = {"bidirectional", "dropout"}
"""Keywords that every mixer has, whatever its constructor takes."""

OF_OUTPUT_MAPS = {"zero_init_output", "output_proj_depth"}
"""Keywords of mixers whose last part is a linear map."""

OF_GAINS = {"norm_unit_offset"}
"""Keywords of mixers that contain norms with gains."""


def class_of(name: str) -> type[Mixer]:
    """Return the class of a mixer.

    Raises:
        ConfigError: if there is none of this name.
    """
    if name not in MIXERS:
        raise ConfigError(f"`mixer` is {name!r}; it must be one of {', '.join(MIXERS)}.")
    found: Any = MIXERS[name].build
    return found


def keywords_of(name: str) -> set[str]:
    """Return the keywords that a mixer reads, without prefix."""
    mixer = class_of(name)
    found = {"dim" if argument == "inner_dim" else argument for argument in arguments_of(mixer)} | OF_ALL
    found |= OF_OUTPUT_MAPS if mixer.has_output_map else set()
    return found | (OF_GAINS if mixer.has_gains else set())


def defaults_of(name: str) -> dict[str, Any]:
    """Return the values of keywords that a mixer has by itself; None for those that follow from widths."""
    mixer = class_of(name)
    parameters = inspect.signature(mixer.__init__).parameters
    return {"dim" if each == "inner_dim" else each: parameters[each].default for each in arguments_of(mixer)}


class MixerSchema(Schema):
    """Keywords of all mixers. In a layer, those of one mixer are on: the one that `mixer` names."""

    def parse(
        self, given: Mapping[str, Any], faults: Faults, prefix: str | None = None, *, others: Iterable[str] = ()
    ) -> Options:
        own = dict(given)
        name = own.pop("mixer", None)
        parsed = super().parse(own, faults, prefix, others=others)
        on = [SHARED.name, name] if name in MIXERS else [SHARED.name]
        return MixerOptions(self, parsed.values, tuple(on))

    def without_effect(self, options: Options, given: Iterable[str], prefix: str | None = None) -> list[str]:
        prefix = self.prefix if prefix is None else prefix
        assert isinstance(options, MixerOptions)
        read = keywords_of(options.mixers[-1])
        return [
            f"`{prefix}{keyword}` has no effect: no mixer of this stack reads it."
            for keyword in given
            if keyword in self.owner
            and keyword not in read
            and getattr(options[self.owner[keyword].name], keyword) != default_of(self.fields[keyword])
        ]


@dataclass(frozen=True, eq=False)
class MixerOptions(Options):
    """Options of one mixer layer.

    Attributes:
        mixers: names of the features that are on; the last one is the mixer.
    """

    mixers: tuple[str, ...] = ()

    @property
    def _enabled(self) -> dict[str, Feature]:
        return {name: self.schema.features[name] for name in self.mixers}


SCHEMA = MixerSchema((SHARED, *PAPERS))


def build(dim: int, name: str, keywords: Mapping[str, Any], *, heads: int, causal: bool, first: bool) -> Mixer:
    """Build a mixer.

    Args:
        dim: width of the model.
        name: of the mixer.
        keywords: those that were given, without prefix; None is the mixer's own default.
        heads: default number of heads.
        causal: no token may see later ones.
        first: no earlier layer of the stack has this mixer.

    Raises:
        ConfigError: if a value is out of range, or the mixer has no form for this causality.
    """
    mixer: Any = class_of(name)
    given = {"inner_dim" if key == "dim" else key: value for key, value in keywords.items() if value is not None}
    arguments = arguments_of(mixer)
    if "heads" in arguments:
        given.setdefault("heads", heads)
    both = bool(given.get("bidirectional"))
    check_directions(mixer, causal=causal, both=both, grid=given.get("grid") is not None)
    own = {key: value for key, value in given.items() if key in arguments}
    if depends_on_causality(mixer):
        own["causal"] = causal
    built = mixer(dim, **own)
    if both and "bidirectional" not in arguments:
        built.backward = mixer(dim, **own)
    if not first:
        built.follow()
    for each in (built, built.backward):
        if each is not None:
            begin_output(each, bool(given.get("zero_init_output")), given.get("output_proj_depth"))
            if not given.get("norm_unit_offset", True):
                drop_unit_offsets(each)
    built.dropout = given.get("dropout", 0.0)
    return built


def drop_unit_offsets(mixer: Mixer) -> None:
    """Store the gains of the norms of a mixer as they are.

    Raises:
        ConfigError: if a mixer that may have such norms has none.
    """
    norms = [module for module in mixer.modules() if isinstance(module, MixerGain)]
    require(
        bool(norms) or not mixer.has_gains,
        f"`norm_unit_offset` is of the gains of norms, of which this {mixer.name} has none; drop it.",
    )
    for norm in norms:
        norm.drop_unit_offset()


def check_directions(mixer: type[Mixer], *, causal: bool, both: bool, grid: bool) -> None:
    """Raise a `ConfigError` if a mixer cannot read in the direction of its stack."""
    name = mixer.name
    require(not (causal and both), "`bidirectional` would let a token see the future; drop it, or use an Encoder.")
    require(
        mixer.has_causal_form or not causal,
        f'`mixer = "{name}"` reads the whole row at once, so that a token would see the future; use it in an Encoder, '
        "or take hyena.",
    )
    require(
        not (causal and grid),
        "`grid` is of images, whose tokens have no order, so that a token would see the future; drop it, or use an "
        "Encoder.",
    )
    require(
        causal or both or mixer.has_whole_form,
        f'`mixer = "{name}"` reads from left to right; set `bidirectional = True`, which adds a second one from right '
        "to left, or take linear, hyena, conv or pooling.",
    )
    require(
        not both or not mixer.has_whole_form or "bidirectional" in arguments_of(mixer),
        f'`mixer = "{name}"` looks both ways by itself; drop `bidirectional`.',
    )


def begin_output(mixer: Mixer, zero: bool, depth: int | None) -> None:
    """Initialize the output map of a mixer, if it has one and one of the two is given."""
    last = getattr(mixer, "to_out", None)
    if not (mixer.has_output_map and isinstance(last, nn.Linear)):
        return
    if zero:
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    elif depth is not None:
        nn.init.normal_(last.weight, std=(2 * last.in_features * depth) ** -0.5)
