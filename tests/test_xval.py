"""Numbers among tokens: the loss by hand, generation equal with and without a cache."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from catalog import perturb

from x_transformers import Decoder, XValAutoregressiveWrapper, XValTransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError

DIM, VOCAB, NUMBER = 16, 6, 3
NETS = {
    "absolute": {},
    "rotary": {"rotary_pos_emb": True},
    "sinusoid": {"net": {"scaled_sinu_pos_emb": True}},
    "memory tokens": {"rotary_pos_emb": True, "net": {"num_memory_tokens": 2}},
    "factorized": {"net": {"emb_dim": 10}},
    "tied": {"net": {"tie_embedding": True}},
    "cross": {"cross_attend": True, "rotary_pos_emb": True},
    "unlimited": {"net": {"max_seq_len": 0}},
}


def build(name: str = "rotary", depth: int = 2, **wrapper) -> XValAutoregressiveWrapper:
    options = copy.deepcopy(NETS[name])
    around = {"max_seq_len": 24, **options.pop("net", {}), **wrapper.pop("net", {})}
    stack = Decoder(dim=DIM, depth=depth, heads=2, attn_dim_head=8, verbose=False, **options)
    net = XValTransformerWrapper(num_tokens=VOCAB, numerical_token_id=NUMBER, attn_layers=stack, **around)
    return XValAutoregressiveWrapper(perturb(net), **wrapper)


def data(batch: int = 2, n: int = 8):
    x = torch.randint(0, VOCAB, (batch, n))
    x[:, 2] = NUMBER
    return x, torch.randn(batch, n).masked_fill(x != NUMBER, math.nan)


def surroundings(name: str, model, prepended: bool = False, batch: int = 2) -> dict:
    kwargs = {"context": torch.randn(batch, 3, DIM)} if name == "cross" else {}
    return kwargs | ({"prepend_embeds": torch.randn(batch, 3, model.net.emb_dim)} if prepended else {})


def by_hand(model, logits, numbers, x, x_num, counted):
    """The loss, target by target; logits and numbers are one position before their targets."""
    terms = []
    for row, place in counted.nonzero().tolist():
        term = -logits[row, place - 1].log_softmax(dim=-1)[x[row, place]]
        if x[row, place] == NUMBER:
            term = term + model.numerical_loss_weight * (numbers[row, place - 1] - x_num[row, place]) ** 2
        terms.append(term)
    return torch.stack(terms).mean()


def targets(x):
    counted = torch.ones_like(x, dtype=torch.bool)
    counted[:, 0] = False
    return counted


@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("name", NETS)
def test_loss(name, prepended):
    model, (x, x_num) = build(name, numerical_loss_weight=0.7), data()
    kwargs = surroundings(name, model, prepended)
    logits, numbers = (t[:, 3 * prepended :] for t in model.net(x, x_num, **kwargs))
    loss, (ce, mse) = model(x, x_num, return_loss_breakdown=True, **kwargs)
    torch.testing.assert_close(loss, by_hand(model, logits, numbers, x, x_num, targets(x)))
    torch.testing.assert_close(model(x, x_num, **kwargs), loss)
    assert ce.shape == mse.shape == (2, 7)
    torch.testing.assert_close(loss, (ce + 0.7 * mse).mean())
    assert not mse[x[:, 1:] != NUMBER].any()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_ignored_tokens():
    model, (x, x_num) = build(pad_value=1), data()
    x[0, 5:], x[1, 3] = -100, -100
    shown = x.masked_fill(x == -100, 1)
    logits, numbers = model.net(shown, x_num)
    expected = by_hand(model, logits, numbers, x, x_num, targets(x) & (x != -100))
    torch.testing.assert_close(model(x, x_num), expected)
    number = build(pad_value=NUMBER)
    number.load_state_dict(model.state_dict())
    assert number(x, x_num).isfinite()  # there is no number at an ignored place


def test_masks():
    model, (x, x_num) = build(), data()
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    logits, numbers = model.net(x, x_num, mask=mask)
    expected = by_hand(model, logits, numbers, x, x_num, targets(x) & mask)
    torch.testing.assert_close(model(x, x_num, mask=mask), expected)
    other, other_num = torch.where(mask, x, 0), torch.where(mask, x_num, 9.0)
    torch.testing.assert_close(model(other, other_num, mask=mask), expected)
    both = model(x, x_num, mask=mask[:, 1:])
    logits, numbers = model.net(x[:, :-1], x_num[:, :-1], mask=mask[:, 1:])
    torch.testing.assert_close(both, by_hand(model, logits, numbers, x, x_num, targets(x) & mask))
    shifted = [t.clone() for t in (x, x_num)]
    for t in shifted:
        t[1] = t[1].roll(3)
    torch.testing.assert_close(model(*shifted, seq_start_pos=torch.tensor([0, 3])), expected)


def test_targets_that_do_not_count_give_a_zero_with_a_gradient():
    model, x = build(), torch.tensor([[3, -100, -100], [4, -100, -100]])
    loss, breakdown = model(x, torch.ones(x.shape), return_loss_breakdown=True)
    assert loss.item() == 0
    assert breakdown.cross_entropy_loss.shape == breakdown.numerical_mse_loss.shape == (2, x.shape[1] - 1)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# generation


def same(one, other):
    assert torch.equal(one.sampled_token_ids, other.sampled_token_ids)
    assert torch.equal(one.is_number_mask, other.is_number_mask)
    torch.testing.assert_close(one.sampled_numbers, other.sampled_numbers, equal_nan=True, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prepended", [False, True], ids=["", "prepended"])
@pytest.mark.parametrize("name", NETS)
def test_caches_agree_and_ragged_prompts_equal_single_ones(name, prepended):
    model, (x, x_num) = build(name), data(3, 5)
    kwargs = surroundings(name, model, prepended, 3)
    for lens in (None, (5, 3, 4)):
        out = []
        for cached in (True, False):
            torch.manual_seed(1)
            out.append(
                model.generate(x, x_num, 8, prompt_lens=lens, cache_kv=cached, filter_logits_fn="top_p", **kwargs)
            )
        same(*out)
    lens = (5, 3, 4)
    together = model.generate(x, x_num, 6, temperature=0.0, prompt_lens=lens, **kwargs)
    listed = [[t[row, :n] for row, n in enumerate(lens)] for t in (x, x_num)]
    same(model.generate(*listed, 6, temperature=0.0, **kwargs), together)
    for row, length in enumerate(lens):
        rows = {name: t[row : row + 1] for name, t in kwargs.items()}
        alone = model.generate(x[row, :length], x_num[row, :length], 6, temperature=0.0, **rows)
        assert alone.sampled_token_ids.shape == (6,)
        same(alone, type(alone)(*(t[row] for t in together)))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("name", "prepended"), [("rotary", False), ("memory tokens", True), ("cross", False)])
def test_streams_are_what_is_generated(name, prepended, cached):
    model, (x, x_num) = build(name).train(), data(3, 5)
    given = {"cache_kv": cached, "prompt_lens": (5, 3, 4), **surroundings(name, model, prepended, 3)}
    torch.manual_seed(1)
    wanted = model.generate(x, x_num, 8, **given)
    torch.manual_seed(1)
    stream = model.stream(x, x_num, 8, **given)
    assert model.training
    first = next(stream)
    assert model.training
    assert not first.sampled_numbers.is_inference()
    parts = zip(*[first, *stream], strict=True)
    assert model.training
    for streamed, whole in zip(parts, wanted, strict=True):
        torch.testing.assert_close(torch.stack(streamed, dim=-1), whole, atol=0, rtol=0, equal_nan=True)


def test_streams_of_one_row_and_of_lists():
    model, (x, x_num) = build().train(), data(2, 5)
    alone = list(model.stream(x[0], x_num[0], 3, temperature=0.0))
    assert [each.sampled_token_ids.shape for each in alone] == [()] * 3
    listed = list(model.stream(list(x), list(x_num), 3, temperature=0.0))
    for one, two in zip(alone, listed, strict=True):
        assert one.sampled_token_ids == two.sampled_token_ids[0]
    next(abandoned := model.stream(x, x_num, 3))
    abandoned.close()
    assert model.training
    assert list(model.stream(x, x_num, 0)) == []


def test_generated_tokens_and_numbers_are_predictions():
    model, (x, x_num) = build("absolute").train(), data(4, 5)
    ids, numbers, is_number = model.generate(x, x_num, 9, temperature=0.0)
    assert model.training
    assert torch.equal(is_number, ids == NUMBER)
    assert torch.equal(numbers.isnan(), ~is_number)
    whole, whole_num = torch.cat((x, ids), dim=1), torch.cat((x_num, numbers), dim=1)
    logits, predicted = model.eval().net(whole, whole_num)
    assert torch.equal(logits[:, 4:-1].argmax(dim=-1), ids)
    torch.testing.assert_close(predicted[:, 4:-1][is_number], numbers[is_number], atol=2e-5, rtol=1e-4)


def test_numbers_are_read_again():
    model, (x, x_num) = build(), data(2, 5)

    def always_a_number(logits):
        return F.one_hot(torch.tensor(NUMBER), VOCAB).log().expand_as(logits)

    out = model.generate(x, x_num, 4, filter_logits_fn=always_a_number)
    assert out.is_number_mask.all()
    whole, whole_num = torch.cat((x, out[0]), dim=1), torch.cat((x_num, out[1]), dim=1)
    _, predicted = model.eval().net(whole, whole_num)
    torch.testing.assert_close(predicted[:, 4:-1], out.sampled_numbers, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["absolute", "rotary"])
def test_the_window(name):
    model, (x, x_num) = build(name, net={"max_seq_len": 6}), data(2, 5)
    ids, numbers, _ = model.generate(x, x_num, 7, temperature=0.0)
    whole, whole_num = torch.cat((x, ids), dim=1), torch.cat((x_num, numbers), dim=1)
    for step in range(7):
        seen = slice(max(5 + step - 6, 0), 5 + step)
        logits, _ = model.eval().net(whole[:, seen], whole_num[:, seen])
        assert torch.equal(logits[:, -1].argmax(dim=-1), ids[:, step])


def test_filters_and_temperature():
    model, (x, x_num) = build(), data(2, 5)
    greedy = model.generate(x, x_num, 5, temperature=0.0)
    same(model.generate(x, x_num, 5, filter_logits_fn="top_k", filter_kwargs={"k": 1}), greedy)
    assert model.generate(x, x_num, 0).sampled_numbers.shape == (2, 0)


def test_round_trips():
    model, (x, x_num) = build("memory tokens", numerical_loss_weight=2.0), data()
    copied = XValAutoregressiveWrapper.from_config(model.config)
    copied.load_state_dict(model.state_dict())
    assert all(key.startswith("net.") for key in model.state_dict())
    torch.testing.assert_close(copied(x, x_num), model(x, x_num))


def test_low_precision():
    model, (x, x_num) = build(), data()
    expected = model(x, x_num).item()
    loss = model.bfloat16()(x, x_num)
    assert loss.dtype is torch.float32
    assert abs(loss.item() - expected) < 0.1
    assert model.generate(x, x_num, 3).sampled_token_ids.shape == (2, 3)


def test_refusals():
    with pytest.raises(ConfigError, match="`net` is a Decoder"):
        XValAutoregressiveWrapper(Decoder(dim=8, depth=1, heads=1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`numerical_loss_weight` is -1"):
        build(numerical_loss_weight=-1.0)
    model, (x, x_num) = build(), data()
    with pytest.raises(ShapeError, match=r"x has shape \(2, 8\) and `x_num` \(2, 7\)"):
        model(x, x_num[:, 1:])
    with pytest.raises(ShapeError, match=r"`mask` has shape \(2, 4\)"):
        model(x, x_num, mask=torch.ones(2, 4).bool())
    with pytest.raises(InputError, match="`return_mems` cannot be passed"):
        model(x, x_num, return_mems=True)
    for refusing in (model.generate, model.stream):  # streams refuse at once
        with pytest.raises(ShapeError, match="`start_numbers` must have the shapes"):
            refusing(x, x_num[:, 1:], 3)
        with pytest.raises(ShapeError, match="`start_numbers` must have the shapes"):
            refusing(list(x), list(x_num)[:1], 3)
        with pytest.raises(InputError, match="`temperature` is -1"):
            refusing(x, x_num, 3, temperature=-1.0)
        with pytest.raises(InputError, match="`seq_len` is -1"):
            refusing(x, x_num, -1)
