"""Cached decoding equals one pass: any cache, any chunks, whole sequences or new tokens, with every argument."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import BASE, CASES, Case, call, cases, close, decode, name_of, one_of_each, static_cache, tokens
from promises import CHUNKS, arguments, decodes
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.cache import KVCache
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.intermediates import LayerIntermediates

DECODERS = pytest.mark.parametrize(("stack", "case"), cases("decoder", "cross", exempt="decoding"), ids=name_of)
ONE_OF_EACH = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="decoding"), ids=name_of)
STEPS = {
    "prefill": (10,),
    "singles": (1,) * 10,
    "threes": (3, 3, 3, 1),
    "prompt_and_singles": (4, 1, 1, 1, 1, 1, 1),
    "prompt_and_speculation": (3, 4, 1, 2),
}


@DECODERS
@torch.no_grad()
def test_dynamic_cache(stack: str, case: Case) -> None:
    model = case.build(stack)
    for whole in (False, True):
        for chunks in ((1,) * 6, (4, 3, 1, 3)):
            decodes(model, static=False, whole=whole, chunks=chunks)


@DECODERS
@torch.no_grad()
def test_static_cache(stack: str, case: Case) -> None:
    model = case.build(stack)
    for chunks in ((1,) * 6, (4, 3, 1, 3)):
        decodes(model, static=True, chunks=chunks)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["dynamic", "static", "given"])
@torch.no_grad()
def test_chunks_of_every_size(kind: str, steps: str) -> None:
    """A cache that is handed in empty serves as well as the one that a first pass makes."""
    model = (CASES[0]).build(rotary_pos_emb=True, attn_max_attend_past=4)
    ids = tokens(2, 10)
    cache = {"dynamic": None, "static": static_cache(model, 2, 10), "given": KVCache()}[kind]
    close(decode(model, ids, STEPS[steps], cache=cache), model(ids))


@ONE_OF_EACH
@torch.no_grad()
def test_the_cache_that_went_in_is_unchanged(stack: str, case: Case) -> None:
    model = case.build(stack)
    ids, other = tokens(2, 8), tokens(2, 8)
    _, record = call(model, ids[:, :5], return_intermediates=True)
    before = snapshot(record.cache)
    steps = [call(model, t[:, 5:], cache=record, input_not_include_cache=True) for t in (ids, other)]
    after = snapshot(record.cache)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name])), name
    close(steps[0], call(model, ids)[:, 5:])
    close(steps[1], call(model, torch.cat((ids[:, :5], other[:, 5:]), dim=1))[:, 5:])


def snapshot(cache: KVCache) -> dict[str, object]:
    """Everything in a cache, copied."""
    held: dict[str, object] = {}
    for number, entry in enumerate(cache.entries):
        for name, stream in (*entry.grown.items(), *entry.states.items()):
            held[f"{number}.{name}"] = stream.clone()
    scalars = {name: value for name, value in vars(cache).items() if isinstance(value, (int, Tensor))}
    return {**held, **copy.deepcopy(scalars)}


@ONE_OF_EACH
@torch.no_grad()
def test_arguments_of_a_pass_go_through_the_cache(stack: str, case: Case) -> None:
    """Masks, positions and memories mean in steps what they mean in one pass."""
    model, n = case.build(stack), 10
    ids = tokens(2, n)
    for way, given in arguments(model, 2, n, rows=2).items():
        if way in ("attn_mask", "attn_bias", "prepended", "sum_embeds"):
            continue  # refused with a cache, or not cut like the others; below
        wanted = call(model, ids, **given)
        kept = given.get("mask", torch.ones(2, n, dtype=torch.bool))
        if "seq_start_pos" in given:
            kept = torch.arange(n) >= given["seq_start_pos"][:, None]
        constant = {name: given.pop(name) for name in ("mems", "seq_start_pos") if name in given}
        for cache in (None, static_cache(model, 2, n + 2)):
            got = decode(model, ids, CHUNKS, cache=cache, per_token=given, **constant)
            close(got[kept], wanted[kept])


def prepended(model: TransformerWrapper, rows: int) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[True, True, True], [False, True, False]])[:rows]
    return torch.randn(rows, 3, model.emb_dim), mask


@ONE_OF_EACH
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_prepended_embeddings_are_part_of_the_cache(stack: str, case: Case, kind: str) -> None:
    model = case.build(stack)
    ids = tokens(2, 8)
    embeds, mask = prepended(model, 2)
    given = {"prepend_embeds": embeds, "prepend_mask": mask}
    wanted = call(model, ids, **given)[:, 3:]
    for again in (given, {}):
        cache = static_cache(model, 2, 8, prepended=3) if kind == "static" else None
        first, state = call(
            model, ids[:, :3], cache=cache, input_not_include_cache=True, return_intermediates=True, **given
        )
        outputs = [first[:, 3:]]
        for start, end in ((3, 6), (6, 7), (7, 8)):
            out, state = call(
                model,
                ids[:, start:end],
                cache=state,
                input_not_include_cache=True,
                return_intermediates=True,
                **again,
            )
            outputs.append(out)
        close(torch.cat(outputs, dim=1), wanted)


@torch.no_grad()
def test_prepended_embeddings_and_whole_sequences() -> None:
    model = BASE.build(rotary_pos_emb=True)
    ids = tokens(2, 6)
    embeds, mask = prepended(model, 2)
    wanted = model(ids, prepend_embeds=embeds, prepend_mask=mask)[:, 3:]
    _, state = model(ids[:, :4], prepend_embeds=embeds, prepend_mask=mask, return_intermediates=True)
    close(model(ids, cache=state), wanted[:, 4:])
    close(model(ids, cache=state, prepend_embeds=embeds), wanted[:, 4:])


@torch.no_grad()
def test_per_token_embeddings_go_through_the_cache() -> None:
    model = BASE.build(rotary_pos_emb=True)
    ids = tokens(2, 6)
    more = torch.randn(2, 6, model.emb_dim)
    wanted = model(ids, sum_embeds=more)
    _, state = model(ids[:, :4], sum_embeds=more[:, :4], return_intermediates=True)
    close(model(ids, sum_embeds=more, cache=state), wanted[:, 4:])
    close(model(ids[:, 4:], sum_embeds=more[:, 4:], cache=state, input_not_include_cache=True), wanted[:, 4:])


FRAMED = [
    case for case in CASES if case.name in ("plain", "memory_kv-1", "memory_tokens-1", "interspersed_memory_tokens-1")
]


@pytest.mark.parametrize("case", FRAMED, ids=str)
@pytest.mark.parametrize("rows", ["a row for each query", "one row"])
@torch.no_grad()
def test_bias_of_the_new_queries(case: Case, rows: str) -> None:
    """With a cache `attn_bias` has rows for the new queries, and a column for each token so far."""
    model = case.build()
    ids, bias = tokens(2, 8), torch.randn(4, 8 if rows != "one row" else 1, 8)
    embeds, _ = prepended(model, 2)
    _, state = model(ids[:, :4], attn_bias=bias[:, :4, :4], prepend_embeds=embeds, return_intermediates=True)
    got = model(ids[:, 4:], attn_bias=bias[:, -4:], cache=state, input_not_include_cache=True)
    close(got, model(ids, attn_bias=bias, prepend_embeds=embeds)[:, 7:])


@torch.no_grad()
def test_bias_over_the_places_of_a_static_cache() -> None:
    model = BASE.build(num_memory_tokens=2)
    ids, bias = tokens(2, 6), torch.randn(4, 6, 8)
    _, state = model(
        ids[:, :4],
        attn_bias=bias[:, :4, :4],
        cache=model.static_cache(2, 8),
        input_not_include_cache=True,
        return_intermediates=True,
    )
    step = {"cache": state, "input_not_include_cache": True}
    close(model(ids[:, 4:], attn_bias=bias[:, 4:], **step), model(ids, attn_bias=bias[..., :6])[:, 4:])
    with pytest.raises(ShapeError, match="must cover 2 queries and 8 keys"):
        model(ids[:, 4:], attn_bias=bias[:, 4:, :6], **step)


@pytest.mark.parametrize("name", ["mask", "self_attn_kv_mask"])
@pytest.mark.parametrize("options", [{}, {"num_memory_tokens": 2}], ids=["plain", "memory"])
@torch.no_grad()
def test_masks_of_a_static_cache(name: str, options: dict[str, int]) -> None:
    """They may end with the prompt, or cover every place; never less than the prompt, nor more than there are."""
    model = BASE.build(**options)
    ids, mask = tokens(2, 6), torch.tensor([[True] * 4, [False, True, True, True]])
    whole = F.pad(mask, (0, 2), value=True)
    wanted = model(ids, self_attn_kv_mask=whole)

    def run(first: Tensor, then: Tensor) -> Tensor:
        step: dict[str, Any] = {"input_not_include_cache": True, "return_intermediates": True}
        out, state = model(ids[:, :4], cache=model.static_cache(2, 6), **{name: first}, **step)
        return torch.cat((out, model(ids[:, 4:], cache=state, **{name: then}, **step)[0]), dim=1)

    for first, then in ((mask, mask), (mask, whole), (whole, whole)):
        close(run(first, then)[:, 1:], wanted[:, 1:])
    for first, then, width in ((mask[:, :3], whole, 3), (mask, F.pad(whole, (0, 1)), 7), (whole[:, None], whole, 1)):
        with pytest.raises(ShapeError, match=rf"`{name}` has shape \(2, {width}"):
            run(first, then)
    with pytest.raises(ShapeError, match=rf"`{name}` has shape \(3, 4\)"):
        run(mask[[0, 1, 1]], whole)


@torch.no_grad()
def test_context_is_read_once() -> None:
    model = BASE.build("cross")
    ids, mask = tokens(2, 6), torch.tensor([[True] * 5, [True, True, False, False, False]])
    wanted = call(model, ids, context_mask=mask)
    _, state = call(model, ids[:, :4], context_mask=mask, return_intermediates=True)
    again = {"cache": state, "input_not_include_cache": True, "context_mask": mask}
    close(call(model, ids[:, 4:], **again), wanted[:, 4:])
    close(call(model, ids[:, 4:], context=torch.zeros(2, 5, 16), **again), wanted[:, 4:])
    close(call(model, ids[:, 4:], context=None, **again), wanted[:, 4:])


def rows_of(record: LayerIntermediates, change: str, argument: object) -> LayerIntermediates:
    twin = copy.copy(record)
    getattr(twin.cache, change)(argument)
    return twin


@ONE_OF_EACH
@torch.no_grad()
def test_rows_can_be_reordered_and_repeated(stack: str, case: Case) -> None:
    """As beam search does: row r continues from another row's past."""
    model = case.build(stack)
    past, new = tokens(3, 5), tokens(4, 2)
    _, record = call(model, past, return_intermediates=True)

    def check(change: str, argument: object, order: Sequence[int]) -> None:
        twin = rows_of(record, change, argument)
        got = call(model, new[: len(order)], list(order), cache=twin, input_not_include_cache=True)
        close(got, call(model, torch.cat((past[list(order)], new[: len(order)]), dim=1), list(order))[:, 5:])

    check("reorder", torch.tensor([2, 2, 0, 1]), [2, 2, 0, 1])
    one = rows_of(record, "reorder", torch.tensor([1, 2]))
    one.cache.repeat(2)
    order = [1, 1, 2, 2]
    got = call(model, new, order, cache=one, input_not_include_cache=True)
    close(got, call(model, torch.cat((past[order], new), dim=1), order)[:, 5:])


@pytest.mark.parametrize("memory_tokens", [None, 2])
@torch.no_grad()
def test_a_window_needs_no_more_than_itself(memory_tokens: int | None) -> None:
    """Dropping slots that lie outside of every window changes nothing, and positions go on."""
    model = BASE.build(
        depth=1,
        rotary_pos_emb=True,
        attn_max_attend_past=3,
        num_memory_tokens=memory_tokens,
    )
    ids = tokens(2, 12)
    wanted, state = model(ids), None
    for end in range(1, 13):
        out, state = model(ids[:, end - 1 : end], cache=state, input_not_include_cache=True, return_intermediates=True)
        close(out[:, -1], wanted[:, end - 1])
        state.cache.crop(3)
        assert state.cache.entries[0].grown["k"].shape[-2] <= 3 + (memory_tokens or 0)


@torch.no_grad()
def test_a_static_cache_starts_anew() -> None:
    model = BASE.build()
    cache = model.static_cache(2, 8)
    for _ in range(2):
        ids = tokens(2, 6)
        close(decode(model, ids, (4, 2), cache=cache), model(ids))
        cache = cache.reset()


@torch.no_grad()
def test_what_stands_in_an_unused_place_is_not_read() -> None:
    model = BASE.build(alibi_pos_bias=True)
    ids, cache = tokens(2, 6), model.static_cache(2, 16)
    for entry in cache.entries:
        for stream in entry.grown.values():
            stream.fill_(1e4)
    close(decode(model, ids, (4, 1, 1), cache=cache), model(ids))


@torch.no_grad()
def test_one_layer_of_each_kind_alone() -> None:
    """The stack without a model around it, in both calling styles."""
    stack = Decoder(dim=16, depth=2, heads=4, attn_dim_head=8, rel_pos_bias=True, verbose=False).eval()
    x = torch.randn(2, 7, 16)
    wanted = stack(x)
    first, state = stack(x[:, :4], return_hiddens=True)
    close(torch.cat((first, stack(x, cache=state)), dim=1), wanted)
    close(stack(x[:, 4:], cache=state, input_not_include_cache=True), wanted[:, 4:])
    close(stack(x, cache=state, cache_age=3), wanted[:, 4:])


@torch.no_grad()
def test_generation_of_one_token_at_a_time_from_a_model_that_expects_new_tokens() -> None:
    model = BASE.build(input_not_include_cache=True)
    ids = tokens(2, 5)
    _, state = model(ids[:, :3], return_intermediates=True)
    close(model(ids[:, 3:], cache=state), model(ids)[:, 3:])


def test_refusals() -> None:
    model = BASE.build()
    ids = tokens(2, 6)
    _, state = model(ids, return_intermediates=True)
    with pytest.raises(InputError, match=r"0 tokens are to run.*a cache of 6"):
        model(ids[:, :0], cache=state)
    with pytest.raises(InputError, match="3 tokens are to run"):
        model(tokens(2, 8), cache=state, cache_age=3)
    with pytest.raises(InputError, match="`attn_mask` with a cache"):
        model(tokens(2, 7), cache=state, attn_mask=torch.ones(1, 7, dtype=torch.bool))
    with pytest.raises(InputError, match="only new tokens"):
        model(ids, cache=model.static_cache(2, 8))
    with pytest.raises(InputError, match="do not fit into a static cache of 4"):
        model(ids, cache=model.static_cache(2, 4), input_not_include_cache=True)
    with pytest.raises(InputError, match="cannot drop slots"):
        model.static_cache(2, 4).crop(2)
    with pytest.raises(InputError, match="only a causal"):
        BASE.build("encoder")(ids, cache=state)
    with pytest.raises(InputError, match="only a causal"):
        BASE.build("encoder").static_cache(1, 4)
