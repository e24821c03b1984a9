"""The feature catalogue's grammar: which keyword belongs to which feature, and what a call of keywords means.

A feature owns a frozen, keyword-only dataclass. Its field names are its keywords (less the prefix of its group), so
that `Decoder(attn_qk_norm = True)` sets the field `qk_norm` of the feature that owns it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from x_transformers.errors import ConfigError, Faults, did_you_mean


def opt(default: Any, doc: str) -> Any:
    """A field of an options dataclass: its default, and the line that `help` shows."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Two features, or a feature and its surroundings, disagree in meaning.

    Attributes:
        when: receives the options that meet in one layer; true where the combination is meant.
        why: what the conflict is, and what to change.
    """

    when: Callable[[Options | Surroundings], bool]
    why: str


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One idea, its keywords, and how it is built.

    Attributes:
        name: the feature's name in `explain()`, tests and rules.
        group: "stack" (`Decoder(...)`), "attn" (`attn_...`), "ff" (`ff_...`) or "model" (`TransformerWrapper(...)`).
        slot: where it acts ("norm", "score", "qk", ...).
        choice: features of one choice exclude each other; None where there is nothing to choose.
        options: the dataclass of its keywords.
        enabled: whether given options switch it on.
        build: makes the part; its arguments are the business of the slot.
        self_attention_only: `cross_attn_` does not inherit it from `attn_`.
        refuses: rules that are checked when the feature is on.
        warns: rules that are checked when it is on, and whose sentence is said to the user.
        idle: names of keywords that have no effect with these options although the feature is on.
        examples: small keyword sets, with prefixes, as a user would write them; the tests run over them.
        exempt: property of the test suite -> the sentence that says why it cannot hold; with the key (property,
            number), for one example only, numbered from 1.
    """

    name: str
    group: str
    slot: str
    options: type
    summary: str
    enabled: Callable[[Any], bool] = lambda options: True
    build: Callable[..., Any] | None = None
    choice: str | None = None
    paper: str | None = None
    self_attention_only: bool = False
    refuses: tuple[Rule, ...] = ()
    warns: tuple[Rule, ...] = ()
    idle: Callable[[Any], Iterable[str]] = lambda options: ()
    examples: tuple[Mapping[str, Any], ...] = ()
    exempt: Mapping[Any, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Options:
    """The options of every feature of one group, by feature name, and the kind of layer if there is one around."""

    schema: Schema
    values: Mapping[str, Any]
    kind: str | None = None

    def __getitem__(self, feature: str) -> Any:
        return self.values[feature]

    @functools.cached_property
    def _enabled(self) -> dict[str, Feature]:
        """The features that are on, by name: asked for at every slot of every layer, and always the same."""
        every = self.schema.features
        return {name: every[name] for name, value in self.values.items() if every[name].enabled(value)}

    def on(self, feature: str) -> bool:
        return feature in self._enabled

    def enabled(self, slot: str | None = None) -> list[Feature]:
        """The features that are on, in the order of the catalogue."""
        return [feature for feature in self._enabled.values() if slot in (None, feature.slot)]

    def switch(self, feature: Feature) -> str:
        """The keyword by which a user switched a feature on, in backquotes, else the feature's name."""
        return _switches(feature, self, "")

    def chosen(self, slot: str) -> Feature:
        """The one feature that is on in a slot where exactly one must be."""
        (feature,) = self.enabled(slot)
        return feature


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The options that meet in one layer, its own and the stack's, as rules read them.

    Attributes:
        groups: the options.
        kind: "a" self-attention, "c" cross-attention, "f" feedforward; None outside of a layer.
    """

    groups: tuple[Options, ...]
    kind: str | None = None

    def __getitem__(self, feature: str) -> Any:
        return next(options[feature] for options in self.groups if feature in options.values)

    def on(self, feature: str) -> bool:
        return any(options.on(feature) for options in self.groups)


class Schema:
    """Keyword -> owner, for one group of features.

    Raises:
        TypeError: at import, when a keyword has two owners or a feature's options are not a frozen dataclass.
    """

    def __init__(self, features: Sequence[Feature], prefix: str = "") -> None:
        self.prefix = prefix
        self.features = {feature.name: feature for feature in features}
        self.fields: dict[str, dataclasses.Field[Any]] = {}
        self.owner: dict[str, Feature] = {}
        self.hints: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}  # of features whose options are all immutable, so that calls may share them
        for feature in features:
            if not dataclasses.is_dataclass(feature.options) or not feature.options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                raise TypeError(f"the options of feature {feature.name} must be a frozen dataclass")
            hints = typing.get_type_hints(feature.options)
            for entry in dataclasses.fields(feature.options):
                if entry.name in self.owner:
                    raise TypeError(
                        f"keyword {entry.name} belongs to {self.owner[entry.name].name} and to {feature.name}"
                    )
                self.owner[entry.name] = feature
                self.fields[entry.name] = entry
                self.hints[entry.name] = hints[entry.name]
            if all(entry.default_factory is dataclasses.MISSING for entry in dataclasses.fields(feature.options)):
                self.defaults[feature.name] = feature.options()

    def parse(self, given: Mapping[str, Any], faults: Faults, prefix: str | None = None) -> Options:
        """Sort keywords (without prefix) to their owners, and check each feature by itself.

        Unknown names, values of a wrong type and disagreeing fields are added to `faults`.
        """
        prefix = self.prefix if prefix is None else prefix
        sorted_: dict[str, dict[str, Any]] = {name: {} for name in self.features}
        for keyword, value in given.items():
            if keyword not in self.owner:
                faults.add(f"unknown keyword `{prefix}{keyword}`.{did_you_mean(keyword, self.owner)}")
                continue
            value = tuple(value) if isinstance(value, list) else value
            if not accepts(self.hints[keyword], value):
                wanted = self.fields[keyword].type
                faults.add(f"`{prefix}{keyword}` is {value!r}; it must be of type {wanted}.")
                continue
            sorted_[self.owner[keyword].name][keyword] = value
        values: dict[str, Any] = {}
        for name, feature in self.features.items():
            if not sorted_[name] and name in self.defaults:
                values[name] = self.defaults[name]
                continue
            with faults.catching(lambda message: self.in_full(message, prefix)):
                values[name] = feature.options(**sorted_[name])
            if name not in values:
                values[name] = feature.options()
        return Options(self, values)

    def in_full(self, message: str, prefix: str | None = None) -> str:
        """The message with this group's keywords as the user writes them, prefix included."""
        prefix = self.prefix if prefix is None else prefix
        return re.sub(r"`(\w+)", lambda m: f"`{prefix}{m[1]}" if m[1] in self.owner else m[0], message)

    def check_choices(self, options: Options, faults: Faults, prefix: str | None = None) -> None:
        """Add a fault for each choice of which more than one alternative is on."""
        prefix = self.prefix if prefix is None else prefix
        choices: dict[str, list[Feature]] = {}
        for feature in options.enabled():
            if feature.choice is not None:
                choices.setdefault(feature.choice, []).append(feature)
        for choice, features in choices.items():
            if len(features) > 1:
                names = " and ".join(_switches(f, options, prefix) for f in features)
                faults.add(f"{names} are alternatives of one choice ({choice}); keep one of them.")

    def check_rules(
        self, options: Options, surroundings: Options | Surroundings, faults: Faults, prefix: str | None = None
    ) -> None:
        """Add a fault for each rule of an enabled feature that its surroundings meet."""
        for feature in options.enabled():
            for rule in feature.refuses:
                if rule.when(surroundings):
                    faults.add(self.in_full(rule.why, prefix))

    def unwise(self, options: Options, surroundings: Options | Surroundings) -> list[str]:
        """The sentence of each warning rule of an enabled feature that its surroundings meet."""
        return [rule.why for feature in options.enabled() for rule in feature.warns if rule.when(surroundings)]

    def without_effect(self, options: Options, given: Iterable[str], prefix: str | None = None) -> list[str]:
        """Sentences about given keywords that change nothing because their feature is off."""
        prefix = self.prefix if prefix is None else prefix
        sentences = []
        idle = {name for feature in options.enabled() for name in feature.idle(options[feature.name])}
        for keyword in given:
            feature = self.owner.get(keyword)
            if feature is None or getattr(options[feature.name], keyword) == default_of(self.fields[keyword]):
                continue
            if not options.on(feature.name):
                sentences.append(f"`{prefix}{keyword}` has no effect: {feature.name} is off.")
            elif keyword in idle:
                sentences.append(f"`{prefix}{keyword}` has no effect beside the other options of {feature.name}.")
        return sentences

    def parameters(self, prefix: str | None = None) -> list[inspect.Parameter]:
        """Keyword-only parameters, for signatures that users see."""
        prefix = self.prefix if prefix is None else prefix
        return [
            inspect.Parameter(
                prefix + name, inspect.Parameter.KEYWORD_ONLY, default=default_of(entry), annotation=entry.type
            )
            for name, entry in self.fields.items()
        ]

    def describe(self, prefix: str | None = None) -> str:
        """One line a keyword, grouped by feature, for docstrings."""
        prefix = self.prefix if prefix is None else prefix
        lines: list[str] = []
        for feature in self.features.values():
            source = f" ({feature.paper})" if feature.paper else ""
            lines.append(f"{feature.name}: {feature.summary}{source}")
            for entry in dataclasses.fields(feature.options):
                lines.append(f"    {prefix}{entry.name} = {default_of(entry)!r}: {entry.metadata.get('doc', '')}")
        return "\n".join(lines)


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """The default of an options field."""
    if entry.default is not dataclasses.MISSING:
        return entry.default
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return inspect.Parameter.empty


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value fits an annotation. A bool is no number, and an int is a float."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(accepts(arm, value) for arm in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is tuple:
        arms = typing.get_args(hint)
        each = arms[0] if len(arms) == 2 and arms[1] is Ellipsis else Any
        return isinstance(value, tuple) and all(accepts(each, item) for item in value)
    if hint is Callable or (origin is not None and origin is typing.get_origin(Callable[..., Any])):
        return callable(value)
    return isinstance(value, origin or hint)


def _switches(feature: Feature, options: Options, prefix: str) -> str:
    """The keywords by which a user switched a feature on, else its name."""
    given = [
        f"`{prefix}{entry.name}`"
        for entry in dataclasses.fields(feature.options)
        if getattr(options[feature.name], entry.name) != default_of(entry)
    ]
    return given[0] if given else feature.name


def require(condition: bool, sentence: str) -> None:
    """Raise a `ConfigError` with the sentence unless the condition holds."""
    if not condition:
        raise ConfigError(sentence)
