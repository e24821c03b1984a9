"""Options of what tokens attend to besides each other: recurrent memory, memory tokens, registers."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.models.options.base import Keywords, model_feature
from x_transformers.options.schema import Rule, at_least, opt


@dataclass(frozen=True, kw_only=True)
class RecurrentMemory(Keywords):
    max_mem_len: int = opt(0, "number of positions of recurrent memory to keep")
    joins_documents = "would hold the last documents of a row, whatever the next row begins with"

    def __post_init__(self) -> None:
        at_least(0, max_mem_len=self.max_mem_len)


RECURRENT_MEMORY = model_feature(
    "recurrent_memory",
    RecurrentMemory,
    "keys and values of earlier segments",
    {"max_mem_len": 16},
    {"max_mem_len": 16, "shift_mem_down": 1},
    paper="1901.02860",
)


@dataclass(frozen=True, kw_only=True)
class ShiftedMemory(Keywords):
    shift_mem_down: int = opt(0, "layer i reads the memory of layer i + shift")

    def __post_init__(self) -> None:
        at_least(0, shift_mem_down=self.shift_mem_down)


SHIFTED_MEMORY = model_feature(
    "shifted_memory", ShiftedMemory, "each layer reads the memory of a higher one", paper="2012.15688"
)


OWN_MEMORY = "every segment has memory tokens of its own, so that two segments are not one pass"


@dataclass(frozen=True, kw_only=True)
class MemoryTokens(Keywords):
    num_memory_tokens: int | None = opt(None, "number of learned tokens before the others")
    joins_documents = "belong to no document"

    def __post_init__(self) -> None:
        at_least(0, num_memory_tokens=self.num_memory_tokens)


MEMORY_TOKENS = model_feature(
    "memory_tokens",
    MemoryTokens,
    "learned tokens in front of the others",
    {"num_memory_tokens": 3},
    paper="2006.11527",
    enabled=lambda options: bool(options.num_memory_tokens),
    memories=OWN_MEMORY,
)


@dataclass(frozen=True, kw_only=True)
class InterspersedMemoryTokens(Keywords):
    memory_tokens_interspersed_every: int | None = opt(
        None, "repeat the memory tokens before every group of this number of positions; causal stacks"
    )

    def __post_init__(self) -> None:
        at_least(1, memory_tokens_interspersed_every=self.memory_tokens_interspersed_every)


INTERSPERSED_MEMORY_TOKENS = model_feature(
    "interspersed_memory_tokens",
    InterspersedMemoryTokens,
    "learned tokens in front of every group of others",
    {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3},
    paper="2006.11527",
    enabled=lambda options: options.memory_tokens_interspersed_every is not None,
    refuses=(
        Rule(
            when=lambda options: not options.on("memory_tokens"),
            why="`memory_tokens_interspersed_every` needs `num_memory_tokens`; set it, or drop both.",
        ),
    ),
    memories=OWN_MEMORY,
    compiled_decoding="steps that open a group are longer than others, and are refused inside of a graph",
)


@dataclass(frozen=True, kw_only=True)
class RegisterTokens(Keywords):
    num_register_tokens: int = opt(0, "number of learned tokens after the patches, which the output leaves out")

    def __post_init__(self) -> None:
        at_least(0, num_register_tokens=self.num_register_tokens)


REGISTER_TOKENS = model_feature(
    "register_tokens", RegisterTokens, "learned tokens after the patches", paper="2309.16588"
)
