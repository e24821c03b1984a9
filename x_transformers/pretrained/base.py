"""Interface of a family of pretrained models: its configuration as keywords, and the sources of our weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from x_transformers.errors import ConfigError
from x_transformers.options.values import shown
from x_transformers.pretrained.layouts import SAME, Layout, Link

NEUTRAL = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cache_implementation",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "language",
        "max_length",
        "min_length",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_return_dict",
    ]
)
"""Entries of a configuration that do not change what a model computes."""


class Settings:
    """Entries of a configuration, of which each one has to be read.

    Args:
        entries: the configuration.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.entries = dict(entries)
        self.family = str(entries.get("model_type"))
        self.read: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """Return an entry; the default if it is missing or null."""
        self.read.add(name)
        value = self.entries.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """Return an entry.

        Raises:
            ConfigError: if it is missing.
        """
        value = self.take(name)
        if value is None:
            raise ConfigError(f"this configuration of a {self.family} has no `{name}`, which the model needs.")
        return value

    def refuse(self, name: str, *allowed: Any) -> None:
        """Check that an entry is missing, null, or one of some values.

        Raises:
            ConfigError: if it is another one.
        """
        value = self.take(name)
        if value is not None and value not in allowed:
            raise ConfigError(
                f"this configuration of a {self.family} has `{name}` = {shown(value)}, which this version cannot "
                f"express; allowed are {', '.join(map(repr, allowed)) or 'no value'}."
            )

    def refuse_quantized(self) -> None:
        """Check that the weights are plain numbers.

        Raises:
            ConfigError: if the configuration says how they are quantized.
        """
        how = self.take("quantization_config")
        if how:
            method = how.get("quant_method") if isinstance(how, Mapping) else how
            raise ConfigError(
                f"the weights of this {self.family} are quantized (`quantization_config`, {shown(method)}), and this "
                "version reads plain weights. Let transformers dequantize them and save them in bfloat16, and remove "
                "the entry from the configuration that it writes."
            )

    def rename(self, **names: str) -> None:
        """Read entries that this family names differently under the usual names: `n_embd = "hidden_size"`."""
        for own, usual in names.items():
            value = self.take(own)
            if value is not None:
                self.entries.setdefault(usual, value)

    def saved_class(self, *ends: str) -> str:
        """Return the name of the class that was saved, which ends with one of some words; the first is the default.

        Raises:
            ConfigError: if it is another class.
        """
        name = (self.take("architectures") or [ends[0]])[0]
        if not name.endswith(ends):
            raise ConfigError(
                f"this configuration of a {self.family} has `architectures` = {shown([name])}, whose head this version "
                f"does not have; classes whose names end with {' or '.join(map(repr, ends))} are read. Write one of "
                "these into the configuration to load the rest of the model."
            )
        return name

    def skip(self, *names: str) -> None:
        """Mark entries as read that say nothing about the result, such as dropouts of a training."""
        self.read.update(names)

    def finish(self) -> None:
        """Check that nothing is left that might change what the model computes.

        Raises:
            ConfigError: naming each entry that is left.
        """
        off = (None, False)
        left = {name: value for name, value in self.entries.items() if name not in self.read and name not in NEUTRAL}
        left = {name: value for name, value in left.items() if not any(value is each for each in off)}
        if left:
            named = ", ".join(f"`{name}` = {shown(value)}" for name, value in left.items())
            raise ConfigError(
                f"this configuration of a {self.family} has entries that this version does not know: {named}. Remove "
                "those that do not change what the model computes."
            )


PAIR = "XTransformer"
"""Class of an encoder with a decoder."""
SPEECH = "SpeechTransformer"
"""Class of an encoder of spectrograms with a decoder."""


@dataclass
class Outline:
    """A model in our words.

    Attributes:
        model: keywords of the `TransformerWrapper`.
        stack: keywords of the stack.
        weights: the link of each of our weights to tensors in the files, by name.
        unused: the ends of names in the files that are no weights.
        prefix: of the names; files of a model that was saved without its head lack it.
        older: ends of names, and how older files have them.
        kind: class of the stack; or that of an encoder with a decoder, whose keywords are all in `model`.
        images: the model reads images instead of tokens.
        others: beginnings of the names of another model in the same files.
        entries: configuration of the model by itself; None for that of the folder.
    """

    model: dict[str, Any]
    stack: dict[str, Any]
    weights: dict[str, Link] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    prefix: str = "model."
    older: tuple[tuple[str, str], ...] = ()
    kind: str = "Decoder"
    images: bool = False
    others: tuple[str, ...] = ()
    entries: Mapping[str, Any] | None = None

    def put(self, ours: str | tuple[str, ...], *theirs: str, layout: Layout = SAME) -> None:
        """Link weights of ours with tensors in the files.

        Args:
            ours: name of the weight, or names of several that are read from the same tensors. An earlier link of it
                is replaced.
            theirs: names of the tensors.
            layout: how these become our weights, and back.
        """
        link = Link((ours,) if isinstance(ours, str) else ours, theirs, layout)
        self.weights |= dict.fromkeys(link.ours, link)

    @property
    def links(self) -> list[Link]:
        """Links of all weights, each once."""
        return list(dict.fromkeys(self.weights.values()))


@dataclass(frozen=True)
class Family:
    """A family of models of another library.

    Attributes:
        read: from the configuration to the outline.
        write: from the keywords of a model to the entries of a configuration that might describe it; whether it does is
            found out by reading it. None if this family is only read.
        architecture: name of the class with the logits, which configurations list.
    """

    read: Callable[[Settings], Outline]
    write: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    architecture: str = ""


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: str) -> str:
    """Return our name of an activation.

    Raises:
        ConfigError: if there is none.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"this configuration has the activation {name!r}, which this version does not know; it knows "
            f"{', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def multiple(dim: int, inner: int) -> float:
    """Return the `ff_mult` with which `int(dim * mult)` is `inner`."""
    return (inner + 0.5) / dim
