"""Masked training and sampling: the loss by hand from logits, weights that are positive, results without masks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from catalog import perturb
from torch import Tensor

from x_transformers import Decoder, Encoder, NonAutoregressiveWrapper, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.nonautoregressive_wrapper import (
    SelfCritic,
    cosine_schedule,
    get_mask_subset_prob,
    gumbel_sample,
    linear_schedule,
    top_k,
)

VOCAB, DIM, SIZE, MASK = 12, 16, 8, 11


def net(dim: int = DIM, **options) -> TransformerWrapper:
    layers = options.pop("layers", {})
    stack = Encoder(dim=dim, depth=2, heads=2, attn_dim_head=8, verbose=False, **layers)
    return perturb(TransformerWrapper(num_tokens=VOCAB, max_seq_len=SIZE, attn_layers=stack, **options))


def build(**options) -> NonAutoregressiveWrapper:
    around = options.pop("net", {})
    return NonAutoregressiveWrapper(net(**around), mask_id=MASK, **options)


PLAIN = {"no_replace_prob": 0.0, "random_token_prob": 0.0}


def ids(batch: int = 4) -> Tensor:
    return torch.randint(0, MASK, (batch, SIZE))


def draws(seed: int, batch: int, fraction) -> tuple[Tensor, Tensor]:
    """The times and masked places that a loss draws first."""
    torch.manual_seed(seed)
    t, noise = torch.rand(batch), torch.rand(batch, SIZE)
    masked = torch.zeros(batch, SIZE, dtype=torch.bool)
    for row in range(batch):
        count = max(fraction(t[row]).item() * SIZE, 1)
        for rank, place in enumerate(noise[row].argsort().tolist()):
            masked[row, place] = rank < count
    return t, masked


# small functions


def test_schedules():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(linear_schedule(t), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(cosine_schedule(t), torch.tensor([1.0, math.sqrt(0.5), 0.0]))


def test_top_k():
    out = top_k(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), thres=0.5)
    assert out.tolist() == [[-math.inf, 3.0, 2.0, -math.inf]]
    assert (top_k(torch.randn(2, 3, 10)) > -math.inf).sum(dim=-1).tolist() == [[1] * 3] * 2
    with pytest.raises(InputError, match="`thres` is 1"):
        top_k(torch.zeros(3), thres=1.0)


def test_parts_of_a_mask():
    mask = torch.tensor([[True] * 8, [True, False] * 4, [False] * 8])
    part = get_mask_subset_prob(mask, 0.5)
    assert part.sum(dim=-1).tolist() == [4, 2, 0]
    assert not (part & ~mask).any()
    assert get_mask_subset_prob(mask, 0.0, min_mask=1).sum(dim=-1).tolist() == [1, 1, 0]
    assert get_mask_subset_prob(mask, torch.tensor([1.0, 0.26, 1.0])).sum(dim=-1).tolist() == [8, 2, 0]


def test_gumbel_sample():
    logits = torch.tensor([0.5, 0.2, 0.3]).log()
    share = gumbel_sample(logits.expand(20000, 3)).bincount(minlength=3) / 20000
    torch.testing.assert_close(share, logits.exp(), atol=0.015, rtol=0)
    assert gumbel_sample(logits.expand(50, 3), temperature=0.0).tolist() == [0] * 50
    assert gumbel_sample(logits.expand(2, 3).T, temperature=1e-6, dim=0).tolist() == [0, 0]


# the loss

WEIGHTS = {
    "linear": lambda t: 1 / (1 - t),
    "cosine": lambda t: math.pi / 2 * torch.tan(math.pi / 2 * t),
    "squared": lambda t: 2 / (1 - t),
}
FRACTIONS = {"linear": linear_schedule, "cosine": cosine_schedule, "squared": lambda t: (1 - t) ** 2}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("schedule", FRACTIONS)
def test_loss(schedule, weighted):
    given = schedule if schedule != "squared" else FRACTIONS[schedule]
    model, x = build(schedule=given, use_simple_mdlm_loss_weight=weighted, **PLAIN), ids()
    t, masked = draws(3, 4, FRACTIONS[schedule])
    torch.manual_seed(3)
    losses = model(x)
    logits = model.net(x.masked_fill(masked, MASK)).log_softmax(dim=-1)
    terms = []
    for row in range(4):
        weight = WEIGHTS[schedule](t[row]) if weighted else 1.0
        terms += [-logits[row, place, x[row, place]] * weight for place in masked[row].nonzero().flatten()]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(losses.loss, expected, atol=1e-5, rtol=1e-4)
    assert losses.loss > 0
    assert losses.critic_loss is None
    assert losses.generator_loss is losses.loss


def test_the_default_loss_gets_smaller_as_predictions_get_better():
    model, x = build(), ids(16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def wrong() -> float:
        torch.manual_seed(0)
        return build_plain(model)(x).loss.item()

    before = wrong()
    for _ in range(30):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    assert wrong() < before


def build_plain(model) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(model.net, mask_id=MASK, use_simple_mdlm_loss_weight=False, **PLAIN)


def test_some_are_shown_as_they_are_and_some_as_others(monkeypatch):
    model, x, seen = build(no_replace_prob=0.5, random_token_prob=0.5, net={"layers": {}}), ids(), []
    model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    kinds = set()
    for seed in range(24):
        _, masked = draws(seed, 4, linear_schedule)
        torch.manual_seed(seed)
        model(x)
        shown = seen[-1]
        assert torch.equal(shown[~masked], x[~masked])
        hidden = shown == MASK
        kept = masked & (shown == x)
        other = masked & ~hidden & ~kept
        kinds.add((bool(kept.any()), bool(other.any())))
    assert kinds >= {(False, False), (True, True)}


def test_log_probabilities():
    model, x = build(net={"mixture_of_softmax": True}, use_simple_mdlm_loss_weight=False, **PLAIN), ids()
    _, masked = draws(1, 4, linear_schedule)
    torch.manual_seed(1)
    loss = model(x).loss
    picked = model.net(x.masked_fill(masked, MASK)).gather(-1, x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(loss, -picked[masked].mean())


def test_padding_is_neither_masked_nor_scored():
    model, x = build(use_simple_mdlm_loss_weight=False), ids()
    valid = torch.arange(SIZE) < torch.tensor([[8], [5], [3], [1]])
    losses = []
    for filler in (0, 5):
        torch.manual_seed(4)
        losses.append(model(torch.where(valid, x, filler), mask=valid).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_weights_under_inference():
    model, x = build(), ids()
    with torch.inference_mode():
        assert model(x).loss > 0


@pytest.mark.parametrize(
    "options", [{}, {"self_cond": True}, {"self_token_critic": True}, {"self_cond": True, "net": {"emb_dim": 12}}]
)
def test_every_parameter_learns(options):
    model, x = build(self_cond_train_prob=0.5, **options).double(), ids()
    for _ in range(6):  # self-conditioning reads the learned vector in some batches only
        model(x).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# self-conditioning


@pytest.mark.parametrize("always", [False, True])
def test_self_conditioning(always):
    model = build(self_cond=True, self_cond_train_prob=float(always), use_simple_mdlm_loss_weight=False, **PLAIN)
    x = ids()
    _, masked = draws(2, 4, linear_schedule)
    torch.manual_seed(2)
    loss = model(x).loss
    shown = x.masked_fill(masked, MASK)
    condition = model.to_self_cond(model.null_embed.expand(4, SIZE, -1))
    if always:
        condition = model.to_self_cond(model.net(shown, sum_embeds=condition, return_embeddings=True).detach())
    logits = model.net(shown, sum_embeds=condition)
    torch.testing.assert_close(loss, F.cross_entropy(logits[masked], x[masked]))


# critics


def critic(**options) -> TransformerWrapper:
    return net(logits_dim=1, **options)


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_token_critic(squeezed):
    model = build(token_critic=critic(squeeze_out_last_dim=squeezed), critic_loss_weight=0.3, **PLAIN)
    x = ids()
    _, masked = draws(2, 4, linear_schedule)
    torch.manual_seed(2)
    losses = model(x, generator_sample_temperature=0.0)
    likely = model.net(x.masked_fill(masked, MASK)).argmax(dim=-1)
    filled = torch.where(masked, likely, x)
    judged = model.token_critic(filled).reshape(4, SIZE)
    expected = F.binary_cross_entropy_with_logits(judged, (filled != x).float())
    torch.testing.assert_close(losses.critic_loss, expected)
    torch.testing.assert_close(losses.loss, losses.generator_loss + 0.3 * expected)


@pytest.mark.parametrize("own", [False, True])
def test_what_is_trained(own):
    model = build(self_token_critic=True) if own else build(token_critic=critic())
    x = ids()
    losses = model(x, only_train_generator=True)
    assert losses.critic_loss is None
    losses.loss.backward()
    head = list(model.token_critic.to_logits.parameters())
    assert all(p.grad is None for p in head)
    model.zero_grad()
    losses = model(x, only_train_critic=True)
    assert losses.generator_loss is None
    assert losses.loss is losses.critic_loss
    losses.loss.backward()
    assert all(p.grad is None for p in model.net.parameters())
    assert all(p.grad.any() for p in head)


# generation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "cosine"},
        {"schedule": lambda t: 0.9 - 0.5 * t},
        {"steps": 1},
        {"steps": 30},
        {"self_cond": True, "net": {"emb_dim": 12}},
        {"can_mask_prev_unmasked": True},
        {"self_token_critic": True},
        {"net": {"num_memory_tokens": 2}},
        {"net": {"mixture_of_softmax": True}},
    ],
)
def test_generation_ends_without_masks(options):
    model = build(**options)
    with torch.no_grad():
        model.net.to_logits.weight[MASK] = 9.0  # a model that would love to say it
    tokens = model.train().generate(batch_size=5)
    assert tokens.shape == (5, SIZE)
    assert (tokens != MASK).all()
    assert model.training
    assert model.generate(start_temperature=0.0, filter_thres=None).shape == (SIZE,)


@pytest.mark.parametrize("again", [False, True])
def test_fewer_and_fewer_places_are_masked(again):
    model, seen = build(steps=4, can_mask_prev_unmasked=again, schedule="cosine"), []
    model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0] == MASK))
    model.generate(batch_size=3)
    counts = [math.floor(math.cos(math.pi / 2 * i / 4) * SIZE) for i in range(4)]
    assert [mask.sum(dim=-1).tolist() for mask in seen] == [[count] * 3 for count in counts]
    back = [bool((after & ~before).any()) for before, after in itertools.pairwise(seen)]
    assert any(back) == again


def test_the_surest_tokens_stay():
    model, seen = build(steps=2), []
    model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = model.eval().generate(batch_size=2, start_temperature=0.0, filter_thres=None)
    logits = model.net(seen[0]).index_fill(-1, torch.tensor(MASK), -math.inf)
    sure, likely = logits.softmax(dim=-1).max(dim=-1)
    for row in range(2):
        kept = sure[row].topk(SIZE // 2).indices
        assert set((seen[1][row] != MASK).nonzero().flatten().tolist()) == set(kept.tolist())
        assert torch.equal(tokens[row, kept], likely[row, kept])


def test_a_context_reaches_model_and_critic():
    layers = {"cross_attend": True}
    model = build(net={"layers": layers}, token_critic=critic(layers=layers))
    x, context = ids(2), torch.randn(2, 3, DIM)
    torch.manual_seed(0)
    one = model(x, context=context)
    torch.manual_seed(0)
    other = model(x, context=context + torch.randn(2, 3, DIM))
    assert one.generator_loss != other.generator_loss
    assert one.critic_loss != other.critic_loss
    assert model.generate(2, context=context).shape == (2, SIZE)


def test_seeds_repeat_and_dropout_is_off():
    model = build(net={"layers": {"ff_dropout": 0.5}}).train()
    out = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out.append(model.generate(4))
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


def test_round_trips():
    model, x = build(self_cond=True, self_token_critic=True, schedule="cosine", steps=5), ids()
    assert {"null_embed", "to_self_cond.weight", "token_critic.to_logits.weight"} < set(model.state_dict())
    assert {key.split(".")[1] for key in model.state_dict() if key.startswith("token_critic.")} == {"net", "to_logits"}
    copied = NonAutoregressiveWrapper.from_config(model.config)
    assert isinstance(copied.token_critic, SelfCritic)
    assert copied.token_critic.net is copied.net
    copied.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    expected = model(x).loss
    torch.manual_seed(0)
    torch.testing.assert_close(copied(x).loss, expected)


def test_low_precision():
    model, x = build(self_token_critic=True, self_cond=True).bfloat16(), ids()
    loss = model(x).loss
    assert loss.dtype is torch.float32
    assert loss.isfinite()
    assert model.generate(2).shape == (2, SIZE)


def test_the_loss_compiles_to_one_graph():
    model, x = build(use_simple_mdlm_loss_weight=False), ids()
    fn = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = model(x).loss
    torch.manual_seed(0)
    torch.testing.assert_close(fn(x).loss, expected)


# refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_id": VOCAB}, "`mask_id` is 12; the vocabulary runs from 0 to 11"),
        ({"steps": 0}, "`steps` is 0"),
        ({"self_cond_train_prob": 1.5}, "`self_cond_train_prob` is 1.5"),
        ({"schedule": "linaer"}, "`schedule` is 'linaer'; .* Did you mean `linear`"),
        ({"schedule": lambda t: t}, "falls from at most 1"),
        ({"schedule": lambda t: 2 - t}, "from 2 to 1"),
        ({"token_critic": torch.nn.Linear(1, 1), "self_token_critic": True}, "two critics; choose one"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        NonAutoregressiveWrapper(net(), **{"mask_id": MASK, **options})


def test_nets_that_cannot_be_wrapped():
    stack = Decoder(dim=8, depth=1, heads=1)
    with pytest.raises(ConfigError, match="`net` is a Decoder"):
        NonAutoregressiveWrapper(stack, mask_id=0)  # type: ignore[arg-type]
    for options, said in (
        ({"return_only_embed": True}, "logits for each token"),
        ({"average_pool_embed": True}, "without pooling"),
        ({"max_seq_len": 0}, "`max_seq_len` of `net` is 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            NonAutoregressiveWrapper(
                TransformerWrapper(**{"num_tokens": 9, "max_seq_len": 8, "attn_layers": stack, **options}), mask_id=0
            )


def test_bad_input():
    model = build()
    with pytest.raises(ShapeError, match="x has 5 tokens; it must have `max_seq_len` = 8"):
        model(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(InputError, match="leave nothing to train"):
        model(ids(), only_train_critic=True, only_train_generator=True)
    with pytest.raises(InputError, match="needs a critic"):
        model(ids(), only_train_critic=True)
    with pytest.raises(InputError, match="carries self-conditioning"):
        build(self_cond=True)(ids(), sum_embeds=torch.zeros(4, SIZE, DIM))
    with pytest.raises(ShapeError, match=r"`mask` has shape \(4, 3\)"):
        model(ids(), mask=torch.ones(4, 3).bool())
    with pytest.raises(ShapeError, match="`logits_dim = 1`"):
        build(token_critic=net())(ids())
    for name, value in (("batch_size", 0), ("start_temperature", -1.0), ("filter_thres", 1.0)):
        with pytest.raises(InputError, match=f"`{name}` is {value}"):
            model.generate(**{name: value})
