"""Export with the defaults of `torch.export`: any batch and any length, for every model; and `torch.jit.trace`.

Few models of a decoder have all features between them, and some of an encoder and of cross-attention many. With
`EVERY_CASE=1` in the environment every feature is exported by itself, which takes minutes.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, Case, close, one_of_each, other_inputs, tokens
from combined import build, groups
from torch import Tensor, nn
from torch.export import Dim, export

from x_transformers import (
    Attention,
    AttentionPool,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    FeedForward,
    MultiInputTransformerWrapper,
    NeoMLP,
    PrefixDecoder,
    TransformerWrapper,
    ViTransformerWrapper,
    XValTransformerWrapper,
)

PARTS = 4
SIZES = ((3, 11), (1, 1), (2, 5))
ANY = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
"""Unlike `Dim.AUTO`, it fails where a size becomes a number."""

OPTIONS: dict[str, Any] = {"dim": 32, "depth": 1, "heads": 2, "attn_dim_head": 16, "verbose": False}


def found(stack: str) -> list[Case]:
    if "EVERY_CASE" in os.environ:
        return [case for _, case in one_of_each(stack, exempt="compile")]
    return list(groups(stack) if stack == "decoder" else groups(stack)[:2])


def inputs(model: TransformerWrapper, batch: int, n: int) -> tuple[Tensor, dict[str, Any]]:
    """Return tokens, and what else the model reads; a context has another length than its tokens."""
    ids = tokens(batch, n)
    others = other_inputs(model, ids)
    if "context" in others:
        others["context"] = torch.randn(batch, n + 4, others["context"].shape[-1])
    return ids, others


def shapes(others: dict[str, Any]) -> dict[str, Any]:
    """Return the dynamic sizes of arguments: the batch, and of all but vectors of a row also the length."""
    return {
        name: shapes(t) if isinstance(t, dict) else {0: Dim.DYNAMIC} if name == "condition" else ANY
        for name, t in others.items()
    }


@pytest.mark.parametrize(
    ("stack", "part"), [*(("decoder", part) for part in range(PARTS)), ("encoder", 0), ("cross", 0)]
)
@torch.no_grad()
def test_any_batch_and_length(stack: str, part: int) -> None:
    for case in found(stack)[part :: PARTS if stack == "decoder" else 1]:
        model = build(case, stack)
        ids, others = inputs(model, 2, 8)
        program = export(model, (ids,), others, dynamic_shapes={"x": ANY, **shapes(others)}).module()
        for size in SIZES:
            ids, others = inputs(model, *size)
            close(program(ids, **others), model(ids, **others))


def masked(batch: int, n: int) -> Tensor:
    return torch.arange(n) < torch.arange(n, n + batch)[:, None] - batch + 1


def parts() -> Iterator[tuple[str, nn.Module, Callable[[int, int], dict[str, Any]]]]:
    """Yield what the documentation builds, with the arguments of a pass for a batch and a length."""

    def series(batch: int, n: int) -> dict[str, Any]:
        return {"x": torch.randn(batch, n, 32)}

    def ids(batch: int, n: int) -> dict[str, Any]:
        return {"x": torch.randint(0, 20, (batch, n))}

    def pair(batch: int, n: int) -> dict[str, Any]:
        return {**series(batch, n), "context": torch.randn(batch, n + 4, 32)}

    def wrapped(stack: type, **options: Any) -> TransformerWrapper:
        return TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=stack(**OPTIONS, **options))

    yield "decoder stack", Decoder(**OPTIONS, rotary_pos_emb=True), series
    yield "encoder stack", Encoder(**OPTIONS), series
    yield "cross attender", CrossAttender(**OPTIONS), pair
    yield "prefix decoder", PrefixDecoder(**OPTIONS), lambda b, n: {**series(b, n), "prefix_attn_len": 1}
    yield "attention", Attention(32, heads=2, dim_head=16), series
    yield "causal attention", Attention(32, heads=2, dim_head=16, causal=True), series
    yield "attention to a context", Attention(32, heads=2, dim_head=16), pair
    yield "feedforward", FeedForward(32), series
    yield "attention pool", AttentionPool(32, heads=2, dim_head=16), lambda b, n: {"context": torch.randn(b, n, 32)}
    yield "decoder", wrapped(Decoder), ids
    yield "padded encoder", wrapped(Encoder), lambda b, n: {**ids(b, n), "mask": masked(b, n)}
    yield (
        "left padding",
        wrapped(Decoder, rotary_pos_emb=True),
        lambda b, n: {**ids(b, n), "seq_start_pos": torch.arange(b) % n},
    )
    yield (
        "embeddings in front",
        wrapped(Decoder),
        lambda b, n: {**ids(b, n), "prepend_embeds": torch.randn(b, n + 2, 32)},
    )
    yield (
        "memories",
        wrapped(Decoder, rel_pos_bias=True),
        lambda b, n: {**ids(b, n), "mems": [torch.randn(b, n + 3, 32)]},
    )
    yield "pictures", ViTransformerWrapper(image_size=32, patch_size=4, attn_layers=Encoder(**OPTIONS)), pictures
    yield (
        "series of vectors",
        ContinuousTransformerWrapper(dim_in=32, dim_out=5, max_seq_len=32, attn_layers=Decoder(**OPTIONS)),
        lambda b, n: {**series(b, n), "mask": masked(b, n)},
    )
    yield (
        "several streams",
        MultiInputTransformerWrapper(num_tokens={"a": 20, "b": 9}, max_seq_len=32, attn_layers=Decoder(**OPTIONS)),
        lambda b, n: {"x": {"a": torch.randint(0, 20, (b, n)), "b": torch.randint(0, 9, (b, n))}},
    )
    yield (
        "numbers in text",
        XValTransformerWrapper(num_tokens=20, numerical_token_id=3, max_seq_len=32, attn_layers=Decoder(**OPTIONS)),
        lambda b, n: {**ids(b, n), "x_num": torch.randn(b, n)},
    )
    yield (
        "vectors to vectors",
        NeoMLP(dim_in=4, dim_hidden=3, dim_out=2, dim_model=16, depth=1),
        lambda b, n: {"x": torch.randn(b, 4)},
    )


def pictures(batch: int, n: int) -> dict[str, Any]:
    return {"img": torch.randn(batch, 3, 32, 32)}


BATCH_ONLY = {"img", "seq_start_pos"}


def sizes(given: dict[str, Any], name: str) -> Any:
    t = given[name]
    if isinstance(t, dict):
        return dict.fromkeys(t, ANY)
    if isinstance(t, list):
        return [ANY for _ in t]
    if not isinstance(t, Tensor):
        return None
    return {0: Dim.DYNAMIC} if name in BATCH_ONLY or t.shape[-1] == 4 else ANY


@pytest.mark.parametrize(("model", "draw"), [pytest.param(*rest, id=name) for name, *rest in parts()])
@torch.no_grad()
def test_every_model_and_part(model: nn.Module, draw: Callable[[int, int], dict[str, Any]]) -> None:
    model.eval()
    given = draw(2, 8)
    program = export(model, (), given, dynamic_shapes={each: sizes(given, each) for each in given}).module()
    for size in SIZES:
        given = draw(*size)
        got, wanted = program(**given), model(**given)
        for one, two in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(wanted), strict=True):
            close(one, two)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.*:DeprecationWarning")
@torch.no_grad()
def test_tracing() -> None:
    """The traced function serves other batches and lengths, too: sizes stay tensors."""
    for stack, options in (
        ("decoder", {"attn_kv_heads": 2, "rotary_pos_emb": True}),
        ("encoder", {"alibi_pos_bias": True}),
    ):
        model = BASE.build(stack, depth=1, **options)
        traced = torch.jit.trace(model, tokens(2, 5), check_trace=False)
        for size in ((2, 5), (3, 9), (1, 1)):
            ids = tokens(*size)
            close(traced(ids), model(ids))
