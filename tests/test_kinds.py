"""Properties of every model over a sequence: independent rows, caches, prefixes, memories, gradients, files."""

import copy
import itertools
import json
import pickle
from typing import Any

import pytest
import torch
from catalog import close, perturb
from kinds import KINDS, Inputs, Kind

from x_transformers import Decoder, Encoder
from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError, ShapeError

EACH = pytest.mark.parametrize("kind", KINDS, ids=str)
LENGTHS = torch.tensor([9, 6, 2])
OPTIONS = {
    "plain": ({}, {}),
    "memory": ({"num_memory_tokens": 2}, {}),
    "rotary": ({}, {"rotary_pos_emb": True}),
    "sinusoids": ({"scaled_sinu_pos_emb": True}, {}),
    "rotary memory": ({"num_memory_tokens": 2}, {"rotary_pos_emb": True, "attn_num_mem_kv": 1}),
}
FRAMED = pytest.mark.parametrize("options", OPTIONS)
PREPENDED = pytest.mark.parametrize("count", [0, 3], ids=["alone", "prepended"])


def built(kind: Kind, options: str, stack: type = Decoder) -> Any:
    wrapper, layers = OPTIONS[options]
    return kind.build(stack, layers, **wrapper)


def prepended(model: Any, rows: int, count: int) -> dict[str, torch.Tensor]:
    return {"prepend_embeds": torch.randn(rows, count, model.emb_dim)} if count else {}


def part(inputs: Inputs, row: int, begin: int, end: int) -> Inputs:
    return {name: t[row : row + 1, begin:end] for name, t in inputs.items()}


@EACH
@FRAMED
@PREPENDED
@pytest.mark.parametrize("stack", [Decoder, Encoder])
@torch.no_grad()
def test_padded_rows_equal_single_rows(kind: Kind, options: str, count: int, stack: type) -> None:
    model, n = built(kind, options, stack), 9
    inputs, given = kind.draw(3, n), prepended(built(kind, options, stack), 3, count)
    mask = torch.arange(n) < LENGTHS[:, None]
    right = kind.run(model, inputs, mask=mask, **given)
    left = kind.run(model, inputs, seq_start_pos=n - LENGTHS, **given)
    assert right.shape[1] == count + n
    for row, length in enumerate(LENGTHS.tolist()):
        own = {name: t[row : row + 1] for name, t in given.items()}
        alone = kind.run(model, part(inputs, row, 0, length), **own)
        close(right[row : row + 1, : count + length], alone)
        alone = kind.run(model, part(inputs, row, n - length, n), **own)
        close(left[row : row + 1, count + n - length :], alone[:, count:])


@EACH
@FRAMED
@PREPENDED
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_cached_passes_are_one_pass(kind: Kind, options: str, count: int, static: bool) -> None:
    """Also with several new positions at once, and when embeddings are handed in again that are cached already."""
    model, n = built(kind, options), 10
    inputs, given = kind.draw(2, n), prepended(model, 2, count)
    cache = model.static_cache(2, n + 1, prepended=count) if static else None
    start = torch.tensor([0, 3])
    whole = kind.run(model, inputs, seq_start_pos=start, **given)
    steps = kind.decode(model, inputs, [4, 3, 1, 2], cache=cache, seq_start_pos=start, **given)
    close(steps[0], whole[0])
    close(steps[1, count + 3 :], whole[1, count + 3 :])


@EACH
@torch.no_grad()
def test_the_whole_sequence_may_be_handed_in(kind: Kind) -> None:
    model, inputs = built(kind, "memory"), kind.draw(2, 7)
    whole = kind.run(model, inputs)
    first = {name: t[:, :3] for name, t in inputs.items()}
    _, record = model(*kind.feed(first), return_intermediates=True)
    close(kind.run(model, inputs, cache=record), whole[:, 3:])
    close(kind.run(model, inputs, cache=record, cache_age=4), whole[:, 3:])
    with pytest.raises(InputError, match="5 tokens are to run"):
        model(*kind.feed(inputs), cache=record, cache_age=5)


@EACH
@torch.no_grad()
def test_arguments_over_tokens_do_not_change_the_prefix(kind: Kind) -> None:
    model, n = built(kind, "rotary memory"), 6
    inputs, given = kind.draw(2, n), prepended(model, 2, 2)
    whole = kind.run(model, inputs, **given)
    for name, nothing in (
        ("pos", torch.arange(n)),
        ("pos", torch.arange(n, dtype=torch.int32)),
        ("pos", torch.arange(n + 4)),
        ("attn_mask", torch.ones(n, n, dtype=torch.bool)),
        ("attn_bias", torch.zeros(4, n, n)),
        ("mask", torch.ones(2, n, dtype=torch.long)),
        ("prepend_mask", torch.ones(2, 2, dtype=torch.bool)),
        ("self_attn_kv_mask", torch.ones(2, n, dtype=torch.bool)),
    ):
        close(kind.run(model, inputs, **{name: nothing}, **given), whole)
    moved = kind.run(model, inputs, pos=torch.arange(n) * 2, **given)
    assert (moved - whole).abs().max() > 1e-3, "rotation must read the positions given"


@EACH
@torch.no_grad()
def test_a_hidden_prefix_is_not_there(kind: Kind) -> None:
    model, inputs = built(kind, "memory"), kind.draw(2, 6)
    embeds = torch.randn(2, 3, 16)
    shown = torch.tensor([[True, False, True]]).expand(2, -1)
    one = kind.run(model, inputs, prepend_embeds=embeds, prepend_mask=shown)
    other = torch.where(shown[..., None], embeds, torch.randn_like(embeds))
    close(kind.run(model, inputs, prepend_embeds=other, prepend_mask=shown)[:, 3:], one[:, 3:])
    assert (kind.run(model, inputs, prepend_embeds=embeds)[:, 3:] - one[:, 3:]).abs().max() > 1e-3


@EACH
@pytest.mark.parametrize("kept", [list, tuple])
@torch.no_grad()
def test_memories_come_back(kind: Kind, kept: type) -> None:
    model = kind.build(layers={"rotary_pos_emb": True}, max_mem_len=4)
    inputs = kind.draw(2, 6)
    out, mems = model(*kind.feed(inputs), return_mems=True)
    assert [tuple(mem.shape) for mem in mems] == [(2, 4, 16)] * 2
    again, new = model(*kind.feed(inputs), mems=kept(mems), return_mems=True)
    assert (kind.read(again) - kind.read(out)).abs().max() > 1e-3
    joined = kind.name == "multi_input"
    short = {name: t[:, :1] for name, t in inputs.items()}
    _, new = model(*kind.feed(short), mems=kept(mems), return_mems=True)
    assert new[0].shape[1] == (4 if joined else 1)
    assert not any(mem.requires_grad for mem in new)


@EACH
@FRAMED
def test_every_parameter_learns(kind: Kind, options: str) -> None:
    model = built(kind, options).double()
    inputs = kind.draw(3, 8)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    out = kind.run(model, inputs)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name


@EACH
@torch.no_grad()
def test_models_are_saved_and_copied(kind: Kind) -> None:
    model, inputs = built(kind, "memory"), kind.draw(2, 5)
    wanted = kind.run(model, inputs)
    again = type(model).from_config(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    for copied in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(kind.run(copied, inputs), wanted)
        perturb(copied)
        assert not torch.allclose(kind.run(copied, inputs), wanted)
    assert torch.equal(kind.run(model, inputs), wanted)


@EACH
@torch.no_grad()
def test_a_pass_is_one_graph_and_steps_are_another(kind: Kind) -> None:
    torch.compiler.reset()
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model, inputs = built(kind, "memory"), kind.draw(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    wanted = kind.run(model, inputs)
    for _ in range(2):
        close(kind.read(compiled(*kind.feed(inputs))), wanted)
    assert graphs == 1
    close(kind.decode(compiled, inputs, [3, 1, 1, 1, 1], cache=model.static_cache(2, 8)), wanted)
    assert graphs <= 3


@EACH
@torch.no_grad()
def test_half_precision_stays_finite(kind: Kind) -> None:
    model, inputs = built(kind, "memory"), kind.draw(2, 6)
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    wanted = kind.run(model, inputs, mask=mask)
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    got = kind.run(model.bfloat16(), half, mask=mask)
    assert got.dtype is torch.bfloat16
    assert got.isfinite().all()
    assert (got.float() - wanted).abs().mean() < 0.1


@EACH
@torch.no_grad()
def test_requested_outputs(kind: Kind) -> None:
    model, inputs = kind.build(max_mem_len=3), kind.draw(2, 5)
    feed = kind.feed(inputs)
    wanted = kind.run(model, inputs)
    for flags in itertools.product([False, True], repeat=3):
        names = ("return_intermediates", "return_mems", "return_attn")
        result = model(*feed, **dict(zip(names, flags, strict=True)))
        out, further = result if any(flags) else (result, None)
        close(kind.read(out), wanted)
        if flags[0]:
            assert further.last_hidden.shape == (2, 5, 16)
            assert (further.mems is not None) is flags[1]
        elif flags[1]:
            assert [tuple(mem.shape) for mem in further] == [(2, 3, 16)] * 2
        elif flags[2]:
            assert [tuple(attn.shape) for attn in further] == [(2, 4, 5, 5)] * 2
    assert model(*feed, return_embeddings=True).shape == (2, 5, 16)


@EACH
def test_bad_input_is_refused(kind: Kind) -> None:
    model, inputs = kind.build(), kind.draw(2, 5)
    feed = kind.feed(inputs)
    for error, words, given in (
        (ShapeError, "`mask` has shape", {"mask": torch.ones(2, 4, dtype=torch.bool)}),
        (ShapeError, "`prepend_embeds` has shape", {"prepend_embeds": torch.zeros(2, 3, 7)}),
        (ShapeError, "`seq_start_pos` has shape", {"seq_start_pos": torch.zeros(3, dtype=torch.long)}),
        (ShapeError, "7 tokens was given for 5", {"pos": torch.arange(7)}),
        (TypeError, "no_such", {"no_such": 1}),
    ):
        with pytest.raises(error, match=words):
            model(*feed, **given)
    with pytest.raises(ShapeError, match="33 tokens were given"):
        model(*kind.feed(kind.draw(1, 33)))
    with pytest.raises(InputError, match="only a causal model can use a cache"):
        kind.build(Encoder)(*feed, cache=KVCache())


@EACH
def test_bad_options_are_refused(kind: Kind) -> None:
    for words, options in (
        ("`max_mem_len` is -1", {"max_mem_len": -1}),
        ("`emb_dropout` is 1", {"emb_dropout": 1.0}),
        ("unknown keyword `no_such`", {"no_such": 1}),
    ):
        with pytest.raises(ConfigError, match=words):
            kind.build(**options)
    with pytest.raises(ConfigError, match="`attn_layers` is a int"):
        kind.make(attn_layers=3)
