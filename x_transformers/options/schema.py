"""Features, their keywords, and the parsing of keywords into typed options.

A feature owns a frozen, keyword-only dataclass. The names of its fields are its keywords, without the prefix of its
group: `Decoder(attn_qk_norm = True)` sets the field `qk_norm` of the feature that owns it. A `Schema` collects the
features of one group. `Schema.parse` sorts keywords to their owners and checks each feature by itself; `check_choices`
and `check_rules` then check features against each other. All of them collect their errors in `Faults`, so that a user
sees every mistake of a call at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from x_transformers.errors import ConfigError, Faults
from x_transformers.options.values import accepts, convert, plain, shown, why_not


def opt(default: Any, doc: str) -> Any:
    """Declare a field of an options dataclass.

    Args:
        default: default value; a dict is copied for each instance.
        doc: description of the keyword, which `help()` shows.
    """
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Conflict of a feature with other options of the same layer or stack.

    Attributes:
        when: receives the options of a layer and its stack, and returns True if they conflict.
        why: sentence that says what the conflict is, and what to change; or a function of the same options that
            returns it.
    """

    when: Callable[[Options | Surroundings], bool]
    why: str | Callable[[Options | Surroundings], str]

    def sentence(self, options: Options | Surroundings) -> str:
        """Return the conflict in words."""
        return self.why if isinstance(self.why, str) else self.why(options)


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One idea, usually one paper: its keywords, the function that builds it, and its conflicts with other options.

    Attributes:
        name: name of the feature in `explain()`, tests and rules.
        group: "stack" (`Decoder(...)`), "attn" (`attn_...`), "ff" (`ff_...`), "mixer" (`mixer_...`) or "model"
            (`TransformerWrapper(...)`).
        slot: the place where it acts ("norm", "score", "qk", ...).
        options: dataclass of its keywords.
        summary: short description for `help()` and the table of options.
        enabled: receives the options, and returns True if they switch the feature on.
        build: builds the part; each slot defines the arguments.
        also: functions like `build` by slot, for an attention's features with parts in further slots; they may return
            None for no part.
        choice: name of a set of alternatives, of which at most one may be on; None if there are none.
        joins: names of alternatives that it can be combined with: its part then contains theirs.
        paper: arXiv id, or "OpenReview ID".
        self_attention_only: True if `cross_attn_` keywords do not inherit it from `attn_` keywords.
        refuses: conflicts that raise a `ConfigError` when the feature is on.
        warns: conflicts that are only reported when it is on.
        idle: receives the options, and returns the names of those that have no effect although the feature is on.
        unpackable: why it cannot keep the documents of packed rows apart, or a function of the options of its group
            that returns this; None if it can.
        examples: small sets of keywords, with prefixes, as a user would write them; tests run over them.
        exempt: properties of the test suite that cannot hold for the feature, each with the reason; a key (property, n)
            is about the n-th example only, from 1.
    """

    name: str
    group: str
    slot: str
    options: type
    summary: str
    enabled: Callable[[Any], bool] = lambda options: True
    build: Callable[..., Any] | None = None
    also: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    choice: str | None = None
    joins: tuple[str, ...] = ()
    paper: str | None = None
    self_attention_only: bool = False
    refuses: tuple[Rule, ...] = ()
    warns: tuple[Rule, ...] = ()
    idle: Callable[[Any], Iterable[str]] = lambda options: ()
    unpackable: str | Callable[[Options], str | None] | None = None
    examples: tuple[Mapping[str, Any], ...] = ()
    exempt: Mapping[Any, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Options:
    """Options of every feature of one group.

    Attributes:
        schema: schema that parsed the options.
        values: options dataclass of each feature, by name; `options["rotary"]` is short for `options.values["rotary"]`.
    """

    schema: Schema
    values: Mapping[str, Any]
    # rules read these two of a layer's surroundings; options by themselves belong to no layer
    is_self_attention: ClassVar[bool] = False
    is_cross_attention: ClassVar[bool] = False

    def __getitem__(self, feature: str) -> Any:
        return self.values[feature]

    @property
    def _enabled(self) -> dict[str, Feature]:
        """Features that are on, by name; computed once, since every slot of every layer reads them."""
        # `functools.cached_property` has a lock until Python 3.12, which a process forked meanwhile would wait for
        made = self.__dict__.get("_made")
        if made is None:
            every = self.schema.features
            made = {name: every[name] for name, value in self.values.items() if every[name].enabled(value)}
            self.__dict__["_made"] = made
        return made

    def on(self, feature: str) -> bool:
        """Return True if the feature of this name is on."""
        return feature in self._enabled

    def enabled(self, slot: str | None = None) -> list[Feature]:
        """Return the features that are on, in the order of the catalog; with `slot`, only those of the slot."""
        return [feature for feature in self._enabled.values() if slot in (None, feature.slot)]

    def parts(self, slot: str | None = None) -> list[Feature]:
        """Return the features that are on and have a part of their own, which that of no other one contains.

        Args:
            slot: only those of the slot; default those of every slot.
        """
        enabled = self.enabled(slot)
        joined = {name for feature in enabled for name in feature.joins}
        return [feature for feature in enabled if feature.name not in joined]

    def switch(self, feature: Feature, prefix: str = "") -> str:
        """Return the first keyword of a feature that is not at its default, in backquotes; else the feature's name."""
        for entry in dataclasses.fields(feature.options):
            if getattr(self[feature.name], entry.name) != default_of(entry):
                return f"`{prefix}{entry.name}`"
        return feature.name

    def unpackable(self) -> list[str]:
        """Return why documents of packed rows cannot be kept apart, one sentence for each feature that is on."""
        given = (feature.unpackable for feature in self.enabled())
        reasons = [reason(self) if callable(reason) else reason for reason in given]
        return [
            f"`flash_pack_seq` keeps the documents of a row apart, but {reason}; drop one of them."
            for reason in reasons
            if reason is not None
        ]


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Options that apply in one layer, its own and the stack's, as input of rules.

    Attributes:
        groups: the options.
        is_self_attention, is_cross_attention: kind of the layer; both False for other kinds, and outside of a layer.
    """

    groups: tuple[Options, ...]
    is_self_attention: bool = False
    is_cross_attention: bool = False

    def __getitem__(self, feature: str) -> Any:
        return next(options[feature] for options in self.groups if feature in options.values)

    def on(self, feature: str) -> bool:
        """Return True if the feature of this name is on in one of the groups."""
        return any(options.on(feature) for options in self.groups)

    def unpackable(self) -> list[str]:
        """Return why documents of packed rows cannot be kept apart, one sentence for each feature that is on."""
        return [sentence for options in self.groups for sentence in options.unpackable()]


class Schema:
    """Features of one group, with the owner, type and default of every keyword.

    Args:
        features: the features, in the order of signatures and of `help()`.
        prefix: prefix of the keywords.

    Raises:
        TypeError: at import, if a keyword has two owners, or if the options of a feature are not a frozen dataclass.
    """

    def __init__(self, features: Sequence[Feature], prefix: str = "") -> None:
        self.prefix = prefix
        self.features = {feature.name: feature for feature in features}
        self.fields: dict[str, dataclasses.Field[Any]] = {}
        self.owner: dict[str, Feature] = {}
        self.hints: dict[str, Any] = {}
        # options at their defaults; only for features with immutable values, since calls share the object
        self.defaults: dict[str, Any] = {}
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

    def parse(
        self, given: Mapping[str, Any], faults: Faults, prefix: str | None = None, *, others: Iterable[str] = ()
    ) -> Options:
        """Sort keywords to the features that own them, and build the options of each feature.

        Args:
            given: keywords without prefix.
            faults: collects unknown keywords, values of a wrong type, and errors of a feature's own checks.
            prefix: prefix of the keywords in errors; default that of the schema.
            others: parameters of the same constructor that belong to no feature, for suggestions.

        Returns:
            The options; a feature with faults has its defaults.
        """
        prefix = self.prefix if prefix is None else prefix
        by_feature: dict[str, dict[str, Any]] = {name: {} for name in self.features}
        for keyword, value in given.items():
            if keyword not in self.owner:
                faults.add_unknown(f"{prefix}{keyword}", [*self.owner, *others], keyword)
                continue
            # options are frozen and JSON has no tuples
            value = plain(tuple(value) if isinstance(value, list) else value)
            if not accepts(self.hints[keyword], value):
                wanted = why_not(self.fields[keyword].type, value)
                faults.add(f"`{prefix}{keyword}` is {shown(value)}; {wanted}")
                continue
            by_feature[self.owner[keyword].name][keyword] = convert(self.hints[keyword], value)
        values: dict[str, Any] = {}
        for name, feature in self.features.items():
            if not by_feature[name] and name in self.defaults:
                values[name] = self.defaults[name]
                continue
            # `__post_init__` names fields; the user knows them with the prefix
            with faults.catching(lambda message: self.in_full(message, prefix)):
                values[name] = feature.options(**by_feature[name])
            # go on with the defaults, so that the checks between features report their faults too
            if name not in values:
                values[name] = feature.options()
        return Options(self, values)

    def in_full(self, message: str, prefix: str | None = None) -> str:
        """Add the prefix to every keyword of this group that the message names in backquotes."""
        prefix = self.prefix if prefix is None else prefix
        return re.sub(r"`(\w+)", lambda m: f"`{prefix}{m[1]}" if m[1] in self.owner else m[0], message)

    def check_choices(self, options: Options, faults: Faults, prefix: str | None = None) -> None:
        """Add a fault for each choice with more than one alternative switched on."""
        prefix = self.prefix if prefix is None else prefix
        choices: dict[str, list[Feature]] = {}
        enabled = options.enabled()
        joined = {name for feature in enabled for name in feature.joins}
        for feature in enabled:
            if feature.choice is not None and feature.name not in joined:
                choices.setdefault(feature.choice, []).append(feature)
        for choice, features in choices.items():
            if len(features) > 1:
                names = " and ".join(options.switch(f, prefix) for f in features)
                faults.add(f"{names} are alternatives of one choice ({choice}); keep one of them.")

    def check_rules(
        self, options: Options, surroundings: Options | Surroundings, faults: Faults, prefix: str | None = None
    ) -> None:
        """Add a fault for each conflict of a feature that is on with its surroundings."""
        for feature in options.enabled():
            for rule in feature.refuses:
                if rule.when(surroundings):
                    faults.add(self.in_full(rule.sentence(surroundings), prefix))

    def unwise(self, options: Options, surroundings: Options | Surroundings) -> list[str]:
        """Return a sentence for each combination that is allowed but unwise (`Feature.warns`)."""
        rules = (rule for feature in options.enabled() for rule in feature.warns)
        return [rule.sentence(surroundings) for rule in rules if rule.when(surroundings)]

    def without_effect(self, options: Options, given: Iterable[str], prefix: str | None = None) -> list[str]:
        """Return a sentence for each given keyword that changes nothing: its feature is off, or ignores it."""
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
                sentences.append(f"`{prefix}{keyword}` has no effect with the other options of {feature.name}.")
        return sentences

    def parameters(self, prefix: str | None = None) -> list[inspect.Parameter]:
        """Return the keywords as keyword-only parameters of a signature."""
        prefix = self.prefix if prefix is None else prefix
        return [
            inspect.Parameter(
                prefix + name, inspect.Parameter.KEYWORD_ONLY, default=default_of(entry), annotation=entry.type
            )
            for name, entry in self.fields.items()
        ]

    def describe(self, prefix: str | None = None, *, only: str | None = None) -> str:
        """Return the description of all keywords, one line each, grouped by feature.

        Args:
            prefix: of the keywords; default that of the schema.
            only: a keyword, without prefix, whose feature is described; None for all.
        """
        prefix = self.prefix if prefix is None else prefix
        lines: list[str] = []
        for feature in self.features.values() if only is None else (self.owner[only],):
            source = f" ({feature.paper})" if feature.paper else ""
            lines.append(f"{feature.name}: {feature.summary}{source}")
            for entry in dataclasses.fields(feature.options):
                lines.append(f"    {prefix}{entry.name} = {default_of(entry)!r}: {entry.metadata.get('doc', '')}")
        return "\n".join(lines)


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; `inspect.Parameter.empty` if it has none."""
    if entry.default is not dataclasses.MISSING:
        return entry.default
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return inspect.Parameter.empty


def unpackable(feature: Feature) -> str:
    """Return why documents of packed rows cannot be kept apart with a feature that declares it."""
    return f"`flash_pack_seq` keeps the documents of a row apart, but {feature.unpackable}; drop one of them."


def at_least(least: int, **given: int | None) -> None:
    """Raise a `ConfigError` if a number that was given is smaller than `least`."""
    for name, value in given.items():
        require(value is None or value >= least, f"`{name}` is {value}; it must be a whole number, at least {least}.")


def positive(**given: float | None) -> None:
    """Raise a `ConfigError` if a number that was given is 0 or negative."""
    for name, value in given.items():
        require(value is None or value > 0, f"`{name}` is {value}; it must be positive.")


def require(condition: bool, sentence: str) -> None:
    """Raise a `ConfigError` with the sentence if the condition is false."""
    if not condition:
        raise ConfigError(sentence)
