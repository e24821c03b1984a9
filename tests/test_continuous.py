"""Vectors: the loss by hand, roll-outs by hand, generation equal with and without a cache."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from catalog import perturb
from torch import Tensor

from x_transformers import ContinuousAutoregressiveWrapper, ContinuousTransformerWrapper, Decoder, Encoder
from x_transformers.continuous import GaussianNLL, sample_from_mean_variance
from x_transformers.errors import ConfigError, InputError, ShapeError

DIM, WIDTH = 16, 5
NETS = {
    "absolute": {},
    "rotary": {"rotary_pos_emb": True},
    "alibi": {"alibi_pos_bias": True, "net": {"use_abs_pos_emb": False}},
    "sinusoid": {"net": {"scaled_sinu_pos_emb": True}},
    "no positions": {"net": {"max_seq_len": None}},
    "memory tokens": {"rotary_pos_emb": True, "net": {"num_memory_tokens": 2}},
    "grouped heads": {"attn_kv_heads": 2, "rotary_pos_emb": True},
    "cross": {"cross_attend": True, "rotary_pos_emb": True},
}


def build(name: str = "rotary", depth: int = 2, stack: type = Decoder, **wrapper) -> ContinuousAutoregressiveWrapper:
    options = copy.deepcopy(NETS[name])
    around = {"max_seq_len": 24, "dim_in": WIDTH, "dim_out": WIDTH, **options.pop("net", {}), **wrapper.pop("net", {})}
    layers = stack(dim=DIM, depth=depth, heads=4, attn_dim_head=8, verbose=False, **options)
    return ContinuousAutoregressiveWrapper(
        perturb(ContinuousTransformerWrapper(attn_layers=layers, **around)), **wrapper
    )


def surroundings(name: str, batch: int = 2) -> dict:
    return {"context": torch.randn(batch, 4, DIM)} if name == "cross" else {}


PROBABILISTIC = {"probabilistic": True}


# small functions


def test_gaussian():
    mean, variance, y = torch.randn(3, 4), torch.rand(3, 4) + 0.1, torch.randn(3, 4)
    constant = 0.5 * math.log(2 * math.pi)
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(y) - constant
    torch.testing.assert_close(GaussianNLL()(torch.stack((mean, variance)), y), expected)
    assert GaussianNLL()(torch.zeros(2, 1), torch.zeros(1)).item() == pytest.approx(math.log(1e-6) / 2)


def test_samples():
    mean, variance = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.0])
    drawn = sample_from_mean_variance(mean.expand(20000, 2), variance.expand(20000, 2), temperature=0.5)
    torch.testing.assert_close(drawn.mean(dim=0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0), torch.tensor([1.0, math.sqrt(1e-5) / 2]), atol=0.03, rtol=0)


# the loss


@pytest.mark.parametrize("name", NETS)
def test_loss(name):
    model, x, kwargs = build(name), torch.randn(2, 8, WIDTH), surroundings(name)
    predicted = model.net(x[:, :-1], **kwargs)
    torch.testing.assert_close(model(x, **kwargs), (predicted - x[:, 1:]).square().mean())
    absolute = ContinuousAutoregressiveWrapper(model.net, use_l1_loss=True)
    torch.testing.assert_close(absolute(x, **kwargs), (predicted - x[:, 1:]).abs().mean())
    own = ContinuousAutoregressiveWrapper(model.net, loss_fn=lambda p, y: F.huber_loss(p, y, reduction="none"))
    torch.testing.assert_close(own(x, **kwargs), F.huber_loss(predicted, x[:, 1:]))


def test_the_longest_sequence():
    model, x = build("absolute"), torch.randn(1, 25, WIDTH)
    assert model(x).isfinite()  # the last one is only a target


def test_probabilistic_loss():
    model, x = build(net=PROBABILISTIC), torch.randn(2, 8, WIDTH)
    mean, variance = model.net(x[:, :-1])
    expected = 0.5 * (variance.log() + (x[:, 1:] - mean).square() / variance).mean()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("options", [{}, {"equal_loss_weight_batch": True}], ids=["", "equal rows"])
@pytest.mark.parametrize("net", [{}, PROBABILISTIC], ids=["", "probabilistic"])
def test_padding_is_not_scored(net, options):
    model, x, lens = build(net=net, **options), torch.randn(3, 8, WIDTH), torch.tensor([8, 5, 1])
    valid = torch.arange(8) < lens[:, None]
    terms, rows = [], []
    for row, length in enumerate(lens.tolist()):
        out = model.net(x[row : row + 1, : max(length - 1, 1)])[..., : length - 1, :]
        each = model.loss_fn(out[:, 0] if net else out[0], x[row, 1:length])
        terms.append(each)
        rows.append(each.sum() / max(length - 1, 1))
    expected = torch.stack(rows).mean() if options else torch.cat(terms).mean()
    for filler in (0.0, 7.0):
        padded = torch.where(valid[..., None], x, filler)
        for kwargs in ({"lens": lens}, {"mask": valid}):
            torch.testing.assert_close(model(padded, **kwargs), expected)
        shifted = torch.stack([row.roll(8 - length, 0) for row, length in zip(padded, lens.tolist(), strict=True)])
        torch.testing.assert_close(model(shifted, seq_start_pos=8 - lens), expected)


def test_a_mask_over_inputs_is_taken_as_it_is():
    model, x, mask = build(), torch.randn(2, 8, WIDTH), torch.arange(7) < torch.tensor([[7], [3]])
    errors = (model.net(x[:, :-1], mask=mask) - x[:, 1:]).square()
    torch.testing.assert_close(model(x, mask=mask), errors[mask].mean())


def test_arguments_of_single_positions_are_cut():
    model, x = build("absolute"), torch.randn(2, 8, WIDTH)
    extra, pos = torch.randn(2, 8, DIM), torch.arange(8).flip(0)
    expected = (model.net(x[:, :-1], sum_embeds=extra[:, :-1], pos=pos[:-1]) - x[:, 1:]).square().mean()
    torch.testing.assert_close(model(x, sum_embeds=extra, pos=pos), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_targets_that_do_not_count_give_a_zero_with_a_gradient(steps):
    model = build()
    loss = model(torch.randn(2, 4, WIDTH), rollout_steps=steps, lens=torch.tensor([1, 0]))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("net", [{}, PROBABILISTIC], ids=["", "probabilistic"])
def test_every_parameter_learns(net, steps):
    model = build("absolute", net={**net, "num_memory_tokens": 1}).double()
    model(torch.randn(6, 24, WIDTH, dtype=torch.float64), rollout_steps=steps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# roll-outs


def roll_out_by_hand(model, x, lens, steps, seed, **kwargs):
    torch.manual_seed(seed)
    u = torch.rand(len(x))
    losses = []
    for row, length in enumerate(lens):
        if length <= steps:
            continue
        first = 1 + int(u[row] * (length - steps))
        history = x[row : row + 1, :first]
        for r in range(steps):
            rows = {name: t[row : row + 1] for name, t in kwargs.items()}
            new = model.net(history, **rows)[:, -1:]
            losses.append((new[0, 0] - x[row, first + r]).square())
            history = torch.cat((history, new), dim=1)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_roll_outs(name, cached, monkeypatch):
    model, x, kwargs = build(name), torch.randn(4, 8, WIDTH), surroundings(name, 4)
    if not cached:
        monkeypatch.setattr(ContinuousTransformerWrapper, "can_cache_kv", False)
    for lens in (None, [8, 4, 2, 3]):
        expected = roll_out_by_hand(model, x, lens or [8] * 4, 3, 5, **kwargs)
        given = {} if lens is None else {"lens": torch.tensor(lens)}
        torch.manual_seed(5)
        loss = model(x, rollout_steps=3, **given, **kwargs)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_what_was_appended():
    model, x = build(), torch.randn(1, 3, WIDTH)
    seen = []
    hook = model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x, rollout_steps=2).backward()
    hook.remove()
    assert len(seen) == 2
    assert seen[1].requires_grad


def test_roll_outs_of_a_probabilistic_model_are_samples():
    model, x = build(net=PROBABILISTIC), torch.randn(2, 6, WIDTH)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(x, rollout_steps=5).item())  # there is one place to cut only
    assert losses[0] == losses[1] != losses[2]


# generation


@pytest.mark.parametrize("net", [{}, PROBABILISTIC], ids=["", "probabilistic"])
@pytest.mark.parametrize("name", NETS)
def test_caches_agree_and_ragged_prompts_equal_single_ones(name, net):
    model, x, kwargs = build(name, net=net), torch.randn(3, 5, WIDTH), surroundings(name, 3)
    out = {}
    for lens in (None, (5, 2, 3)):
        for cached in (True, False):
            torch.manual_seed(1)
            out[lens, cached] = model.generate(x, 6, cache_kv=cached, prompt_lens=lens, **kwargs)
        torch.testing.assert_close(out[lens, True], out[lens, False], atol=2e-5, rtol=1e-4)
    together = model.generate(x, 6, temperature=0.0, prompt_lens=(5, 2, 3), **kwargs)
    for row, length in enumerate((5, 2, 3)):
        rows = {name: t[row : row + 1] for name, t in kwargs.items()}
        alone = model.generate(x[row, :length], 6, temperature=0.0, **rows)
        assert alone.shape == (6, WIDTH)
        torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-4)


def test_generated_vectors_are_predictions():
    model, x = build().train(), torch.randn(2, 4, WIDTH)
    new = model.generate(x, 5)
    assert model.training
    whole = torch.cat((x, new), dim=1)
    torch.testing.assert_close(model.eval().net(whole)[:, 3:-1], new, atol=2e-5, rtol=1e-4)
    model(new).backward()  # they may be trained with
    assert model.generate(x, 0).shape == (2, 0, WIDTH)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["rotary", "memory tokens", "cross"])
def test_streams_are_what_is_generated(name, cached):
    model, x, kwargs = build(name, net=PROBABILISTIC).train(), torch.randn(3, 5, WIDTH), surroundings(name, 3)
    given = {"cache_kv": cached, "prompt_lens": (5, 2, 3), "temperature": 0.7, **kwargs}
    torch.manual_seed(1)
    wanted = model.generate(x, 6, **given)
    torch.manual_seed(1)
    stream = model.stream(x, 6, **given)
    assert model.training
    first = next(stream)
    assert model.training
    assert not first.is_inference()
    assert torch.equal(torch.stack([first, *stream], dim=1), wanted)
    assert model.training
    assert list(model.stream(x, 0, **kwargs)) == []


def test_streams_of_one_row_that_are_let_go_or_trained_with():
    model, x = build(net={"max_seq_len": 6}).train(), torch.randn(4, WIDTH)
    vectors = list(model.stream(x, 5))
    assert torch.equal(torch.stack(vectors), model.generate(x, 5))
    model(torch.stack(vectors)[None]).backward()
    next(abandoned := model.stream(x, 5))
    abandoned.close()
    assert model.training


@pytest.mark.parametrize("name", ["absolute", "rotary", "memory tokens"])
def test_the_window(name):
    model, x = build(name, depth=1, net={"max_seq_len": 6}).eval(), torch.randn(2, 4, WIDTH)
    new = model.generate(x, 8, cache_kv=False)
    whole = torch.cat((x, new), dim=1)
    for step in range(8):
        seen = whole[:, max(4 + step - 6, 0) : 4 + step]
        torch.testing.assert_close(model.net(seen)[:, -1], new[:, step], atol=2e-5, rtol=1e-4)
    cached = model.generate(x, 8)
    assert cached.isfinite().all()
    if name != "memory tokens":  # one layer deep and where only distances matter, a rolling cache is exact
        torch.testing.assert_close(cached, new, atol=2e-5, rtol=1e-4)


def test_masks_go_on():
    model, x = build(), torch.randn(2, 5, WIDTH)
    mask = torch.tensor([[True, False, True, True, True], [True] * 5])
    other = x.clone()
    other[0, 1] = 9.0
    torch.testing.assert_close(model.generate(x, 5, mask=mask), model.generate(other, 5, mask=mask))
    torch.testing.assert_close(
        model.generate(x, 5, mask=mask), model.generate(x, 5, mask=mask, cache_kv=False), atol=2e-5, rtol=1e-4
    )


def test_a_bidirectional_net_is_not_cached():
    model = build(stack=Encoder)
    assert model.generate(torch.randn(2, 3, WIDTH), 4).shape == (2, 4, WIDTH)
    assert model(torch.randn(2, 6, WIDTH), rollout_steps=2).isfinite()


def test_temperature():
    model, x = build(net=PROBABILISTIC), torch.randn(2, 3, WIDTH)
    mean = model.eval().net(x)[0, :, -1:]
    assert torch.equal(model.generate(x, 1, temperature=0.0), mean)
    far, near = (
        (model.generate(x.repeat(50, 1, 1), 1, temperature=t) - mean.repeat(50, 1, 1)).std() for t in (1.0, 0.1)
    )
    assert near < far / 5


def test_round_trips():
    model, x = build("memory tokens", net=PROBABILISTIC, equal_loss_weight_batch=True), torch.randn(2, 6, WIDTH)
    copied = ContinuousAutoregressiveWrapper.from_config(model.config)
    copied.load_state_dict(model.state_dict())
    assert all(key.startswith("net.") for key in model.state_dict())
    torch.testing.assert_close(copied(x), model(x))


def test_low_precision():
    model, x = build(net=PROBABILISTIC), torch.randn(2, 9, WIDTH)
    lens = torch.tensor([9, 4])
    expected = model(x, lens=lens).item()
    loss = model.bfloat16()(x.bfloat16(), lens=lens)
    assert loss.dtype is torch.float32
    assert abs(loss.item() - expected) < 0.1
    assert model.generate(x.bfloat16(), 3).dtype is torch.bfloat16


# refusals


def test_bad_options():
    net = build().net
    stack = Decoder(dim=DIM, depth=1, heads=2)
    with pytest.raises(ConfigError, match="`net` is a Decoder"):
        ContinuousAutoregressiveWrapper(stack)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`use_l1_loss` and `loss_fn` are two losses"):
        ContinuousAutoregressiveWrapper(net, loss_fn=F.mse_loss, use_l1_loss=True)
    with pytest.raises(ConfigError, match="a probabilistic `net` are two losses"):
        build(net=PROBABILISTIC, use_l1_loss=True)
    with pytest.raises(ConfigError, match="average_pool_embed"):
        build(net={"average_pool_embed": True})


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"rollout_steps": 0}, InputError, "`rollout_steps` is 0"),
        ({"prepend_embeds": torch.zeros(2, 1, DIM)}, InputError, "`prepend_embeds` cannot be passed to the loss"),
        ({"return_mems": True}, InputError, "`return_mems` cannot be passed"),
        ({"lens": torch.tensor([1])}, ShapeError, "2 whole numbers"),
        ({"mask": torch.ones(2, 4).bool()}, ShapeError, r"`mask` has shape \(2, 4\); it must be \(2, 8\)"),
        ({"mask": torch.ones(2, 8).bool(), "lens": torch.tensor([1, 2])}, InputError, "pass one of them"),
        ({"rollout_steps": 2, "pos": torch.arange(8)}, InputError, "which roll-outs move"),
        ({"rollout_steps": 2, "mask": torch.ones(2, 7).bool()}, ShapeError, r"`mask` has shape \(2, 7\)"),
        (
            {"rollout_steps": 2, "mask": torch.ones(2, 8).bool(), "lens": torch.tensor([1, 2])},
            InputError,
            "one of them",
        ),
    ],
)
def test_bad_input_of_the_loss(kwargs, error, said):
    with pytest.raises(error, match=said):
        build()(torch.randn(2, 8, WIDTH), **kwargs)


def test_bad_input():
    model, x = build(), torch.randn(2, 3, WIDTH)
    with pytest.raises(ShapeError, match=r"`loss_fn` returns a tensor of shape \(\)"):
        build(loss_fn=F.mse_loss)(x)
    narrow = build(net={"dim_out": 3})
    with pytest.raises(ShapeError, match="width 3 and x has 5"):
        narrow(x)
    with pytest.raises(InputError, match="returns vectors of width 3 and reads vectors of width 5"):
        narrow.generate(x, 2)
    for kwargs, said in (
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"prompt_lens": [0, 3]}, r"`prompt_lens` holds \[0, 3\]"),
        ({"lens": torch.tensor([1, 2])}, "pass `prompt_lens`"),
        ({"seq_start_pos": torch.tensor([1, 2])}, "give `prompt_lens`"),
    ):
        for refusing in (model.generate, model.stream):
            with pytest.raises(InputError, match=said):
                refusing(x, 2, **kwargs)
    own = build(net={"dim_out": None, "project_out": torch.nn.Linear(DIM, 3)})
    for refusing in (model.generate, model.stream):  # streams refuse at once, but for what they cannot know
        with pytest.raises(InputError, match="`seq_len` is -1"):
            refusing(x, -1)
        with pytest.raises(ShapeError, match="with at least one vector"):
            refusing(Tensor(2, 0, WIDTH), 2)
        with pytest.raises(ShapeError, match="reads vectors of width 5"):
            refusing(x[..., 1:], 2)
    with pytest.raises(InputError, match="returns vectors of width 3 and reads vectors of width 5"):
        narrow.stream(x, 2)
    for begun in (lambda: own.generate(x, 2), lambda: next(own.stream(x, 2))):
        with pytest.raises(InputError, match="returns vectors of width 3 and reads vectors of width 5"):
            begun()
