"""Every example of every feature of the catalog as a tiny model, with every parameter perturbed.

A case is one example of one feature: keywords as a user writes them. A property of the library is tested over all
cases, so that a feature is covered as soon as it is in the catalog.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import checkout  # noqa: F401
import torch
from torch import Tensor, nn

from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.cache import KVCache, StaticCache
from x_transformers.errors import ConfigError
from x_transformers.layers.catalog import FEATURES as STACK_FEATURES
from x_transformers.models.options.catalog import FEATURES as MODEL_FEATURES
from x_transformers.options.schema import Feature

FEATURES = (*STACK_FEATURES, *MODEL_FEATURES)

VOCABULARY, MAX_LEN, DIM, HEADS = 24, 32, 16, 4
NOISE = 0.05
EXACT = 2e-5
"""Largest difference of two ways to compute the same thing in float32."""

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
    """Features that meet in one model: one of them, or two in a pair, or none in the base model.

    Attributes:
        name: the test id.
        features: which they are.
        keywords: as a user writes them.
        number: of the feature's example, from 1, if there is one feature.
    """

    name: str
    features: tuple[Feature, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None

    def __str__(self) -> str:
        return self.name

    def build(self, stack: str = "decoder", **more: Any) -> TransformerWrapper:
        """Build a perturbed model in evaluation mode.

        Raises:
            ConfigError: if the combination is refused.
        """
        given = {**copy.deepcopy(dict(self.keywords)), **more}
        wrapper = {name: given.pop(name) for name in list(given) if name in WRAPPER_KEYWORDS}
        if stack == "cross":
            given.pop("cross_attend", None)
        layers = STACKS[stack](**{**STACK, **given})
        return perturb(TransformerWrapper(**{**WRAPPER, **wrapper}, attn_layers=layers)).eval()

    @property
    def draws(self) -> bool:
        """True if training draws random numbers."""
        return any(word in keyword for keyword in self.keywords for word in ("dropout", "gumbel", "subsample"))

    def exemption(self, of: str) -> str | None:
        """Return why the property cannot hold here, if a feature says so of all its examples or of this one."""
        return next(iter(self._exemptions(of)), None)

    def _exemptions(self, of: str) -> list[str]:
        keys = (of,) if self.number is None else (of, (of, self.number))
        return [feature.exempt[key] for feature in self.features for key in keys if key in feature.exempt]

    def without_gradient(self) -> list[re.Pattern[str]]:
        """Return patterns of parameters that cannot have a gradient: the part of an exemption before its `: `.

        They are written for a decoder without cross-attention.
        """
        return [re.compile(sentence.split(": ")[0]) for sentence in self._exemptions("gradients")]

    def __and__(self, other: Case) -> Case:
        return Case(f"{self}+{other}", (*self.features, *other.features), {**self.keywords, **other.keywords})


BASE = Case("plain")
CASES = (
    BASE,
    *(
        Case(f"{feature.name}-{index}", (feature,), example, index)
        for feature in FEATURES
        for index, example in enumerate(feature.examples, start=1)
    ),
)


NAMES = """
    absolute_positions alibi attention_dropout backend context_dropout dynamic_bias emb_dropout
    emb_frac_gradient factorized_embedding feedforward gate_residual glu grouped_heads heads
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
    """Return the cases that this kind of stack refuses when it is built, with the message of the error."""
    words = {}
    for case in CASES:
        try:
            case.build(stack)
        except ConfigError as error:
            words[case.name] = str(error)
    return words


def cases(*stacks: str, exempt: str | None = None) -> list[tuple[str, Case]]:
    """Return (kind of stack, case) for every case that can be built and is not exempt from the property.

    Decoders are tested over every example of a feature, other stacks over the first that they can have.
    """
    found = [(stack, case) for stack in stacks for case in CASES if case.name not in refused(stack)]
    found = [(stack, case) for stack, case in found if exempt is None or case.exemption(exempt) is None]
    firsts = _firsts(found)
    return [(stack, case) for stack, case in found if stack == "decoder" or (stack, case) in firsts]


def one_of_each(*stacks: str, exempt: str | None = None) -> list[tuple[str, Case]]:
    """Return one case for each feature, for expensive properties that do not depend on details."""
    return _firsts(cases(*stacks, exempt=exempt))


def _firsts(found: list[tuple[str, Case]]) -> list[tuple[str, Case]]:
    first: dict[tuple[str, ...], tuple[str, Case]] = {}
    for stack, case in found:
        first.setdefault((stack, *(feature.name for feature in case.features)), (stack, case))
    return list(first.values())


def name_of(value: object) -> str:
    """Return a readable test id."""
    return str(value)


def perturb(model: Any, noise: float = NOISE) -> Any:
    """Add noise to every parameter: gates that start at zero would hide faults."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def perturbed(model: Any, noise: float = NOISE) -> Any:
    """Add noise to every parameter, and set evaluation mode."""
    return perturb(model, noise).eval()


# Other inputs of a pass are derived from the tokens and their rows, so that tests may cut and shuffle both


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


def context_width(model: TransformerWrapper) -> int | None:
    for branch in model.attn_layers.branches("c"):
        return branch.attention.dim_context
    return None


@functools.cache
def contexts(width: int) -> Tensor:
    """Return a context `(64, 5, width)` for each row of a batch."""
    return torch.randn(64, 5, width, generator=torch.Generator().manual_seed(7))


def call(model: TransformerWrapper, ids: Tensor | None, rows: Sequence[int] | None = None, **arguments: Any) -> Any:
    """Run one pass, with a context if the model attends to one, and ids for further embeddings.

    Args:
        model: the model.
        ids: `(b, n)` tokens.
        rows: number of the context of each row; default its own.
        arguments: of the pass.
    """
    if ids is not None:
        arguments = {**other_inputs(model, ids, rows), **arguments}
    return model(ids, **arguments)


def other_inputs(model: TransformerWrapper, ids: Tensor, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the inputs that this model reads besides tokens: a context, a condition, further ids."""
    rows = list(range(len(ids)) if rows is None else rows)
    needed: dict[str, Any] = {}
    width = context_width(model)
    if width is not None:
        needed["context"] = contexts(width)[rows].to(next(model.parameters()))
    if model.attn_layers.need_condition:
        needed["condition"] = contexts(model.attn_layers.dim_condition)[rows, 0].to(next(model.parameters()))
    if model.embeds and model.embed_default_id is None:
        needed["embed_ids"] = {name: further(ids) for name, further in further_ids(model).items()}
    return needed


def further_ids(model: TransformerWrapper) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return functions from token ids to the ids of each further table of the model."""

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
    """Run the tokens chunk by chunk through a cache, which should equal a single pass.

    Args:
        model: the model.
        ids: `(b, n)` tokens.
        chunks: number of tokens of each pass.
        cache: to start from; by default the first pass makes one.
        whole: pass the whole sequence each time, of which only the new tokens run.
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
    """Assert equal shape and dtype, finite numbers, and differences of at most `most`, relative to numbers above 1."""
    torch.testing.assert_close(got, wanted, atol=most, rtol=most)
    assert got.isfinite().all()
