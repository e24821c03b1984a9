"""Packed rows: in every kind of stack and model, documents in one row are what each of them is by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from catalog import Case, cases, close, context_width, contexts, name_of, other_inputs, perturb, tokens
from torch import Tensor, nn

from x_transformers import (
    AttentionLayers,
    AttentionPool,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    MultiInputTransformerWrapper,
    PrefixDecoder,
    TransformerBlock,
    TransformerWrapper,
    XValTransformerWrapper,
)
from x_transformers.errors import ConfigError

LENGTHS = (4, 1, 6, 3)
TOTAL = sum(LENGTHS)
CONTEXTS = (2, 5, 1, 3)
SMALL = {"dim": 16, "heads": 2, "attn_dim_head": 8}
WINDOW = {"attn_max_attend_past": 2, "attn_max_attend_future": 1}
PACKED = {"rotary_pos_emb": True, "attn_flash_pack_seq": True}
TOWARDS = {**PACKED, "cross_attn_flash_pack_seq": True}


def packing(*lengths: int) -> dict[str, Any]:
    """The boundaries of documents of these lengths."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    return {
        "cu_seqlens_q": boundaries,
        "cu_seqlens_k": boundaries,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def to_context(lengths: tuple[int, ...], contexts: tuple[int, ...]) -> dict[str, Any]:
    """The boundaries of queries, and of the contexts that they attend to."""
    of_keys = packing(*contexts)
    keys = {"cu_seqlens_k": of_keys["cu_seqlens_k"], "max_seqlen_k": of_keys["max_seqlen_k"]}
    return {**packing(*lengths), **keys}


@dataclass(frozen=True, eq=False)
class Packs:
    """A stack or a model that takes packed rows.

    Attributes:
        make: builds it, packing or not.
        context: it attends to one.
        only_context: it has no self-attention.
    """

    name: str
    make: Callable[..., nn.Module]
    context: bool = False
    only_context: bool = False

    def __str__(self) -> str:
        return self.name

    def build(self, packed: bool) -> nn.Module:
        rotary = {"rotary_pos_emb": True}
        keywords = (TOWARDS if self.context else PACKED) if packed else rotary
        torch.default_generator.manual_seed(2)
        return perturb(self.make(**keywords)).eval()


STACKS = (
    Packs("decoder", lambda **kw: Decoder(**SMALL, depth=2, verbose=False, **kw)),
    Packs("encoder", lambda **kw: Encoder(**SMALL, depth=2, verbose=False, **kw)),
    Packs("window", lambda **kw: Encoder(**SMALL, **WINDOW, depth=2, verbose=False, **kw)),
    Packs("prefix decoder", lambda **kw: PrefixDecoder(**SMALL, depth=2, verbose=False, **kw)),
    Packs("attention layers", lambda **kw: AttentionLayers(**SMALL, depth=2, causal=True, verbose=False, **kw)),
    Packs("block", lambda **kw: TransformerBlock(**SMALL, **kw)),
    Packs("cross-attending", lambda **kw: Decoder(**SMALL, depth=2, cross_attend=True, verbose=False, **kw), True),
    Packs("encoder with context", lambda **kw: Encoder(**SMALL, depth=1, cross_attend=True, verbose=False, **kw), True),
    Packs("cross attender", lambda **kw: CrossAttender(**SMALL, depth=2, verbose=False, **kw), True, True),
)


@pytest.mark.parametrize("stack", STACKS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_every_stack(stack: Packs, grad: bool) -> None:
    """Outputs and gradients of a packed row are those of its documents."""
    packed, plain = stack.build(True), stack.build(False)
    plain.load_state_dict(packed.state_dict())
    x = torch.randn(1, TOTAL, 16, requires_grad=grad)
    context = torch.randn(1, sum(CONTEXTS), 16)
    given: dict[str, Any] = {} if stack.only_context else {"flash_pack_seq_kwargs": packing(*LENGTHS)}
    if stack.context:
        given |= {"context": context, "flash_pack_seq_context_kwargs": to_context(LENGTHS, CONTEXTS)}
    together = packed(x, **given)
    parts = []
    for one, memory in zip(x.split(LENGTHS, 1), context.split(CONTEXTS, 1), strict=True):
        parts.append(plain(one, **({"context": memory} if stack.context else {})))
    apart = torch.cat(parts, dim=1)
    close(together, apart)
    if grad:
        weight = torch.randn_like(together)
        (one,), (two,) = (torch.autograd.grad((out * weight).sum(), x) for out in (together, apart))
        close(one, two)


def built(case: Case, stack: str) -> tuple[TransformerWrapper, TransformerWrapper] | ConfigError:
    """A model that packs and one that does not, with the same weights; or the words of the refusal."""
    try:
        packed = case.build(stack, **(TOWARDS if case.keywords.get("cross_attend") else PACKED))
    except ConfigError as error:
        return error
    plain = case.build(stack, rotary_pos_emb=True)
    plain.load_state_dict(packed.state_dict())
    return packed, plain


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder"), ids=name_of)
@torch.no_grad()
def test_every_feature(stack: str, case: Case) -> None:
    """A feature keeps documents apart, or construction refuses it in words that name the packing."""
    found = built(case, stack)
    if isinstance(found, ConfigError):
        mixers = ("packed rows are not built for `m` layers", "is about the positions of self-attention")
        assert any(words in str(found) for words in ("flash_pack_seq", "alternatives of one choice", *mixers))
        return
    packed, plain = found
    ids, width = tokens(1, TOTAL), context_width(packed)
    given: dict[str, Any] = {**other_inputs(packed, ids), "flash_pack_seq_kwargs": packing(*LENGTHS)}
    alone: list[dict[str, Any]] = [{} for _ in LENGTHS]
    if width is not None:
        memories = [contexts(width)[row : row + 1, :length] for row, length in enumerate(CONTEXTS)]
        given |= {"context": torch.cat(memories, dim=1)}
        given |= {"flash_pack_seq_context_kwargs": to_context(LENGTHS, CONTEXTS)}
        alone = [{"context": memory} for memory in memories]
    together = packed(ids, **given)
    for one, two, more in zip(ids.split(LENGTHS, 1), together.split(LENGTHS, 1), alone, strict=True):
        close(two, plain(one, **{**other_inputs(plain, one), **more}))


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[], Any], Callable[[Any], Tensor]]] = {
    "continuous": (
        lambda **kw: ContinuousTransformerWrapper(
            dim_in=3, dim_out=2, max_seq_len=TOTAL, attn_layers=Encoder(**SMALL, depth=1, verbose=False, **kw)
        ),
        lambda: (torch.randn(1, TOTAL, 3),),
        lambda out: out,
    ),
    "xval": (
        lambda **kw: XValTransformerWrapper(
            num_tokens=6,
            numerical_token_id=3,
            max_seq_len=TOTAL,
            attn_layers=Decoder(**SMALL, depth=1, verbose=False, **kw),
        ),
        lambda: (torch.randint(0, 6, (1, TOTAL)), torch.randn(1, TOTAL)),
        lambda out: torch.cat((out[0], out[1].unsqueeze(-1)), dim=-1),
    ),
    "multi_input": (
        lambda **kw: MultiInputTransformerWrapper(
            num_tokens={"a": 8, "b": 5},
            max_seq_len=TOTAL,
            attn_layers=Decoder(**SMALL, depth=1, verbose=False, **kw),
        ),
        lambda: ({"a": torch.randint(0, 8, (1, TOTAL)), "b": torch.randint(0, 5, (1, TOTAL))},),
        lambda out: torch.cat((out["a"], out["b"]), dim=-1),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_model(name: str) -> None:
    make, draw, read = MODELS[name]
    packed, plain = (perturb(make(**keywords)).eval() for keywords in (PACKED, {"rotary_pos_emb": True}))
    plain.load_state_dict(packed.state_dict())
    given = draw()

    def part(value: Any, start: int, stop: int) -> Any:
        if isinstance(value, dict):
            return {name: part(t, start, stop) for name, t in value.items()}
        return value[:, start:stop]

    together, start = read(packed(*given, flash_pack_seq_kwargs=packing(*LENGTHS))), 0
    for length in LENGTHS:
        own = [part(value, start, start + length) for value in given]
        close(together[:, start : start + length], read(plain(*own)))
        start += length


@torch.no_grad()
def test_a_pool_reads_the_documents_of_its_context() -> None:
    """One query for each document, by a packed attention."""
    pool = AttentionPool(16, len(CONTEXTS), heads=2, dim_head=8, attn_kwargs={"flash_pack_seq": True}).eval()
    context = torch.randn(1, sum(CONTEXTS), 16)
    ones = (1,) * len(CONTEXTS)
    together = pool(context, flash_pack_seq_kwargs=to_context(ones, CONTEXTS))
    assert pool.queries is not None
    for row, memory in enumerate(context.split(CONTEXTS, 1)):
        alone = pool(
            memory, queries=pool.queries[row : row + 1], flash_pack_seq_kwargs=to_context((1,), (CONTEXTS[row],))
        )
        close(together[:, row : row + 1], alone)
