"""Attention with a window keeps no more than the window in a cache, and gives what one pass gives."""

from typing import Any

import pytest
import torch
from catalog import BASE, Case, call, close, decode, name_of, one_of_each, static_cache, tokens
from torch import Tensor

from x_transformers import AutoregressiveWrapper, TransformerWrapper
from x_transformers.cache import KVCache
from x_transformers.errors import InputError

N, WINDOW = 20, 3


def windowed(stack: str, case: Case, **more: Any) -> TransformerWrapper:
    return case.build(stack, attn_max_attend_past=WINDOW, **more)


def held(cache: KVCache) -> list[int]:
    """Slots of the keys of each self-attention."""
    return [entry.grown["k"].shape[-2] for entry in cache.entries if "k" in entry.grown]


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "cross", exempt="decoding"), ids=name_of)
@torch.no_grad()
def test_every_feature(stack: str, case: Case) -> None:
    """Longer than the window, in steps and chunks that are shorter and longer than it."""
    model = windowed(stack, case)
    ids = tokens(2, N)
    wanted = call(model, ids)
    close(decode(model, ids, (9, 1, 1, 6, 2, 1)), wanted)
    close(decode(model, ids, (2, 1, 11, 1, 1, 1, 3), cache=static_cache(model, 2, N + 3)), wanted)


RAGGED = [
    (stack, case)
    for stack, case in one_of_each("decoder", exempt="padding")
    if case.exemption("decoding") is None and "num_memory_tokens" not in case.keywords
]
"""What decodes, and has no memory tokens of its own."""


@pytest.mark.parametrize(("stack", "case"), RAGGED, ids=name_of)
@torch.no_grad()
def test_ragged_rows(stack: str, case: Case) -> None:
    """With memory tokens in front, which rows that start late see for longer than their columns say."""
    model = windowed(stack, case, num_memory_tokens=2)
    ids, lengths = tokens(3, N), torch.tensor([N, N - 6, N - 11])
    start = N - lengths
    for cache in (None, static_cache(model, 3, N + 2)):
        together = decode(model, ids, (12, 1, 1, 6), cache=cache, seq_start_pos=start)
        for row, length in enumerate(lengths.tolist()):
            alone = call(model, ids[row : row + 1, N - length :], [row])
            close(together[row : row + 1, N - length :], alone)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_what_is_kept(static: bool) -> None:
    """The window and what is new, in each layer of its own; the layer without a window keeps everything."""
    model = BASE.build(depth=3, attn_max_attend_past=(3, None, 7), rotary_pos_emb=True)
    ids = tokens(2, N)
    cache = static_cache(model, 2, 64) if static else None
    out, state = call(model, ids[:, :13], cache=cache, input_not_include_cache=True, return_intermediates=True)
    outputs = [out]
    for at in range(13, N):
        out, state = call(
            model, ids[:, at : at + 1], cache=state, input_not_include_cache=True, return_intermediates=True
        )
        outputs.append(out)
        assert held(state.cache) == ([8, 64, 8] if static else [4, at + 1, 8])
    close(torch.cat(outputs, dim=1), model(ids))


@torch.no_grad()
def test_a_long_prompt_is_not_kept() -> None:
    model = TransformerWrapper(
        num_tokens=24, max_seq_len=0, use_abs_pos_emb=False, attn_layers=BASE.build(attn_max_attend_past=5).attn_layers
    ).eval()
    _, state = model(tokens(1, 300), return_intermediates=True)
    assert held(state.cache) == [5 + 64] * 2, "the slots of a window, and those that can be taken back"
    assert state.cache.entries[0].grown["k"].untyped_storage().nbytes() == 4 * 8 * 69 * 4


@pytest.mark.parametrize("name", ["attn_use_cope", "attn_selective", "residual_attn", "attn_data_dependent_alibi"])
@torch.no_grad()
def test_what_needs_the_whole_past_keeps_it(name: str) -> None:
    more: dict[str, Any] = {name: True}
    if name == "attn_data_dependent_alibi":
        more["attn_data_dependent_alibi_per_row"] = True
    model = BASE.build(attn_max_attend_past=WINDOW, **more)
    _, state = model(tokens(2, 10), return_intermediates=True)
    _, state = model(tokens(2, 11), cache=state, return_intermediates=True)
    assert held(state.cache) == [11, 11]
    assert held(static_cache(model, 2, 30)) == [30, 30]


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_beside_everything_that_stands_in_front(static: bool) -> None:
    """Prepended embeddings of which some are hidden, memory tokens, learned keys, and rows that start late."""
    model = BASE.build(attn_max_attend_past=4, num_memory_tokens=2, attn_num_mem_kv=2, alibi_pos_bias=True)
    ids, start = tokens(2, N), torch.tensor([0, 9])
    embeds, mask = torch.randn(2, 3, 16), torch.tensor([[True, True, True], [False, True, True]])
    given: dict[str, Any] = {"prepend_embeds": embeds, "prepend_mask": mask, "seq_start_pos": start}
    wanted = model(ids, **given)[:, 3:]
    state = static_cache(model, 2, N, prepended=3) if static else KVCache()
    outputs, end = [], 0
    for count in (11, 1, 1, 4, 3):
        out, record = model(
            ids[:, end : end + count], cache=state, input_not_include_cache=True, return_intermediates=True, **given
        )
        outputs.append(out[:, out.shape[1] - count :])
        state, end = record.cache, end + count
    real = torch.arange(N) >= start[:, None]
    close(torch.cat(outputs, dim=1)[real], wanted[real])


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_recurrent_memory_and_a_bias_of_the_caller(static: bool) -> None:
    model = BASE.build(attn_max_attend_past=4)
    ids, bias, mems = tokens(2, 20), torch.randn(4, 20, 24), [torch.randn(2, 3, 16)] * 2
    wanted = model(ids, attn_bias=bias[..., :20], mems=mems)
    state, outputs = (static_cache(model, 2, 24) if static else KVCache()), []
    for at in range(20):
        given = bias[:, at : at + 1, : 24 if static and at else at + 1]
        out, record = model(
            ids[:, at : at + 1],
            cache=state,
            input_not_include_cache=True,
            return_intermediates=True,
            attn_bias=given,
            mems=mems,
        )
        outputs.append(out)
        state = record.cache
    close(torch.cat(outputs, dim=1), wanted)


@pytest.mark.parametrize("most", [12, 2])
@torch.no_grad()
def test_a_sliding_model_with_windows(most: int) -> None:
    """Dropping slots of the whole cache changes nothing for windows that are shorter."""
    model = BASE.build(depth=3, attn_max_attend_past=(3, None, 7), alibi_pos_bias=True)
    ids = tokens(2, N)
    _, state = model(ids[:, :19], return_intermediates=True)
    state.cache.crop(most)
    assert held(state.cache) == [min(most, 19)] * 3
    out, state = model(ids[:, 19:], cache=state, input_not_include_cache=True, return_intermediates=True)
    assert held(state.cache) == [min(3, most) + 1, most + 1, min(7, most) + 1]
    assert out.isfinite().all()


@torch.no_grad()
def test_a_static_cache_of_the_stack_refuses_what_it_was_not_made_for() -> None:
    model = BASE.build(attn_max_attend_past=3, num_memory_tokens=2)
    bare = model.attn_layers.static_cache(2, 40)
    with pytest.raises(InputError, match=r"after 0 leading slots.*model.static_cache"):
        model(tokens(2, 4), cache=bare, input_not_include_cache=True)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", [{}, {"attn_max_attend_past": 4}, {"attn_max_attend_past": (3, None)}])
@torch.no_grad()
def test_taking_back(static: bool, kind: dict[str, Any]) -> None:
    """A cache goes on from where it was before the tokens that were taken back."""
    model = BASE.build(rotary_pos_emb=True, **kind)
    ids, other = tokens(2, N), tokens(2, 5)
    state = static_cache(model, 2, 64, step=5) if static else None
    step: dict[str, Any] = {"input_not_include_cache": True, "return_intermediates": True}
    outputs, end = [], 0
    for count in (8, 1, 5, 3, 2, 1):
        out, record = call(model, ids[:, end : end + count], cache=state, **step)
        outputs.append(out)
        end += count
        _, wrong = call(model, other, cache=record.cache, **step)
        state = wrong.cache
        state.rollback(3)
        state.rollback(2)
    close(torch.cat(outputs, dim=1), call(model, ids))


@torch.no_grad()
def test_what_cannot_be_taken_back() -> None:
    model = BASE.build(attn_max_attend_past=3)
    _, state = model(tokens(2, 30), return_intermediates=True)
    _, state = model(tokens(2, 1), cache=state, input_not_include_cache=True, return_intermediates=True)
    with pytest.raises(InputError, match="a window has dropped"):
        state.cache.rollback(2)
    _, static = model(
        tokens(2, 3), cache=static_cache(model, 2, 40), input_not_include_cache=True, return_intermediates=True
    )
    with pytest.raises(InputError, match="a window has dropped"):
        static.cache.rollback(static.cache.rings[0].room - 2)
    options: tuple[dict[str, Any], ...] = ({"shift_tokens": 1}, {"attn_selective": True})
    for option in options:
        model = BASE.build(**option)
        _, state = model(tokens(2, 5), return_intermediates=True)
        _, state = model(tokens(2, 2), cache=state, input_not_include_cache=True, return_intermediates=True)
        with pytest.raises(InputError, match="cannot be undone"):
            state.cache.rollback(1)


@torch.no_grad()
def test_a_copy_of_a_cache_has_nothing_in_common() -> None:
    options: tuple[dict[str, Any], ...] = (
        {},
        {"attn_max_attend_past": 3},
        {"shift_tokens": 1},
        {"attn_selective": True},
    )
    for option in options:
        model = BASE.build(**option)
        ids = tokens(3, N)
        prefix = ids[:1, :12].expand(3, -1)
        for cache in (None, static_cache(model, 1, 40)):
            step: dict[str, Any] = {"input_not_include_cache": True, "return_intermediates": True}
            _, state = call(model, prefix[:1], cache=cache, **step)
            for _ in range(2):
                _, own = call(model, ids[:, 12:], cache=state.cache.copied(3), **step)
                out, _ = call(model, ids[:, 12:], cache=state.cache.copied(3), **step)
                close(out, call(model, torch.cat((prefix, ids[:, 12:]), dim=1))[:, 12:])
                assert own.cache is not None


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_far_beyond_the_window(cache: str) -> None:
    model = BASE.build(attn_max_attend_past=3, num_memory_tokens=2, rotary_pos_emb=True)
    wrapper = AutoregressiveWrapper(model)
    prompts = [tokens(1, 9)[0], tokens(1, 2)[0]]
    got = wrapper.generate(prompts, 20, temperature=0.0, cache=cache)
    assert torch.equal(got, wrapper.generate(prompts, 20, temperature=0.0, cache_kv=False))


@pytest.mark.parametrize("option", ["attn_max_attend_past", "attn_selective"])
@torch.no_grad()
def test_rings_compile_to_two_graphs(option: str) -> None:
    torch.compiler.reset()
    on: dict[str, Any] = {option: 3 if option == "attn_max_attend_past" else True}
    model = BASE.build(depth=1, alibi_pos_bias=True, **on)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids, start = tokens(2, N), torch.tensor([0, 2])
    step: dict[str, Any] = {"input_not_include_cache": True, "return_intermediates": True, "seq_start_pos": start}
    out, state = compiled(ids[:, :9], cache=static_cache(model, 2, 64), **step)
    outputs = [out]
    for at in range(9, N):
        out, state = compiled(ids[:, at : at + 1], cache=state, **step)
        outputs.append(out)
    real = torch.arange(N) >= start[:, None]
    close(torch.cat(outputs, dim=1)[real], model(ids, seq_start_pos=start)[real])
    assert len(graphs) == 2
    torch.compiler.reset()


def test_compiled_generation_goes_round() -> None:
    torch.compiler.reset()
    wrapper = AutoregressiveWrapper(BASE.build(depth=1, attn_max_attend_past=3, rotary_pos_emb=True))
    prompts = [tokens(1, 9)[0], tokens(1, 2)[0]]
    got = wrapper.generate(prompts, 20, temperature=0.0, compile={"backend": "eager"})
    assert torch.equal(got, wrapper.generate(prompts, 20, temperature=0.0))
    torch.compiler.reset()


def test_the_cost_of_masks_is_saved() -> None:
    """A single token that sees all that its window left needs no mask, so that the fastest kernel may run."""
    model = BASE.build(attn_max_attend_past=3)
    seen: list[Tensor | None] = []
    core = model.attn_layers.branches("a")[0].attention.attend.backends
    attend = core.fused[0].attend

    def spy(request: Any) -> Any:
        seen.append(request.visible.mask(request.memo))
        return attend(request)

    core.fused[0].attend = spy
    with torch.no_grad():
        decode(model, tokens(2, 8), (5, 1, 1, 1))
        assert seen[0] is not None, "the window hides some of the prompt"
        assert seen[1:] == [None] * 3
        decode(model, tokens(2, 8), (5, 1, 1, 1), seq_start_pos=torch.tensor([0, 2]))
    assert len(seen) == 8
    assert all(mask is not None for mask in seen[4:])
