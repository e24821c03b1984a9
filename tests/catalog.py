"""The catalogue as models: every example of every feature in a tiny model, with every parameter perturbed.

A case is one example of one feature, keywords as a user writes them. A property of the library is tested over all
cases, so that a feature is covered from the moment it stands in the catalogue.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.cache import KVCache, StaticCache
from x_transformers.errors import ConfigError
from x_transformers.layers.catalog import FEATURES as STACK_FEATURES
from x_transformers.models.options import FEATURES as MODEL_FEATURES
from x_transformers.options.schema import Feature

FEATURES = (*STACK_FEATURES, *MODEL_FEATURES)

VOCABULARY, MAX_LEN, DIM, HEADS = 24, 32, 16, 4
NOISE = 0.05
EXACT = 2e-5
"""What two ways of computing the same thing in float32 may differ by."""

WRAPPER = {"num_tokens": VOCABULARY, "max_seq_len": MAX_LEN}
STACK = {"dim": DIM, "depth": 2, "heads": HEADS, "attn_dim_head": 8, "verbose": False}

STACKS: dict[str, Callable[..., Any]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "cross": functools.partial(Decoder, cross_attend=True),
}
WRAPPER_KEYWORDS = frozenset(inspect.signature(TransformerWrapper).parameters)


@dataclass(frozen=True, eq=False)
class Case:
    """Features that meet in one model: one of them, or two in a pair, or none in the base model."""

    name: str
    features: tuple[Feature, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, stack: str = "decoder", **more: Any) -> TransformerWrapper:
        """A perturbed model in evaluation mode.

        Raises:
            ConfigError: where the combination is refused.
        """
        given = {**copy.deepcopy(dict(self.keywords)), **more}
        wrapper = {name: given.pop(name) for name in list(given) if name in WRAPPER_KEYWORDS}
        if stack == "cross":
            given.pop("cross_attend", None)
        layers = STACKS[stack](**{**STACK, **given})
        return perturb(TransformerWrapper(**{**WRAPPER, **wrapper}, attn_layers=layers)).eval()

    def exemption(self, of: str) -> str | None:
        """Why the property cannot hold here, if a feature says so."""
        return next((feature.exempt[of] for feature in self.features if of in feature.exempt), None)

    def without_gradient(self) -> list[re.Pattern[str]]:
        """Names of parameters that cannot have a gradient: what the exemption says in front of its `: `.

        They are written for a decoder without cross-attention.
        """
        sentences = [f.exempt["gradients"] for f in self.features if "gradients" in f.exempt]
        return [re.compile(sentence.split(": ")[0]) for sentence in sentences]

    def __and__(self, other: Case) -> Case:
        return Case(f"{self}+{other}", (*self.features, *other.features), {**self.keywords, **other.keywords})


BASE = Case("plain")
CASES = (
    BASE,
    *(
        Case(f"{feature.name}-{index}", (feature,), example)
        for feature in FEATURES
        for index, example in enumerate(feature.examples, start=1)
    ),
)


NAMES = """
    absolute_positions alibi attention_dropout backend context_dropout dynamic_bias emb_dropout
    emb_frac_gradient factorised_embedding feedforward gate_residual glu grouped_heads heads
    interspersed_memory_tokens l2norm_embed layer_dropout layerscale learned_sink logits_dim memory_kv
    memory_tokens norm norm_placement post_act_ln post_emb_norm qk_norm qk_rmsnorm recurrent_memory
    residual_scale rmsnorm rotary scalenorm simple_rmsnorm softclamp_logits stack structure t5_bias
    tied_embedding window zero_kv
"""
FOUNDATION = frozenset(NAMES.split())
"""Features whose pairs, and whose compiled decoding, are tested at every change: what most models are made of."""


def is_foundation(case: Case) -> bool:
    return all(feature.name in FOUNDATION for feature in case.features) and "only_attn" not in case.keywords


@functools.cache
def refused(stack: str) -> Mapping[str, str]:
    """The cases that this kind of stack refuses when it is built, and in which words."""
    words = {}
    for case in CASES:
        try:
            case.build(stack)
        except ConfigError as error:
            words[case.name] = str(error)
    return words


def cases(*stacks: str, exempt: str | None = None) -> list[tuple[str, Case]]:
    """(kind of stack, case) for every case that can be built and has no exemption from the property.

    Decoders are tested over every example of a feature, other stacks over the first that they can have.
    """
    found = [(stack, case) for stack in stacks for case in CASES if case.name not in refused(stack)]
    found = [(stack, case) for stack, case in found if exempt is None or case.exemption(exempt) is None]
    firsts = _firsts(found)
    return [(stack, case) for stack, case in found if stack == "decoder" or (stack, case) in firsts]


def one_of_each(*stacks: str, exempt: str | None = None) -> list[tuple[str, Case]]:
    """The same with one case for each feature, for properties that cost much and that details do not touch."""
    return _firsts(cases(*stacks, exempt=exempt))


def _firsts(found: list[tuple[str, Case]]) -> list[tuple[str, Case]]:
    first: dict[tuple[str, ...], tuple[str, Case]] = {}
    for stack, case in found:
        first.setdefault((stack, *(feature.name for feature in case.features)), (stack, case))
    return list(first.values())


def name_of(value: object) -> str:
    """Test ids are words."""
    return str(value)


def perturb(model: Any, noise: float = NOISE) -> Any:
    """Add noise to every parameter: gates that start at zero would hide faults."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def perturbed(model: Any, noise: float = NOISE) -> Any:
    """The same, in evaluation mode."""
    return perturb(model, noise).eval()


# what a pass needs beside tokens is made from the tokens and their rows, so that tests may cut and shuffle both


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


def context_width(model: TransformerWrapper) -> int | None:
    for branch in model.attn_layers.branches("c"):
        return branch.attention.dim_context
    return None


@functools.cache
def contexts(width: int) -> Tensor:
    """`(64, 5, width)`: what each row of a batch looks at in cross-attention."""
    return torch.randn(64, 5, width, generator=torch.Generator().manual_seed(7))


def call(model: TransformerWrapper, ids: Tensor | None, rows: Sequence[int] | None = None, **arguments: Any) -> Any:
    """One pass, with a context for rows that look at one, and ids for further embeddings.

    Args:
        model: the model.
        ids: `(b, n)` tokens.
        rows: which context each row looks at; by default its own number's.
        arguments: of the pass.
    """
    if ids is not None:
        arguments = {**beside(model, ids, rows), **arguments}
    return model(ids, **arguments)


def beside(model: TransformerWrapper, ids: Tensor, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """What a pass needs beside these tokens, where the model reads it: a context, a condition, further ids."""
    rows = list(range(len(ids)) if rows is None else rows)
    needed: dict[str, Any] = {}
    width = context_width(model)
    if width is not None:
        needed["context"] = contexts(width)[rows].to(next(model.parameters()))
    if model.attn_layers.need_condition:
        needed["condition"] = contexts(model.attn_layers.dim_condition)[rows, 0].to(next(model.parameters()))
    if model.embeds:
        needed["embed_ids"] = {name: further(ids) for name, further in further_ids(model).items()}
    return needed


def further_ids(model: TransformerWrapper) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ids for each further table of the model, from those of the tokens."""

    def of(table: nn.Embedding) -> Callable[[Tensor], Tensor]:
        return lambda ids: ids * 7 % table.num_embeddings

    return {name.removesuffix("_embed"): of(table) for name, table in model.embeds.items()}


def decode(
    model: TransformerWrapper,
    ids: Tensor,
    chunks: Iterable[int],
    *,
    cache: KVCache | None = None,
    whole: bool = False,
    per_token: Mapping[str, Tensor] | None = None,
    **arguments: Any,
) -> Tensor:
    """Run the tokens chunk by chunk through a cache; what a single pass should give.

    Args:
        model: the model.
        ids: `(b, n)` tokens.
        chunks: how many tokens come in at a time.
        cache: to start from; by default the first pass makes one.
        whole: hand in the whole sequence each time, of which the new tokens run.
        per_token: `(b, n)` arguments, which cover cached and new tokens.
        arguments: of every pass.
    """
    outputs, end, state = [], 0, cache
    for chunk in chunks:
        start, end = end, end + chunk
        covering = {name: t[..., :end] for name, t in (per_token or {}).items()}
        given = ids[:, :end] if whole else ids[:, start:end]
        out, state = call(
            model,
            given,
            cache=state,
            input_not_include_cache=not whole,
            return_intermediates=True,
            **covering,
            **arguments,
        )
        outputs.append(out)
    assert end == ids.shape[1]
    return torch.cat(outputs, dim=1)


def static_cache(model: TransformerWrapper, batch: int, length: int, **more: Any) -> StaticCache:
    return model.static_cache(batch, length, **more)


def close(got: Tensor, wanted: Tensor, most: float = EXACT) -> None:
    """Both are finite, of one shape and dtype, and differ by at most `most`, relative to numbers above 1."""
    torch.testing.assert_close(got, wanted, atol=most, rtol=most)
    assert got.isfinite().all()
