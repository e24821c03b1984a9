"""Positions: a caller's `pos` changes what encodings read, never who sees whom."""

import pytest
import torch
from catalog import BASE, CASES, Case, call, close, decode, name_of, one_of_each, static_cache, tokens
from promises import CHUNKS, LENGTH, keeps_the_past

EVERY = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "encoder", exempt="positions"), ids=name_of)
POSITIONAL = ("plain", "rotary-1", "rotary-4", "alibi-1", "t5_bias-1", "dynamic_bias-1", "absolute_positions-2")
READS = pytest.mark.parametrize("case", [c for c in CASES if c.name in POSITIONAL], ids=name_of)


@EVERY
@torch.no_grad()
def test_default_positions_change_nothing(stack: str, case: Case) -> None:
    model = case.build(stack)
    ids, pos = tokens(2, LENGTH), torch.arange(LENGTH)
    wanted = call(model, ids)
    for given in (pos, pos.int(), pos.expand(2, -1)):
        close(call(model, ids, pos=given), wanted)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="positions"), ids=name_of)
@torch.no_grad()
def test_packed_positions_do_not_open_the_future(stack: str, case: Case) -> None:
    model = case.build(stack)
    keeps_the_past(model, pos=torch.arange(LENGTH) % 3)
    keeps_the_past(model, pos=torch.arange(LENGTH).flip(0))


@READS
@torch.no_grad()
def test_positions_are_read(case: Case) -> None:
    model = case.build()
    ids, pos = tokens(2, LENGTH), torch.arange(LENGTH)
    assert not torch.allclose(call(model, ids, pos=2 * pos), call(model, ids), atol=1e-3)


@READS
@torch.no_grad()
def test_rows_have_their_own_positions(case: Case) -> None:
    model = case.build()
    ids, pos = tokens(3, LENGTH), torch.randint(0, 30, (3, LENGTH))
    together = call(model, ids, pos=pos)
    for row in range(3):
        close(together[row : row + 1], call(model, ids[row : row + 1], pos=pos[row]))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in POSITIONAL[1:-1]], ids=name_of)
@torch.no_grad()
def test_only_differences_matter(case: Case) -> None:
    """Relative encodings do not notice where a sequence begins."""
    model = case.build(use_abs_pos_emb=False)
    ids, pos = tokens(2, LENGTH), torch.randperm(LENGTH)
    close(call(model, ids, pos=pos + 11), call(model, ids, pos=pos))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in (*POSITIONAL, "memory_tokens-1")], ids=name_of)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_positions_of_new_tokens_or_of_all(case: Case, kind: str) -> None:
    """With a cache, `pos` covers the new tokens or all tokens so far; without it, positions continue as slots do."""
    model = case.build()
    ids, pos = tokens(2, LENGTH), torch.randint(0, 20, (2, LENGTH))
    wanted = call(model, ids, pos=pos)

    def cache() -> object:
        return static_cache(model, 2, LENGTH) if kind == "static" else None

    close(decode(model, ids, CHUNKS, cache=cache(), per_token={"pos": pos}), wanted)
    outputs, end, state = [], 0, cache()
    for chunk in CHUNKS:
        start, end = end, end + chunk
        out, state = call(
            model,
            ids[:, start:end],
            cache=state,
            pos=pos[:, start:end],
            input_not_include_cache=True,
            return_intermediates=True,
        )
        outputs.append(out)
    close(torch.cat(outputs, dim=1), wanted)

    half = torch.cat((pos[:, :4], torch.arange(4, LENGTH).expand(2, -1)), dim=1)
    _, state = call(
        model, ids[:, :4], cache=cache(), pos=pos[:, :4], input_not_include_cache=True, return_intermediates=True
    )
    rest = call(model, ids[:, 4:], cache=state, input_not_include_cache=True)
    close(rest, call(model, ids, pos=half)[:, 4:])


@torch.no_grad()
def test_floating_positions_are_embeddings() -> None:
    """They replace the table, and rotation does not read them."""
    ids = tokens(2, LENGTH)
    model = BASE.build(rotary_pos_emb=True)
    embeds = torch.randn(LENGTH, 16)
    close(model(ids, pos=embeds), model(ids, sum_embeds=embeds.expand(2, -1, -1)))
    model = BASE.build()
    table = model.pos_emb.emb.weight[:LENGTH] * model.pos_emb.scale
    close(model(ids, pos=table), model(ids))


@torch.no_grad()
def test_a_window_reads_slots() -> None:
    model = BASE.build(attn_max_attend_past=2, use_abs_pos_emb=False)
    ids = tokens(2, LENGTH)
    close(model(ids, pos=torch.arange(LENGTH) * 5), model(ids))
