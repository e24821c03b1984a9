"""Filters, sampling and prompts by small literal examples; the mode of modules; the bar."""

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from x_transformers import Decoder, TransformerWrapper
from x_transformers.autoregressive_wrapper import (
    FILTER_LOGITS_FN,
    align_right,
    contrastive_decode_fn,
    eval_decorator,
    gumbel_noise,
    gumbel_sample,
    min_p,
    modify_cached_kv,
    pad_at_dim,
    top_a,
    top_k,
    top_p,
)
from x_transformers.decoding.filters import find_filter
from x_transformers.decoding.loop import with_progress
from x_transformers.decoding.options import GenerationOptions
from x_transformers.decoding.prompts import read_prompts
from x_transformers.decoding.sampling import adjuster, exponential_race
from x_transformers.errors import InputError, ShapeError, TokenRangeError
from x_transformers.modules.inference import evaluating

PROBS = torch.tensor([0.5, 0.04, 0.3, 0.16])
LOGITS = PROBS.log()
INF = math.inf


def kept(filtered: Tensor) -> list[int]:
    return (filtered > -INF).nonzero().flatten().tolist()


# filters


@pytest.mark.parametrize(
    ("fn", "options", "expected"),
    [
        (top_p, {"thres": 0.0}, [0]),
        (top_p, {"thres": 0.49}, [0]),
        (top_p, {"thres": 0.6}, [0, 2]),
        (top_p, {"thres": 0.9}, [0, 2, 3]),
        (top_p, {"thres": 1.0}, [0, 1, 2, 3]),
        (top_k, {}, [0]),
        (top_k, {"k": 2}, [0, 2]),
        (top_k, {"k": 9}, [0, 1, 2, 3]),
        (top_k, {"frac_num_tokens": 0.51}, [0, 2, 3]),
        (top_a, {}, [0, 1, 2, 3]),
        (top_a, {"min_p_ratio": 0.8}, [0, 2]),
        (top_a, {"min_p_ratio": 5.0, "min_p_pow": 1.0}, [0]),
        (min_p, {}, [0, 2, 3]),
        (min_p, {"min_p": 0.5}, [0, 2]),
        (min_p, {"min_p": 1.0}, [0]),
    ],
)
def test_filters_keep(fn, options, expected):
    given = LOGITS.clone()
    out = fn(given, **options)
    assert kept(out) == expected
    assert torch.equal(out[expected], LOGITS[expected])
    assert torch.equal(given, LOGITS)


@pytest.mark.parametrize("name", FILTER_LOGITS_FN)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_filters_take_any_rank_and_dtype(name, lead, dtype):
    logits = torch.randn(*lead, 20).to(dtype)
    out = FILTER_LOGITS_FN[name](logits)
    assert out.shape == logits.shape
    assert out.dtype == dtype
    rows = zip(logits.reshape(-1, 20), out.reshape(-1, 20), strict=True)
    assert all(torch.equal(FILTER_LOGITS_FN[name](row), filtered) for row, filtered in rows)


@pytest.mark.parametrize(
    ("fn", "options", "said"),
    [
        (top_p, {"thres": 1.5}, "`thres` is 1.5; .* in \\[0, 1\\]"),
        (top_p, {"thres": -0.1}, "`thres` is -0.1"),
        (min_p, {"min_p": 2}, "`min_p` is 2"),
        (top_k, {"k": 0}, "keep no token: `k` is 0"),
        (top_k, {"frac_num_tokens": 0.0}, "`frac_num_tokens` is 0.0"),
        (top_a, {"min_p_ratio": -1}, "cannot be negative"),
    ],
)
def test_filters_refuse(fn, options, said):
    with pytest.raises(InputError, match=said):
        fn(LOGITS, **options)


def test_a_filter_is_found_by_name():
    assert find_filter("top_a") is top_a
    assert find_filter(torch.nn.functional.relu) is torch.nn.functional.relu
    with pytest.raises(InputError, match=r"'topk'; .* top_p, top_k, top_a, min_p. Did you mean `top_k`"):
        find_filter("topk")
    with pytest.raises(InputError, match="one of top_p"):
        find_filter(3)  # type: ignore[arg-type]


def test_contrast():
    expert, amateur = torch.tensor([2.0, 1.0, -3.0]), torch.tensor([3.0, -1.0, -9.0])
    out = contrastive_decode_fn(expert, amateur, alpha=0.1, beta=0.5)
    assert out.tolist() == [1.5, 2.0, torch.finfo(torch.float32).min]
    with pytest.raises(InputError, match=r"`alpha` is 0; .* \(0, 1\]"):
        contrastive_decode_fn(expert, amateur, alpha=0)
    with pytest.raises(InputError, match="same vocabulary"):
        contrastive_decode_fn(expert, amateur[:2])


# sampling


def choosing(**options):
    return GenerationOptions(**options).choose


def test_temperature_zero_takes_the_first_maximum():
    assert choosing(temperature=0)(torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, 0.0]])).tolist() == [[1], [0]]


def test_the_temperature_comes_before_the_filter():
    seen = []

    def spy(logits):
        seen.append(logits)
        return top_p(logits, thres=0.8)

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    drawn = choosing(temperature=2.0, filter_logits_fn=spy)(logits.expand(200, -1))
    assert torch.equal(seen[0][0], logits[0] / 2)
    assert set(drawn.flatten().tolist()) == {0, 1, 2}  # on the raw logits it would keep two
    assert kept(top_p(logits[0], thres=0.8)) == [0, 1]


def test_the_filter_before_the_temperature_on_request():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(200, -1)
    drawn = choosing(
        temperature=2.0, filter_logits_fn=top_p, filter_kwargs={"thres": 0.8}, filter_before_temperature=True
    )(logits)
    assert set(drawn.flatten().tolist()) == {0, 1}
    adjusted = adjuster(2.0, top_p, {"thres": 0.8}, filter_before_temperature=True)(logits[0])
    assert adjusted.tolist() == [1.0, 0.5, -INF, -INF]


def test_draws_have_the_right_frequencies_in_half_precision():
    drawn = choosing(filter_logits_fn="top_k", filter_kwargs={"k": 3})(LOGITS.bfloat16().expand(20000, -1))
    share = drawn.flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.3, 0.16]) / 0.96, atol=0.015, rtol=0)


def test_a_tiny_temperature_is_greedy_in_half_precision():
    logits = torch.tensor([[8.0, 7.0, 9.0]], dtype=torch.float16)
    assert choosing(temperature=1e-6, filter_kwargs={"k": 3})(logits).item() == 2


def test_the_race_is_multinomial():
    probs = torch.rand(50, 11)
    state = torch.get_rng_state()
    expected = torch.multinomial(probs, 1)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(exponential_race(probs), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("temperature", [-1.0, INF, math.nan])
def test_bad_temperatures(temperature):
    with pytest.raises(InputError, match=r"`temperature` is .*; it must be finite and not negative"):
        adjuster(temperature, top_k, {})


def test_keywords_that_a_filter_does_not_take():
    with pytest.raises(InputError, match=r"`filter_kwargs` do not fit top_k\(.*unexpected keyword argument 'thres'"):
        choosing(filter_kwargs={"thres": 0.9})


def test_gumbel():
    noise = gumbel_noise(torch.zeros(20000))
    assert abs(noise.mean().item() - 0.5772) < 0.03
    assert gumbel_sample(LOGITS.expand(2, 3, 4), temperature=0).tolist() == [[0] * 3] * 2
    share = gumbel_sample(LOGITS.expand(20000, 4)).bincount(minlength=4) / 20000
    torch.testing.assert_close(share, PROBS, atol=0.015, rtol=0)


# prompts


def test_align_right():
    t = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    lens = torch.tensor([3, 1, 0])
    assert align_right(t, lens, pad_id=-1).tolist() == [[1, 2, 3], [-1, -1, 4], [-1, -1, -1]]
    deep = align_right(t.unsqueeze(-1).expand(-1, -1, 2), lens)
    assert torch.equal(deep[..., 1], align_right(t, lens))
    with pytest.raises(ShapeError, match=r"\(2,\); it must be \(3,\)"):
        align_right(t, lens[:2])
    with pytest.raises(InputError, match=r"4.*rows have 3"):
        align_right(t, torch.tensor([4, 0, 0]))


def test_pad_at_dim():
    t = torch.ones(2, 3)
    assert pad_at_dim(t, (1, 2), dim=0).shape == pad_at_dim(t, (1, 2), dim=-2).shape == (5, 3)
    assert pad_at_dim(t, (1, 0), value=7.0).tolist() == [[7, 1, 1, 1]] * 2


def test_prompts_of_different_lengths():
    read = read_prompts([torch.tensor([1, 2, 3]), torch.tensor([4])], None, 0, 10)
    assert read.tokens.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert read.start.tolist() == [0, 2]
    assert read.align(torch.tensor([[True, True, True]]), False).tolist() == [[True] * 3, [False, False, True]]

    # what lies behind a prompt is never looked at, and columns that no row needs are left out
    read = read_prompts(torch.tensor([[[1, 2, -7]], [[4, 99, 99]]]), torch.tensor([[2], [1]]), 5, 10)
    assert read.tokens.tolist() == [[1, 2], [5, 4]]
    assert (read.lead, read.width, read.start.tolist()) == ((2, 1), 3, [0, 1])
    assert read.align(torch.tensor([[True, False, True]] * 2), False).tolist() == [[True, False], [False, True]]


def test_prompts_of_one_length():
    shorter = read_prompts(torch.tensor([[1, 2, 99]]), [2], 0, 10)
    assert (shorter.tokens.tolist(), shorter.start) == ([[1, 2]], None)
    assert shorter.align(torch.tensor([[True, False, True]]), False).tolist() == [[True, False]]
    for prompts, lens in ((torch.tensor([[1, 2]]), [2]), ([torch.tensor([1, 2])], None), (torch.tensor([1, 2]), 2)):
        read = read_prompts(prompts, lens, -1, 10)  # a pad value that is not needed may be anything
        assert read.tokens.tolist() == [[1, 2]]
        assert read.start is None
    assert read_prompts(torch.tensor([1, 2], dtype=torch.int16), None, 0, 10).tokens.dtype is torch.long


@pytest.mark.parametrize(
    ("prompts", "lens", "error", "said"),
    [
        (torch.zeros(2, 0, dtype=torch.long), None, InputError, "empty; begin with at least one token"),
        (torch.tensor([[1, 2], [3, 4]]), [2, 0], InputError, "one prompt of the batch is empty"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.long)], None, InputError, "one prompt of the batch is empty"),
        ([], None, InputError, "`prompts` is an empty list"),
        (torch.zeros(0, 3, dtype=torch.long), None, ShapeError, r"shape \(0, 3\), which is no prompt"),
        (torch.tensor(3), None, ShapeError, "a single number"),
        (torch.tensor([[0.5]]), None, InputError, "`prompts` has dtype torch.float32"),
        ([torch.tensor([True])], None, InputError, "`prompts` has dtype torch.bool"),
        ([torch.tensor([[1]])], None, ShapeError, r"shape \(1, 1\); each must be \(n,\)"),
        ([torch.tensor([1])], [1], InputError, "drop `prompt_lens`"),
        (torch.tensor([[1, 2]]), [3], InputError, "from 3 to 3; the prompts have 2 columns"),
        (torch.tensor([[1, 2]]), [-1], InputError, "from -1 to -1"),
        (torch.tensor([[1, 2]]), [1, 1], ShapeError, "holds 2 lengths; there are 1 prompts"),
        (torch.tensor([[1, 2]]), torch.tensor([1.0]), InputError, "`prompt_lens` has dtype torch.float32"),
        (torch.tensor([[1, 10]]), None, TokenRangeError, "ids from 1 to 10; this model's vocabulary runs from 0 to 9"),
        (torch.tensor([[-1, 3]]), None, TokenRangeError, "ids from -1 to 3"),
        (torch.tensor([[1, 3]]), [1], TokenRangeError, "`pad_value` is -1; .* 0 to 9"),
    ],
)
def test_bad_prompts(prompts, lens, error, said):
    with pytest.raises(error, match=said):
        read_prompts(prompts, lens, -1, 10)


# around


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.free = nn.Dropout(), nn.Dropout()

    @eval_decorator
    def modes(self, fail: bool = False) -> list[bool]:
        if fail:
            raise RuntimeError
        return [part.training for part in self.modules()]


@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
def test_every_part_gets_its_mode_back(fail):
    model = Moody().train()
    model.frozen.eval()
    if fail:
        with pytest.raises(RuntimeError):
            model.modes(fail=True)
    else:
        assert model.modes() == [False] * 3
    assert [part.training for part in model.modules()] == [True, False, True]


def test_two_models_are_evaluated_together():
    one, other = nn.Dropout(), nn.Dropout().eval()
    with evaluating(one, other):
        assert not one.training
    assert one.training
    assert not other.training


def test_modify_cached_kv():
    torch.manual_seed(1)
    stack = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, cross_attend=True)
    net = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack).eval()
    x, context = torch.randint(9, (2, 5)), torch.randn(2, 3, 16)
    _, record = net(x, context=context, return_intermediates=True)
    crossed = [r.cached_kv[0].clone() for r in record.attn_intermediates if r.layer_type == "c"]
    modify_cached_kv(record, lambda t: t[..., :2, :])
    assert [r.cached_kv[1].shape[-2] for r in record.attn_intermediates] == [2, 3, 2, 3]
    assert all(torch.equal(r.cached_kv[0], k) for r, k in zip(record.attn_intermediates[1::2], crossed, strict=True))
    assert record.cache.entries[0].grown["k"].shape[-2] == 2
    modify_cached_kv(None, lambda t: t)


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(InputError, match="pip install tqdm"):
        with_progress(iter(()), 0)
