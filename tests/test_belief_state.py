"""Pairs of states: the loss pair by pair, lengths, weights and distances, generation towards a suffix."""

import copy

import pytest
import torch
import torch.nn.functional as F
from catalog import perturb
from torch import Tensor

from x_transformers import BeliefStateWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError

VOCAB, DIM = 12, 16
NETS = {
    "absolute": {},
    "rotary": {"layers": {"rotary_pos_emb": True}},
    "memory tokens": {"num_memory_tokens": 2},
    "factorized": {"emb_dim": 10},
}


def net(dim: int = DIM, max_seq_len: int = 12, stack: type = Decoder, **options) -> TransformerWrapper:
    layers = stack(dim=dim, depth=1, heads=2, attn_dim_head=8, verbose=False, **options.pop("layers", {}))
    return TransformerWrapper(**{"num_tokens": VOCAB, "max_seq_len": max_seq_len, "attn_layers": layers} | options)


def build(name: str = "rotary", *, apart: bool = False, **options) -> BeliefStateWrapper:
    around = copy.deepcopy(NETS[name]) | options.pop("net", {})
    other = {"backward_decoder": net(**copy.deepcopy(around))} if apart else {}
    return perturb(BeliefStateWrapper(net(**around), **other, **options))


def state_pairs(model, row: Tensor):
    """For one row without padding: i, j, and the states of what was read, each from a pass of its own."""
    n, end = len(row), model.suffix_token[None, None]
    for i in range(n):
        for j in range(i + 2, n + 1):
            f = model.forward_decoder(row[None, : i + 1], return_embeddings=True)[0, -1]
            behind = row[None, j:].flip(1)
            g = model.backward_decoder(behind, prepend_embeds=end, return_embeddings=True)[0, -1]
            yield i, j, torch.cat((f, g))


def terms(model, row: Tensor, scale=lambda distance: 1.0) -> list[tuple[int, int, Tensor, Tensor]]:
    out = []
    for i, j, state in state_pairs(model, row):
        u, v = model.text_head(state * scale(j - i)).chunk(2)
        out.append((i, j, F.cross_entropy(u, row[i + 1]), F.cross_entropy(v, row[j - 1])))
    return out


@pytest.mark.parametrize("apart", [False, True], ids=["", "two decoders"])
@pytest.mark.parametrize("name", NETS)
def test_loss(name, apart):
    model, seq = build(name, apart=apart), torch.randint(0, VOCAB, (2, 5))
    both = [loss for row in seq for *_, a, b in terms(model, row) for loss in (a, b)]
    assert len(both) == 2 * 2 * 10
    torch.testing.assert_close(model(seq), torch.stack(both).mean(), atol=1e-5, rtol=1e-4)


def test_lengths():
    model, seq = build(apart=True), torch.randint(0, VOCAB, (4, 6))
    lens = torch.tensor([6, 4, 2, 0])
    both = [
        loss
        for row, length in zip(seq, lens.tolist(), strict=True)
        for *_, a, b in terms(model, row[:length])
        for loss in (a, b)
    ]
    expected = torch.stack(both).mean()
    for filler in (0, -1, 5):
        padded = torch.where(torch.arange(6) < lens[:, None], seq, filler)
        torch.testing.assert_close(model(padded, lens=lens), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(seq, lens=torch.full((4,), 6)), model(seq))


def test_weights():
    model, seq = build(backward_ar_loss_weight=0.3), torch.randint(0, VOCAB, (2, 5))
    found = [term for row in seq for term in terms(model, row)]
    expected = torch.stack([a + 0.3 * b for *_, a, b in found]).sum() / (2 * len(found))
    torch.testing.assert_close(model(seq), expected, atol=1e-5, rtol=1e-4)
    by_distance = torch.stack([(a + 0.3 * b) * (j - i) for i, j, a, b in found]).sum() / (2 * len(found))
    given = model(seq, loss_weight_by_fb_indices=lambda pairs: pairs[:, 1] - pairs[:, 0])
    torch.testing.assert_close(given, by_distance, atol=1e-5, rtol=1e-4)
    by_both = torch.stack([a * i + 0.3 * b * j for i, j, a, b in found]).sum() / (2 * len(found))
    torch.testing.assert_close(model(seq, loss_weight_by_fb_indices=lambda pairs: pairs), by_both, atol=1e-5, rtol=1e-4)
    alike = build()
    alike.load_state_dict(model.state_dict())
    alike.loss_weights.fill_(1.0)
    doubled = alike(seq, loss_weight_by_fb_indices=lambda pairs: torch.full((len(pairs),), 2.0))
    torch.testing.assert_close(doubled, alike(seq) * 2)  # used where both directions weigh alike, too


def test_a_fraction_of_the_pairs():
    model, seq, seen = build(train_frac_forward_backward_pairs=0.35), torch.randint(0, VOCAB, (2, 5)), []

    def ones(pairs):
        seen.append(pairs)
        return torch.ones(len(pairs))

    model(seq, loss_weight_by_fb_indices=ones)
    model(seq, loss_weight_by_fb_indices=ones)
    assert [len(pairs) for pairs in seen] == [3, 3]  # of ten
    assert not torch.equal(*seen)
    assert all((pairs[:, 1] - pairs[:, 0] >= 2).all() for pairs in seen)
    model(seq[:, :2], loss_weight_by_fb_indices=ones)
    assert len(seen[-1]) == 1


@pytest.mark.parametrize("most", [None, 4])
def test_distances_are_predicted(most):
    model = build(pred_distance=True, pred_distance_loss_weight=0.4, max_pred_distance=most)
    seq, lens = torch.randint(0, VOCAB, (2, 6)), torch.tensor([6, 4])
    plain = build()
    plain.load_state_dict({k: t for k, t in model.state_dict().items() if "distance" not in k})
    errors = []
    for row, length in zip(seq, lens.tolist(), strict=True):
        for i, j, state in state_pairs(model, row[:length]):
            target = torch.tensor(min(j - i, (most or 12) - 1))
            errors.append(F.cross_entropy(model.to_distance_logits(state), target))
    expected = plain(seq, lens=lens) + 0.4 * torch.stack(errors).mean()
    torch.testing.assert_close(model(seq, lens=lens), expected, atol=1e-5, rtol=1e-4)


def test_distances_condition_the_text_head():
    model, seq = build(cond_on_distance=True, pred_distance=True), torch.randint(0, VOCAB, (2, 5))
    both = [
        loss
        for row in seq
        for *_, a, b in terms(model, row, lambda distance: model.to_distance_cond(torch.tensor(float(distance))))
        for loss in (a, b)
    ]
    told = torch.stack(both).mean()
    losses = []
    for seed in range(8):
        torch.manual_seed(seed)
        losses.append((bool(torch.rand(()) < 0.5), seed))
    assert {drawn for drawn, _ in losses} == {False, True}
    for drawn, seed in losses:
        torch.manual_seed(seed)
        assert torch.isclose(model(seq), told, atol=1e-5) == drawn


@pytest.mark.parametrize("apart", [False, True], ids=["", "two decoders"])
def test_every_parameter_learns(apart):
    model = build("absolute", apart=apart, pred_distance=True, cond_on_distance=True).double()
    for _ in range(12):
        model(torch.randint(0, VOCAB, (2, 12))).backward()
    for name, p in model.named_parameters():
        if "to_logits" in name and "distance" not in name:
            continue  # the decoders' own heads have no part in this
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


def test_a_row_of_one_token_is_a_zero_with_a_gradient():
    loss = build(pred_distance=True)(torch.tensor([[3, 4, 5]]), lens=torch.tensor([1]))
    assert loss.item() == 0
    loss.backward()


def test_round_trips():
    model, seq = build(apart=True, pred_distance=True, cond_on_distance=True), torch.randint(0, VOCAB, (2, 5))
    names = set(model.state_dict())
    assert {
        "suffix_token",
        "loss_weights",
        "text_head.0.weight",
        "text_head.2.bias",
        "to_distance_logits.2.weight",
        "to_distance_cond.1.weight",
        "to_distance_cond.3.bias",
    } < names
    twin = BeliefStateWrapper.from_config(model.config)
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    expected = model(seq)
    torch.manual_seed(0)
    torch.testing.assert_close(twin(seq), expected)
    assert build().backward_decoder is not model.backward_decoder
    assert copy.deepcopy(build()).forward_decoder is not None


def test_low_precision():
    model, seq = build(), torch.randint(0, VOCAB, (2, 6))
    expected = model(seq).item()
    loss = model.bfloat16()(seq)
    assert loss.dtype is torch.float32
    assert abs(loss.item() - expected) < 0.1
    assert model.generate_with_suffix_cond(seq, 3).shape == (2, 3)


# generation


@torch.no_grad()
def greedy(model, prompt, seq_len, suffix=(), window=None):
    """Token by token, one pass each."""
    end, suffix = model.suffix_token[None, None], torch.tensor(suffix, dtype=torch.long)
    g = model.backward_decoder(suffix.flip(0)[None], prepend_embeds=end, return_embeddings=True)[0, -1]
    new = []
    for _ in range(seq_len):
        ids = torch.cat((prompt, torch.tensor(new, dtype=torch.long)))[-(window or 99) :]
        f = model.forward_decoder(ids[None], return_embeddings=True)[0, -1]
        new.append(model.text_head(torch.cat((f, g))).chunk(2)[0].argmax().item())
    return new


@pytest.mark.parametrize("cache_kv", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("name", NETS)
def test_generation_leads_to_the_suffix(name, cache_kv):
    model = build(name, apart=True).train()
    prompts = [torch.randint(0, VOCAB, (n,)) for n in (4, 2)]
    options = {"temperature": 0.0, "cache_kv": cache_kv}
    for suffix in (None, torch.tensor([3, 5, 1])):
        out = model.generate_with_suffix_cond(prompts, 6, suffix=suffix, **options)
        assert model.training
        model.eval()
        assert out.tolist() == [greedy(model, p, 6, [] if suffix is None else [3, 5, 1]) for p in prompts]
        model.train()
    each = torch.tensor([[3, 5], [0, 7]])
    out = model.generate_with_suffix_cond(torch.stack([prompts[0]] * 2), 5, suffix=each, **options)
    model.eval()
    assert out.tolist() == [greedy(model, prompts[0], 5, row) for row in each.tolist()]
    assert torch.equal(model.generate_with_suffix_cond(prompts[0], 5, suffix=each[0], **options), out[0])


@pytest.mark.parametrize("name", ["absolute", "rotary"])
def test_the_window(name):
    model, prompt = build(name, net={"max_seq_len": 6}).eval(), torch.randint(0, VOCAB, (4,))
    out = model.generate_with_suffix_cond(prompt, 8, temperature=0.0)
    assert out.tolist() == greedy(model, prompt, 8, window=6)
    backwards = model.generate_with_suffix_cond(prompt, 8, temperature=0.0, decode_backwards=True)
    assert backwards.shape == (8,)


@pytest.mark.parametrize("cache_kv", [False, True], ids=["", "cached"])
def test_decoding_backwards(cache_kv):
    model = build(apart=True).eval()
    prompts = [torch.randint(0, VOCAB, (n,)) for n in (4, 2)]
    torch.manual_seed(6)
    out = model.generate_with_suffix_cond(prompts, 5, temperature=0.0, decode_backwards=True, cache_kv=cache_kv)
    torch.manual_seed(6)
    start = torch.randint(VOCAB, (2, 1))
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            f = model.forward_decoder(start[row : row + 1], return_embeddings=True)[0, -1]
            read = prompt.flip(0)
            for token in out[row]:
                end = model.suffix_token[None, None]
                g = model.backward_decoder(read[None], prepend_embeds=end, return_embeddings=True)[0, -1]
                assert model.text_head(torch.cat((f, g))).chunk(2)[1].argmax() == token
                read = torch.cat((read, token[None]))


def test_filters_and_seeds():
    model, x, draws = build(), torch.randint(0, VOCAB, (2, 3)), []
    for seed, cache_kv in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        draws.append(model.generate_with_suffix_cond(x, 9, cache_kv=cache_kv, filter_logits_fn="top_p"))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    one = model.generate_with_suffix_cond(x, 4, filter_logits_fn="top_k", filter_kwargs={"k": 1})
    assert torch.equal(one, model.generate_with_suffix_cond(x, 4, temperature=0.0))


# refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_frac_forward_backward_pairs": 0.0}, r"is 0.0; it must lie in \(0, 1\]"),
        ({"cond_on_distance_prob": 1.0}, "`cond_on_distance_prob` is 1.0"),
        ({"max_pred_distance": 4}, "set `pred_distance = True`"),
        ({"pred_distance": True, "max_pred_distance": 1}, "`max_pred_distance` is 1; distances begin at 2"),
        ({"pred_distance": True, "net": {"max_seq_len": 0}}, "`max_pred_distance` is 0"),
        ({"backward_decoder": Decoder(dim=8, depth=1, heads=1)}, "`backward_decoder` is a Decoder"),
        ({"backward_decoder": net(dim=8)}, "widths of 16 and 8; both must agree"),
        ({"net": {"stack": Encoder}}, "a causal stack"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        build("absolute", **options)


def test_bad_input():
    model, seq = build(), torch.randint(0, VOCAB, (2, 4))
    with pytest.raises(InputError, match=r"`lens` holds \[5, 1\]; the rows have 4"):
        model(seq, lens=torch.tensor([5, 1]))
    with pytest.raises(ShapeError, match="2 whole numbers"):
        model(seq, lens=torch.tensor([1]))
    with pytest.raises(ShapeError, match="nothing to predict"):
        model(seq[:, :0])
    with pytest.raises(ShapeError, match="`loss_weight_by_fb_indices` returns a tensor of shape"):
        model(seq, loss_weight_by_fb_indices=lambda pairs: torch.ones(3))
    with pytest.raises(ShapeError, match="`text_head` returns width 7; it must be 24"):
        build(text_head=torch.nn.Linear(2 * DIM, 7))(seq)
    for kwargs, error, said in (
        ({"suffix": torch.tensor([1]), "decode_backwards": True}, InputError, "drop it, or `decode_backwards`"),
        ({"suffix": torch.zeros(3, 2, dtype=torch.long)}, ShapeError, r"`suffix` has shape \(3, 2\)"),
        ({"suffix": torch.tensor([VOCAB])}, TokenRangeError, "ids from 12 to 12"),
        ({"filter_logits_fn": "topk"}, InputError, "Did you mean `top_k`"),
    ):
        with pytest.raises(error, match=said):
            model.generate_with_suffix_cond(seq, 3, **kwargs)
