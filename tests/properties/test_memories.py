"""Recurrent memory: two segments joined through memories are one pass, where positions are relative."""

import pytest
import torch
from catalog import BASE, Case, call, close, decode, name_of, one_of_each, static_cache, tokens
from promises import another

from x_transformers import TransformerWrapper

SEGMENT, MEMORY = 5, 16
DECODERS = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "cross", exempt="memories"), ids=name_of)


def recurrent(case: Case, stack: str) -> TransformerWrapper:
    return case.build(stack, use_abs_pos_emb=False, max_mem_len=MEMORY, shift_mem_down=0)


@DECODERS
@torch.no_grad()
def test_segments_equal_one_pass(stack: str, case: Case) -> None:
    model = recurrent(case, stack)
    ids = tokens(2, 3 * SEGMENT)
    wanted, mems, outputs = call(model, ids), None, []
    for segment in ids.split(SEGMENT, dim=1):
        out, mems = call(model, segment, mems=mems, return_mems=True)
        outputs.append(out)
    close(torch.cat(outputs, dim=1), wanted)
    # a memory for each self-attention, then running states if there are any; three views of the stream add an axis
    attentions = sum(model.attn_layers.layer_types[index] == "a" for index in model.attn_layers.sequence.order)
    assert all(mem.shape[-3:] == (2, 3 * SEGMENT, 16) for mem in mems[:attentions])


@DECODERS
@torch.no_grad()
def test_masked_memory_equals_a_masked_past(stack: str, case: Case) -> None:
    """Tokens that `mem_masks` hides are hidden as they would be in one pass, and do not matter."""
    model = recurrent(case, stack)
    ids, shown = tokens(2, 2 * SEGMENT), torch.rand(2, SEGMENT) > 0.4
    shown[:, 0] = True
    first, second = ids.split(SEGMENT, dim=1)
    everything = torch.cat((shown, torch.ones(2, SEGMENT, dtype=torch.bool)), dim=1)
    wanted = call(model, ids, mask=everything)[:, SEGMENT:]
    outputs = []
    for past in (first, torch.where(shown, first, another(first))):
        _, mems = call(model, past, mask=shown, return_mems=True)
        outputs.append(call(model, second, mems=mems, mem_masks=[shown] * len(mems)))
    close(outputs[0], wanted)
    close(outputs[1], wanted)


@DECODERS
@torch.no_grad()
def test_decoding_after_a_memory(stack: str, case: Case) -> None:
    model = recurrent(case, stack)
    first, second = tokens(2, SEGMENT), tokens(2, SEGMENT)
    _, mems = call(model, first, return_mems=True)
    wanted = call(model, second, mems=mems)
    for cache in (None, static_cache(model, 2, SEGMENT + 1)):
        close(decode(model, second, (2, 1, 2), cache=cache, mems=mems), wanted)


@torch.no_grad()
def test_memory_is_cut_to_its_length_and_detached() -> None:
    model = BASE.build(max_mem_len=3, rotary_pos_emb=True)
    ids = tokens(1, 4)
    with torch.enable_grad():
        _, one = model(ids, return_mems=True)
        assert not one[0].requires_grad
        _, kept = model(ids, return_mems=True, detach_mems=False)
        assert kept[0].requires_grad
    _, two = model(tokens(1, 2), mems=one, return_mems=True)
    assert one[0].shape == two[0].shape == (1, 3, 16)
    close(two[0][:, :1], one[0][:, 2:])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("shift", [1, 2])
@torch.no_grad()
def test_memory_can_be_shifted_down(depth: int, shift: int) -> None:
    """Layer i reads the memory of layer i + shift; the last ones read those of the first."""
    keywords = {"max_mem_len": MEMORY, "use_abs_pos_emb": False, "rel_pos_bias": True, "depth": depth}
    plain, shifted = BASE.build(**keywords), BASE.build(**keywords, shift_mem_down=shift)
    shifted.load_state_dict(plain.state_dict())
    _, mems = plain(tokens(2, SEGMENT), return_mems=True)
    assert len(mems) == depth
    ids = tokens(2, SEGMENT)
    wanted = plain(ids, mems=[mems[(layer + shift) % depth] for layer in range(depth)])
    close(shifted(ids, mems=mems), wanted)
    if depth > 2:
        reversed_ = plain(ids, mems=[mems[(layer - shift) % depth] for layer in range(depth)])
        assert depth == 2 * shift or not torch.allclose(wanted, reversed_, atol=1e-4)


@torch.no_grad()
def test_each_layer_keeps_its_own_input() -> None:
    """The memory of a layer is what it read, in the order of the layers."""
    model = BASE.build(max_mem_len=MEMORY, use_abs_pos_emb=False, rel_pos_bias=True, depth=3)
    ids = tokens(2, SEGMENT)
    _, mems = model(ids, return_mems=True)
    _, record = model(ids, return_intermediates=True)
    for mem, hidden in zip(mems, record.hiddens, strict=True):
        close(mem, hidden)


@torch.no_grad()
def test_some_layers_may_have_none() -> None:
    model = BASE.build(max_mem_len=MEMORY, alibi_pos_bias=True, use_abs_pos_emb=False)
    ids, mem = tokens(2, SEGMENT), torch.randn(2, 3, 16)
    close(model(ids, mems=[None, None]), model(ids))
    close(model(ids, mems=[mem[:, :0], None]), model(ids))
    assert not torch.allclose(model(ids, mems=[None, mem]), model(ids))
    hidden = torch.zeros(2, 3, dtype=torch.bool)
    close(model(ids, mems=[mem, mem], mem_masks=[hidden, hidden]), model(ids))


@torch.no_grad()
def test_an_encoder_reads_memory_too() -> None:
    model = BASE.build("encoder", max_mem_len=MEMORY, use_abs_pos_emb=False)
    ids, mem = tokens(2, SEGMENT), torch.randn(2, 3, 16)
    close(model(ids, mems=[mem, mem]), model(ids, mems=[mem.flip(1), mem.flip(1)]))
    assert not torch.allclose(model(ids, mems=[mem, mem]), model(ids))
