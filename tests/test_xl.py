"""Segments with memory: the loss by hand, generation equal to the chunked pass, whatever the prompt's length."""

import copy

import pytest
import torch
from catalog import perturb
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError, ShapeError

VOCAB, DIM, SIZE = 24, 16, 6
NETS = {
    "rotary": {"rotary_pos_emb": True},
    "absolute": {},
    "t5": {"rel_pos_bias": True, "rel_pos_num_buckets": 6, "rel_pos_max_distance": 8},
    "grouped heads": {"attn_kv_heads": 2, "rotary_pos_emb": True},
    "shifted memory": {"rotary_pos_emb": True, "net": {"shift_mem_down": 1}},
    "memory tokens": {"rotary_pos_emb": True, "net": {"num_memory_tokens": 2}},
    "interspersed": {"rotary_pos_emb": True, "net": {"num_memory_tokens": 1, "memory_tokens_interspersed_every": 2}},
    "shifted tokens": {"shift_tokens": 1},
    "short memory": {"rotary_pos_emb": True, "net": {"max_mem_len": 4}},
    "long memory": {"rotary_pos_emb": True, "net": {"max_mem_len": 15}},
    "no memory": {"rotary_pos_emb": True, "net": {"max_mem_len": 0}},
    "cross": {"cross_attend": True, "rotary_pos_emb": True},
}


def build(name: str = "rotary", **wrapper) -> XLAutoregressiveWrapper:
    options = copy.deepcopy(NETS[name])
    around = {"max_mem_len": SIZE, **options.pop("net", {})}
    stack = Decoder(dim=DIM, depth=2, heads=4, attn_dim_head=8, verbose=False, **options)
    net = TransformerWrapper(num_tokens=VOCAB, max_seq_len=SIZE, attn_layers=stack, **around)
    return XLAutoregressiveWrapper(perturb(net), **wrapper)


def surroundings(name: str, batch: int = 2) -> dict:
    return {"context": torch.randn(batch, 3, DIM)} if name == "cross" else {}


def chunked(net, x: Tensor, mems=None, **kwargs) -> Tensor:
    """Logits of all positions, segment by segment."""
    out = []
    for segment in x.split(SIZE, dim=1):
        logits, mems = net(segment, mems=mems, return_mems=True, **kwargs)
        out.append(logits)
    return torch.cat(out, dim=1)


# the loss


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("n", [2, 7, 16, 19])
def test_loss(name, n):
    model, x, kwargs = build(name), torch.randint(0, VOCAB, (2, n)), surroundings(name)
    log_probs = chunked(model.net, x[:, :-1], **kwargs).log_softmax(dim=-1)
    expected = -log_probs.gather(-1, x[:, 1:, None]).mean()  # without ignored targets, segments by their length
    torch.testing.assert_close(model(x, **kwargs), expected)


def test_rows_weigh_alike_in_a_segment():
    model, x = build(pad_value=3), torch.randint(4, VOCAB, (3, 9))
    x[0, 4:], x[1, 2] = -100, -100
    logits = chunked(model.net, x[:, :-1].masked_fill(x[:, :-1] == -100, 3)).log_softmax(dim=-1)
    expected, targets = torch.zeros(()), x[:, 1:]
    for first, last in ((0, 6), (6, 8)):
        for row in range(3):
            terms = [-logits[row, t, targets[row, t]] for t in range(first, last) if targets[row, t] != -100]
            if terms:
                expected = expected + torch.stack(terms).mean() / 3 * (last - first) / 8
    torch.testing.assert_close(model(x), expected)
    again = x.clone()
    again[again == -100] = 3
    lone = XLAutoregressiveWrapper(model.net, ignore_index=3, pad_value=3)
    torch.testing.assert_close(lone(again), expected)


def test_targets_that_do_not_count_give_a_zero_with_a_gradient():
    model = build()
    loss = model(torch.tensor([[3, -100, -100], [4, -100, -100]]))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["rotary", "memory tokens", "shifted memory"])
def test_every_parameter_learns(name):
    model = build(name).double()
    model(torch.randint(0, VOCAB, (2, 14))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def embedding_gradient(model: XLAutoregressiveWrapper, x: Tensor) -> Tensor:
    """What the last segment's loss alone tells the embedding of token 0, which stands in the first segment."""
    model(x).backward()
    return model.net.token_emb.emb.weight.grad[0]


def test_gradients_flow_through_so_many_segments():
    x = torch.randint(1, VOCAB, (2, 3 * SIZE + 1))
    x[:, 0] = 0
    x[:, 1 : 2 * SIZE + 1] = -100  # only the third segment has targets, and the pad value is not 0
    reached = {}
    for steps in (1, 2, 3):
        torch.manual_seed(0)
        model = build("long memory", pad_value=5, tbptt_steps=steps)
        reached[steps] = bool(embedding_gradient(model, x).any())
    assert reached == {1: False, 2: False, 3: True}


def test_memories_begin_and_are_dropped():
    model, x = build(), torch.randint(0, VOCAB, (2, 13))
    _, mems = model.net(torch.randint(0, VOCAB, (2, SIZE)), return_mems=True)
    log_probs = chunked(model.net, x[:, :-1], mems=mems).log_softmax(dim=-1)
    torch.testing.assert_close(model(x, mems=tuple(mems)), -log_probs.gather(-1, x[:, 1:, None]).mean())
    apart = torch.stack([AutoregressiveWrapper(model.net)(x[:, first : first + 7]) for first in (0, 6)]).mean()
    torch.testing.assert_close(model(x, mems=mems, dropout_mems=True), apart)
    assert not torch.allclose(model(x), apart, atol=1e-4)


@pytest.mark.parametrize("name", ["rotary", "memory tokens", "interspersed", "short memory", "long memory"])
@pytest.mark.parametrize("argument", ["mask", "self_attn_kv_mask"])
def test_masked_tokens_stay_hidden_in_the_memory(name, argument):
    model, x = build(name), torch.randint(0, VOCAB - 1, (2, 17))
    mask = torch.ones(2, 17, dtype=torch.bool)
    for row, place in ((0, 3), (1, 10)):
        mask[row, place] = False
        x[row, place] = VOCAB - 1  # a token that stands nowhere else
        x[row, place + 1] = -100  # what it would be asked for itself
    for kwargs, reached in (({}, True), ({argument: mask}, False), ({argument: mask[:, :-1]}, False)):
        model.zero_grad()
        model(x, **kwargs).backward()
        assert bool(model.net.token_emb.emb.weight.grad[VOCAB - 1].any()) == reached


def test_arguments_are_cut_into_segments():
    stack = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    net = TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=SIZE, max_mem_len=SIZE, attn_layers=stack, embed_num_tokens={"kind": 4}
    )
    model, x = XLAutoregressiveWrapper(perturb(net)), torch.randint(0, VOCAB, (2, 10))
    ids, extra, pos = torch.randint(0, 4, (2, 10)), torch.randn(2, 10, DIM), torch.arange(10) * 2
    out, mems = [], None
    for part in (slice(0, 6), slice(6, 9)):
        given = {"embed_ids": {"kind": ids[:, part]}, "sum_embeds": extra[:, part], "pos": pos[part]}
        logits, mems = net(x[:, part], mems=mems, return_mems=True, **given)
        out.append(logits)
    expected = -torch.cat(out, dim=1).log_softmax(dim=-1).gather(-1, x[:, 1:, None]).mean()
    torch.testing.assert_close(model(x, embed_ids={"kind": ids}, sum_embeds=extra, pos=pos), expected)


# generation


class Spy:
    def __init__(self) -> None:
        self.logits = []

    def __call__(self, logits: Tensor) -> Tensor:
        self.logits.append(logits)
        return logits


@pytest.mark.parametrize("cache_kv", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("prime", [1, 3, 6, 8, 12])
def test_every_token_is_drawn_as_the_chunked_pass_expects_it(name, prime, cache_kv):
    model, x, kwargs, spy = build(name), torch.randint(0, VOCAB, (2, prime)), surroundings(name), Spy()
    tokens = model.generate(x, 14, filter_logits_fn=spy, cache_kv=cache_kv, **kwargs)
    assert tokens.shape == (2, 14)
    with torch.no_grad():
        expected = chunked(model.eval().net, torch.cat((x, tokens), dim=1)[:, :-1], **kwargs)[:, prime - 1 :]
    torch.testing.assert_close(torch.stack(spy.logits, dim=1), expected, atol=2e-5, rtol=1e-5)


def test_nets_that_cannot_be_cached():
    stack = Decoder(dim=DIM, depth=1, heads=2, attn_dim_head=8, rotary_pos_emb=True, verbose=False)
    net = TransformerWrapper(num_tokens=VOCAB, max_seq_len=SIZE, max_mem_len=SIZE, attn_layers=stack, recycling=True)
    model, x, spy = XLAutoregressiveWrapper(perturb(net)), torch.randint(0, VOCAB, (2, 4)), Spy()
    tokens = model.generate(x, 11, filter_logits_fn=spy)
    with torch.no_grad():
        expected = chunked(net.eval(), torch.cat((x, tokens), dim=1)[:, :-1])[:, 3:]
    torch.testing.assert_close(torch.stack(spy.logits, dim=1), expected, atol=2e-5, rtol=1e-5)


def test_memories_of_the_caller():
    model, x, spy = build(), torch.randint(0, VOCAB, (2, 4)), Spy()
    with torch.no_grad():
        _, mems = model.net(torch.randint(0, VOCAB, (2, SIZE)), return_mems=True)
        tokens = model.generate(x, 9, filter_logits_fn=spy, mems=tuple(mems))
        expected = chunked(model.net, torch.cat((x, tokens), dim=1)[:, :-1], mems=mems)[:, 3:]
    torch.testing.assert_close(torch.stack(spy.logits, dim=1), expected, atol=2e-5, rtol=1e-5)


def test_masks_and_covering_arguments():
    model, x, spy = build("absolute"), torch.randint(0, VOCAB, (2, 8)), [Spy(), Spy()]
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 3] = False
    other = x.clone()
    other[0, 3] = (x[0, 3] + 1) % VOCAB
    extra = torch.randn(2, 20, DIM)
    for prompts, one in zip((x, other), spy, strict=True):
        torch.manual_seed(0)
        model.generate(prompts, 10, filter_logits_fn=one, mask=mask, sum_embeds=extra)
    torch.testing.assert_close(torch.stack(spy[0].logits), torch.stack(spy[1].logits), atol=2e-5, rtol=1e-5)


def test_cached_steps_read_one_token():
    model, x, lengths = build(), torch.randint(0, VOCAB, (1, 8)), []
    model.net.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(x, 7)
    assert lengths == [6, 2, 1, 1, 1, 6, 1, 1]


def test_filters_temperature_and_ends():
    model, x = build(pad_value=2), torch.randint(0, VOCAB, (2, 4))
    greedy = model.generate(x, 9, temperature=0.0)
    assert torch.equal(model.generate(x, 9, filter_logits_fn="top_k", filter_kwargs={"k": 1}), greedy)
    assert torch.equal(model.generate(x[0], 9, temperature=0.0), greedy[0])
    end = greedy[0, 2].item()
    prompts = torch.cat((torch.full((2, 1), end), x), dim=1)  # an end token in the prompt ends nothing
    plain, ended = (model.generate(prompts, 9, temperature=0.0, eos_token=e) for e in (None, end))
    for row, cut in zip(plain.tolist(), ended.tolist(), strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        assert cut == (row[:length] + [2] * 9)[: len(cut)]
    assert model.generate(x, 0, eos_token=end).shape == (2, 0)
    assert model.training


def test_streams():
    model, x = build(pad_value=2), torch.randint(0, VOCAB, (2, 3, 8))
    end = int(model.generate(x, 9, temperature=0.0)[0, 0, 3])
    wanted = model.generate(x, 9, eos_token=end, temperature=0.0)
    tokens = list(model.stream(x, 9, eos_token=end, temperature=0.0))
    assert torch.equal(torch.stack(tokens, dim=-1), wanted)
    assert not any(token.is_inference() for token in tokens)
    assert model.training
    with pytest.raises(InputError, match="`attn_mask` cannot be given to segments"):
        model.stream(x, 9, attn_mask=torch.ones(8, 8).bool())


def test_config_and_state_round_trip():
    model, x = build("shifted memory", tbptt_steps=2, pad_value=3), torch.randint(0, VOCAB, (2, 14))
    twin = XLAutoregressiveWrapper.from_config(model.config)
    assert (twin.tbptt_steps, twin.pad_value) == (2, 3)
    assert all(key.startswith("net.") for key in model.state_dict())
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), model(x))


# refusals


def test_bad_options():
    with pytest.raises(ConfigError, match="`tbptt_steps` is 0"):
        build(tbptt_steps=0)


def test_nets_that_cannot_be_wrapped():
    stack = Decoder(dim=8, depth=1, heads=1)
    with pytest.raises(ConfigError, match="`net` is a Decoder"):
        XLAutoregressiveWrapper(stack)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`max_seq_len` of `net` is 0"):
        XLAutoregressiveWrapper(TransformerWrapper(num_tokens=9, max_seq_len=0, attn_layers=stack))
    with pytest.raises(ConfigError, match="no head"):
        XLAutoregressiveWrapper(
            TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack, return_only_embed=True)
        )


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"prepend_embeds": torch.zeros(2, 1, DIM)}, InputError, "in front of every segment"),
        ({"attn_mask": torch.ones(9, 9).bool()}, InputError, "`attn_mask` cannot be given to segments"),
        ({"cache": KVCache()}, InputError, "`cache` cannot be given"),
        ({"return_intermediates": True}, InputError, "call the net itself"),
    ],
)
def test_bad_arguments(kwargs, error, said):
    model, x = build(), torch.randint(0, VOCAB, (2, 9))
    with pytest.raises(error, match=said):
        model(x, **kwargs)
    with pytest.raises(error, match=said):
        model.generate(x, 3, **kwargs)


def test_bad_input():
    model = build()
    with pytest.raises(ShapeError, match=r"`mask` has shape \(2, 7\); it must cover the 9 tokens"):
        model(torch.randint(0, VOCAB, (2, 9)), mask=torch.ones(2, 7).bool())
    with pytest.raises(ShapeError, match="nothing to predict"):
        model(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(InputError, match="different lengths"):
        model.generate([torch.tensor([1, 2]), torch.tensor([1])], 3)
    with pytest.raises(InputError, match="`seq_len` is -1"):
        model.generate(torch.tensor([1, 2]), -1)
