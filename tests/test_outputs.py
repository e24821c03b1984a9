"""Outputs of a `TransformerWrapper`: heads, mixtures, pools, recycling, and every flag of a pass."""

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb
from loguru import logger
from promises import keeps_the_past, pads
from torch import Tensor, nn

from x_transformers import AttentionPool, AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError
from x_transformers.forward_pass.call import Capture
from x_transformers.models.embeddings import TokenEmbedding
from x_transformers.models.requested_outputs import calc_entropy, calc_z_loss

STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
IDS = torch.arange(12).reshape(2, 6)
PREPENDED = torch.linspace(-1, 1, 96).reshape(2, 3, 16)


def build(stack: type = Decoder, layers: dict[str, Any] | None = None, **options: Any) -> TransformerWrapper:
    given = {"num_tokens": 24, "max_seq_len": 32, **options}
    return perturb(TransformerWrapper(**given, attn_layers=stack(**STACK, **(layers or {})))).eval()


# heads


HEADS: dict[str, dict[str, Any]] = {
    "one": {},
    "several": {"num_output_heads": 3},
    "mixture": {"mixture_of_softmax": True, "mixture_of_softmax_k": 2},
    "tied": {"tie_embedding": True},
    "tied mixture": {"tie_embedding": True, "mixture_of_softmax": True},
    "sigsoftmax": {"sigsoftmax_logits": True},
    "several, sigsoftmax": {"num_output_heads": 2, "sigsoftmax_logits": True},
    "mixture, sigsoftmax": {"mixture_of_softmax": True, "sigsoftmax_logits": True},
    "own": {"to_logits": nn.Linear(16, 5)},
    "single": {"logits_dim": 1, "squeeze_out_last_dim": True},
    "several single": {"logits_dim": 1, "squeeze_out_last_dim": True, "num_output_heads": 2},
    "next embedding": {"add_continuous_pred_head": True, "emb_dim": 10},
    "none": {"return_only_embed": True},
}
EACH_HEAD = pytest.mark.parametrize("head", HEADS)


def tensors(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


@EACH_HEAD
@torch.no_grad()
def test_every_flag_returns_what_it_says(head: str) -> None:
    """All combinations: the output is the same whatever is returned with it, features are `(b, n, D)`."""
    model = build(**HEADS[head])
    features = model(IDS, return_embeddings=True)
    assert features.shape == (2, 6, 16)
    plain = model(IDS)
    if head == "none":
        close(plain, features)
    for record, both, embeds, entropies in itertools.product([False, True], repeat=4):
        flags = {
            "return_intermediates": record,
            "return_logits_and_embeddings": both,
            "return_embeddings": embeds,
            "return_logit_entropies": entropies,
        }
        if head == "none" and (both or entropies):
            with pytest.raises(InputError, match="no head"):
                model(IDS, **flags)
            continue
        out = model(IDS, **flags)
        if record or entropies:
            out, kept = out
            close(kept.last_layer_hiddens, features)
            if entropies:
                for got, logits in zip(tensors(kept.logit_entropies), tensors(plain), strict=True):
                    p = logits.softmax(dim=-1)
                    close(got, -(p * p.log()).sum(dim=-1))
        if both:
            out, second = out
            close(second, features)
        elif embeds:
            close(out, features)
            continue
        for got, wanted in zip(tensors(out), tensors(plain), strict=True):
            close(got, wanted)


@pytest.mark.parametrize("more", ["return_intermediates", "return_mems", "return_attn", None])
@torch.no_grad()
def test_features_and_intermediates_do_not_nest(more: str | None) -> None:
    model = build(max_mem_len=4)
    out, record = model(IDS, return_embeddings_and_intermediates=True, **({more: True} if more else {}))
    close(out, model(IDS, return_embeddings=True))
    assert (record.mems is not None) is (more == "return_mems")


@EACH_HEAD
@torch.no_grad()
def test_prepended_embeddings_are_cut_off_every_output(head: str) -> None:
    model = build(**HEADS[head])
    embeds = torch.randn(2, 3, model.emb_dim)
    for flags in ({}, {"return_embeddings": True}):
        whole = model(IDS, prepend_embeds=embeds, **flags)
        cut = model(IDS, prepend_embeds=embeds, excise_prepend_embeds=True, **flags)
        for one, other in zip(tensors(whole), tensors(cut), strict=True):
            assert one.shape[1] == 9
            close(other, one[:, 3:])


@EACH_HEAD
@torch.no_grad()
def test_only_the_last_logits(head: str) -> None:
    model = build(**HEADS[head])
    wanted = model(IDS)
    for keep in (None, 0, 1, 4, 9):
        for got, one in zip(tensors(model(IDS, logits_to_keep=keep)), tensors(wanted), strict=True):
            close(got, one[:, -keep:] if keep and head != "none" else one)
    if head != "none":
        logits, features = model(IDS, logits_to_keep=1, return_logits_and_embeddings=True)
        assert tensors(logits)[0].shape[1] == 1
        assert features.shape[1] == 6
    with pytest.raises(InputError, match="`logits_to_keep` is -1"):
        model(IDS, logits_to_keep=-1)


@EACH_HEAD
@torch.no_grad()
def test_heads_are_saved(head: str) -> None:
    model = build(**HEADS[head])
    modules = {name: value for name, value in HEADS[head].items() if isinstance(value, nn.Module)}
    again = TransformerWrapper.from_config(json.loads(json.dumps(model.config)), **modules).eval()
    again.load_state_dict(model.state_dict())
    for got, wanted in zip(tensors(again(IDS)), tensors(model(IDS)), strict=True):
        assert torch.equal(got, wanted)


@EACH_HEAD
def test_heads_learn(head: str) -> None:
    model = build(**HEADS[head]).double()
    ask = {"return_next_embed_pred": True} if head == "next embedding" else {}
    out = model(IDS, **ask)
    if ask:
        out = (out[0], out[1][0])
    sum((t * torch.randn_like(t)).sum() for t in tensors(out)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


@torch.no_grad()
def test_a_mixture_is_log_probabilities() -> None:
    model = build(mixture_of_softmax=True, mixture_of_softmax_k=3)
    assert model.output_is_log_prob
    log_probs, y = model(IDS, return_logits_and_embeddings=True)
    assert y.shape == (2, 6, 16)
    close(log_probs.exp().sum(dim=-1), torch.ones(2, 6))
    mixture = model.mixture
    w = F.linear(y, mixture.combine_mixture.weight).softmax(dim=-1)
    each = F.linear(y, mixture.to_mixture[0].weight).unflatten(-1, (3, 16))
    close(log_probs, (w[..., None] * model.to_logits(each).softmax(dim=-1)).sum(dim=-2).log())


def test_a_mixture_of_large_logits_keeps_gradients() -> None:
    """A probability may underflow, its logarithm must not."""
    model = build(mixture_of_softmax=True)
    model.to_logits.weight.data *= 1e4
    out = model(IDS)
    assert out.isfinite().all()
    assert out.min() < math.log(1e-20) - 10
    out.min().backward()
    assert model.to_logits.weight.grad.isfinite().all()
    assert model.to_logits.weight.grad.abs().max() > 0


@torch.no_grad()
def test_sigsoftmax_does_not_underflow() -> None:
    plain, model = build(), build(sigsoftmax_logits=True)
    model.load_state_dict(plain.state_dict())
    z = plain(IDS)
    close(model(IDS), z + z.sigmoid().log())
    for each in (plain, model):
        each.to_logits.weight *= 1e4
    assert model(IDS).isfinite().all()


@torch.no_grad()
def test_a_tied_copy_reads_its_own_table() -> None:
    model = build(tie_embedding=True, l2norm_embed=True)
    features = model(IDS, return_embeddings=True)
    close(model(IDS), features @ model.token_emb.emb.weight.T * 16**-0.5)
    copied = copy.deepcopy(model)
    before = copied(IDS)
    perturb(model)
    assert torch.equal(copied(IDS), before)
    assert not any("to_logits" in name for name in model.state_dict())
    assert model.to_logits(features).shape == (2, 6, 24)


@torch.no_grad()
def test_a_given_embedding_keeps_its_weights() -> None:
    table = TokenEmbedding(16, 24)
    before = table.emb.weight.clone()
    model = TransformerWrapper(num_tokens=24, max_seq_len=8, token_emb=table, attn_layers=Decoder(**STACK))
    assert torch.equal(table.emb.weight, before)
    model.init_()
    assert torch.equal(table.emb.weight, before)
    assert build(l2norm_embed=True, scaled_sinu_pos_emb=True)(IDS).isfinite().all()


@torch.no_grad()
def test_keywords_reach_modules_that_were_given() -> None:
    class Embedding(nn.Embedding):
        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return super().forward(x) * factor

    class Head(nn.Linear):
        def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
            return super().forward(x) + shift

    model = build(token_emb=Embedding(24, 16), to_logits=Head(16, 5))
    close(model(IDS, to_logits_kwargs={"shift": 2.0}), model(IDS) + 2)
    assert (model(IDS, token_emb_kwargs={"factor": 3.0}) - model(IDS)).abs().max() > 1e-2
    for name in ("token_emb_kwargs", "to_logits_kwargs"):
        with pytest.raises(InputError, match=f"`{name}` are for a module given"):
            build()(IDS, **{name: {"factor": 1.0}})


@torch.no_grad()
def test_next_embeddings() -> None:
    model = build(add_continuous_pred_head=True, emb_dim=10, num_memory_tokens=2)
    embeds = torch.randn(2, 3, 10)
    for flags, count in (({}, 9), ({"excise_prepend_embeds": True}, 6)):
        out, (pred, initial) = model(IDS, prepend_embeds=embeds, return_next_embed_pred=True, **flags)
        assert out.shape[1] == count
        assert pred.shape == initial.shape == (2, count, 10)
    (out, (pred, _)), record = model(IDS, return_next_embed_pred=True, return_intermediates=True)
    y = model(IDS, return_embeddings=True)
    first, _, second = model.to_next_embed_pred
    close(pred, second(F.silu(first(y))))
    close(record.initial_embeds, model.token_emb(IDS) + model.pos_emb(IDS))
    with pytest.raises(InputError, match="`add_continuous_pred_head = True`"):
        build()(IDS, return_next_embed_pred=True)


# further losses


@torch.no_grad()
def test_z_loss_takes_the_weight_of_the_constructor() -> None:
    model = build(layers={"cross_attend": True}, attn_z_loss_weight=0.5)
    context = torch.randn(2, 4, 16)
    _, record = model(IDS, context=context, return_attn_z_loss=True)
    total = sum(r.pre_softmax_attn.logsumexp(dim=-1) for r in record.attn_intermediates)
    assert len(record.attn_intermediates) == 4
    close(record.attn_z_loss, total.square().sum(dim=1).mean() * 0.5)
    _, twice = model(IDS, context=context, return_attn_z_loss=True, attn_z_loss_weight=1.0)
    close(twice.attn_z_loss, record.attn_z_loss * 2)
    with pytest.raises(InputError, match="attn_flash"):
        build(layers={"attn_flash": True})(IDS, return_attn_z_loss=True)


@torch.no_grad()
def test_z_loss_of_padding_is_finite() -> None:
    """Queries that see no key count as nothing."""
    _, record = build()(IDS, return_attn_z_loss=True, seq_start_pos=torch.tensor([0, 3]))
    assert record.attn_z_loss.isfinite()
    assert record.attn_z_loss > 0
    logits = torch.tensor([[[[1.0, 2.0], [-torch.finfo().max] * 2]]])
    close(calc_z_loss([logits], weight=2.0), torch.tensor(math.log(math.e + math.e**2) ** 2))
    close(calc_z_loss([logits], mask=torch.tensor([[True, False]])), torch.tensor(math.log(math.e + math.e**2) ** 2))


def test_entropy() -> None:
    close(calc_entropy(torch.zeros(3, 4)), torch.full((3,), math.log(4)))
    close(calc_entropy(torch.tensor([0.5, 0.5, 0.0]), is_prob=True), torch.tensor(math.log(2)))


@torch.no_grad()
def test_capture_says_what_is_kept() -> None:
    model = build()
    logits, record = model(IDS, return_intermediates=True, capture=Capture())
    assert not record.layer_hiddens
    assert not record.hiddens
    close(logits, model(IDS))
    step = model(IDS[:, :1], cache=record, input_not_include_cache=True)
    close(step, model(torch.cat((IDS, IDS[:, :1]), dim=1))[:, -1:])
    with pytest.raises(InputError, match="`capture`"):
        model(IDS, capture=Capture())


# pools


POOLS: dict[str, dict[str, Any]] = {
    "mean": {"average_pool_embed": True},
    "class": {"use_cls_token": True},
    "classes": {"use_cls_token": True, "num_cls_tokens": 3},
    "attention": {"attn_pool": True, "num_pooled_tokens": 2},
    "deep attention": {"attn_pool": True, "attn_pool_depth": 2, "dim_pooled_tokens": 12},
}
SHAPES = {"mean": (24,), "class": (24,), "classes": (3, 24), "attention": (2, 16), "deep attention": (1, 12)}
EACH_POOL = pytest.mark.parametrize("pool", POOLS)


@EACH_POOL
@pytest.mark.parametrize("memory", [0, 2])
@pytest.mark.parametrize("count", [0, 3])
@torch.no_grad()
def test_padding_does_not_enter_a_pool(pool: str, memory: int, count: int) -> None:
    model = build(Encoder, num_memory_tokens=memory, **POOLS[pool])
    given = {"prepend_embeds": torch.randn(3, count, 16)} if count else {}
    ids, lengths = torch.randint(0, 24, (3, 6)), torch.tensor([6, 4, 1])
    right = model(ids, mask=torch.arange(6) < lengths[:, None], **given)
    left = model(ids, seq_start_pos=6 - lengths, **given)
    assert right.shape == (3, *SHAPES[pool])
    for row, length in enumerate(lengths.tolist()):
        own = {name: t[row : row + 1] for name, t in given.items()}
        close(right[row : row + 1], model(ids[row : row + 1, :length], **own))
        close(left[row : row + 1], model(ids[row : row + 1, 6 - length :], **own))
    if count:
        shown = torch.tensor([[True, False, True]]).expand(3, -1)
        one = model(ids, prepend_mask=shown, **given)
        hidden = torch.where(shown[..., None], given["prepend_embeds"], torch.randn(3, count, 16))
        close(model(ids, prepend_embeds=hidden, prepend_mask=shown), one)


@torch.no_grad()
def test_a_mean_covers_tokens_only() -> None:
    model = build(Encoder, average_pool_embed=True, num_memory_tokens=2)
    mask = torch.arange(6) < torch.tensor([[6], [0]])
    for cut in (False, True):
        pooled, record = model(
            IDS,
            mask=mask,
            prepend_embeds=PREPENDED,
            excise_prepend_embeds=cut,
            return_embeddings_and_intermediates=True,
        )
        assert record.last_layer_hiddens.shape == (2, 9, 16)
        close(pooled[0], record.last_layer_hiddens[0, 3:].mean(dim=0))
        assert (pooled[1] == 0).all()
    assert (model(IDS[:, :0], return_embeddings=True) == 0).all()


@torch.no_grad()
def test_class_tokens_are_no_tokens() -> None:
    model = build(Encoder, use_cls_token=True, num_cls_tokens=2, num_memory_tokens=1)
    y, record = model(
        IDS, return_embeddings_and_intermediates=True, prepend_embeds=PREPENDED, excise_prepend_embeds=True
    )
    assert y.shape == (2, 2, 16)
    assert record.last_layer_hiddens.shape == (2, 9, 16)
    close(y, record.last_hidden[:, 1:3])
    wanted = model(IDS)
    for name, nothing in (
        ("attn_mask", torch.ones(6, 6, dtype=torch.bool)),
        ("attn_bias", torch.zeros(6, 6)),
        ("pos", torch.arange(6)),
        ("self_attn_kv_mask", torch.ones(2, 6, dtype=torch.bool)),
    ):
        close(model(IDS, **{name: nothing}), wanted)


@torch.no_grad()
def test_class_tokens_and_next_embeddings() -> None:
    model = build(Encoder, use_cls_token=True, add_continuous_pred_head=True)
    for cut, count in ((False, 9), (True, 6)):
        _, (pred, initial) = model(
            IDS, prepend_embeds=PREPENDED, excise_prepend_embeds=cut, return_next_embed_pred=True
        )
        assert pred.shape == (2, 16)
        assert initial.shape == (2, count, 16)


@torch.no_grad()
def test_class_tokens_stand_behind_interspersed_memory() -> None:
    model = build(use_cls_token=True, num_cls_tokens=2, num_memory_tokens=1, memory_tokens_interspersed_every=3)
    _, record = model(IDS, return_intermediates=True)
    assert record.last_hidden.shape[1] == 2 + 6 + 3
    assert record.last_layer_hiddens.shape[1] == 6


@torch.no_grad()
def test_attention_pools() -> None:
    encoder = build(Encoder, attn_pool=True, num_pooled_tokens=3, num_memory_tokens=2)
    pooled, record = encoder(IDS, return_intermediates=True)
    close(record.attn_pooled_tokens, pooled)
    close(pooled, encoder.attn_pool(record.last_layer_hiddens))
    close(record.logits, encoder.to_logits(record.last_layer_hiddens))
    logits, features = encoder(IDS, return_logits_and_embeddings=True)
    close(logits, encoder.to_logits(features))
    for more in ({}, {"return_only_embed": True}):
        encoder = build(Encoder, attn_pool=True, add_continuous_pred_head=True, **more)
        out, (pred, _) = encoder(IDS, return_next_embed_pred=True)
        close(out, encoder(IDS))
        assert out.shape == (2, 1, 16)
        assert pred.shape == (2, 6, 16)
    decoder = build(Decoder, attn_pool=True)
    assert decoder(IDS).shape == (2, 6, 24)
    out, record = decoder(IDS, return_intermediates=True)
    assert out.shape == (2, 6, 24)
    close(record.attn_pooled_tokens, decoder.attn_pool(record.last_layer_hiddens))
    assert isinstance(decoder.attn_pool, AttentionPool)


@EACH_POOL
def test_pools_learn(pool: str) -> None:
    model = build(Encoder, **POOLS[pool]).double()
    out, record = model(IDS, return_intermediates=True)
    logits = out if record.logits is None else record.logits
    ((out * torch.randn_like(out)).sum() + (logits * torch.randn_like(logits)).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name


@EACH_POOL
@torch.no_grad()
def test_pools_are_saved(pool: str) -> None:
    model = build(Encoder, **POOLS[pool])
    again = TransformerWrapper.from_config(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("pool", ["mean", "class", "classes"])
def test_what_sees_the_whole_sequence_keeps_no_cache(pool: str) -> None:
    model = build(Decoder, **POOLS[pool])
    assert not model.can_cache_kv
    _, record = model(IDS, return_intermediates=True)
    for call in (lambda: model(IDS, cache=record), lambda: model.static_cache(2, 8)):
        with pytest.raises(InputError, match="from all tokens at once"):
            call()
    with pytest.raises(InputError, match="`logits_to_keep`"):
        model(IDS, logits_to_keep=1)


# recycling


@torch.no_grad()
def test_recycling_reads_the_output_again() -> None:
    model = build(recycling=True, num_memory_tokens=1)
    x = torch.cat((model.memory_tokens.expand(2, -1, -1), model.token_emb(IDS) + model.pos_emb(IDS)), dim=1)
    y = model.attn_layers(x)
    for steps in (2, 3, 4):
        y = model.attn_layers(x + model.recycled_proj(y))
        close(model(IDS, recycle_steps=steps, return_embeddings=True), y[:, 1:])
    close(model(IDS, return_embeddings=True), y[:, 1:])
    close(model(IDS, recycle_steps=1, return_embeddings=True), model.attn_layers(x)[:, 1:])
    assert torch.equal(model(IDS), model(IDS))


def test_recycling_learns_from_the_last_step_only() -> None:
    model = build(recycling=True)
    calls = []
    model.attn_layers.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(IDS, recycle_steps=3).square().mean().backward()
    assert calls == [False, False, True]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_recycling_draws_its_steps_in_training() -> None:
    model = build(recycling=True, train_max_recycle_steps=3).train()
    seen: list[int] = []
    model.attn_layers.register_forward_hook(lambda *_: seen.append(1))
    counts = set()
    for _ in range(40):
        seen.clear()
        model(IDS)
        counts.add(len(seen))
    assert counts == {1, 2, 3}
    torch.manual_seed(3)
    one = model(IDS)
    torch.manual_seed(3)
    assert torch.equal(one, model(IDS))


def test_recycling_has_no_cache_and_still_generates() -> None:
    model = build(recycling=True)
    assert not model.can_cache_kv
    _, record = model(IDS, return_intermediates=True)
    with pytest.raises(InputError, match="from all tokens at once"):
        model(IDS, cache=record)
    assert AutoregressiveWrapper(model).generate(IDS, 3).shape == (2, 3)
    with pytest.raises(InputError, match="`recycle_steps` is 0"):
        model(IDS, recycle_steps=0)
    with pytest.raises(InputError, match="build it with `recycling = True`"):
        build()(IDS, recycle_steps=2)


@pytest.mark.parametrize("options", [{}, {"num_memory_tokens": 2}, {"emb_dim": 10}], ids=str)
@pytest.mark.parametrize("stack", [Decoder, Encoder])
@torch.no_grad()
def test_recycling_keeps_rows_apart(options: dict[str, Any], stack: type) -> None:
    model = build(stack, recycling=True, **options)
    ids = torch.randint(0, 24, (3, 6))
    pads(model, left=False)
    pads(model, left=True)
    embeds = torch.randn(3, 2, model.emb_dim)
    whole = model(ids, prepend_embeds=embeds)
    close(model(ids[1:2], prepend_embeds=embeds[1:2]), whole[1:2])
    if stack is Decoder:
        keeps_the_past(model)


def test_recycling_reads_a_memory_at_each_step() -> None:
    model = build(recycling=True, max_mem_len=4)
    _, mems = model(IDS, return_mems=True)
    x = model.token_emb(IDS) + model.pos_emb(IDS)
    y = model.attn_layers(x, mems=mems)
    wanted = model.attn_layers(x + model.recycled_proj(y), mems=mems)
    close(model(IDS, mems=mems, recycle_steps=2, return_embeddings=True), wanted)


# calls


@torch.no_grad()
def test_a_model_of_new_tokens_generates() -> None:
    """The constructor's `input_not_include_cache` is a default, which decoding knows."""
    plain, model = build(), build(input_not_include_cache=True)
    model.load_state_dict(plain.state_dict())
    wanted = AutoregressiveWrapper(plain).generate(IDS, 6, temperature=0, cache_kv=False)
    assert torch.equal(AutoregressiveWrapper(model).generate(IDS, 6, temperature=0), wanted)
    _, record = model(IDS, return_intermediates=True)
    close(model(IDS[:, :2], cache=record), model(torch.cat((IDS, IDS[:, :2]), dim=1))[:, 6:])


@torch.no_grad()
def test_a_floating_pos_is_an_embedding_and_no_rotation() -> None:
    model = build(layers={"rotary_pos_emb": True}, num_memory_tokens=2)
    pos = torch.randn(6, 16)
    close(model(IDS, pos=pos), model(IDS, sum_embeds=pos.expand(2, -1, -1)))
    table = build(num_memory_tokens=2)
    close(table(IDS, pos=table.pos_emb(torch.zeros(1, 6, 16))), table(IDS))


@torch.no_grad()
def test_sinusoids_of_each_row() -> None:
    model = build(scaled_sinu_pos_emb=True)
    whole = model(IDS)
    for pos in (torch.arange(6), torch.arange(6).expand(2, -1)):
        close(model(IDS, pos=pos), whole)
    left = model(IDS, seq_start_pos=torch.tensor([0, 2]))
    close(left[1:, 2:], model(IDS[1:, 2:]))


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"average_pool_embed": True, "use_cls_token": True},
            "`average_pool_embed` and `use_cls_token` are alternatives",
        ),
        ({"use_cls_token": True, "attn_pool": True}, "`use_cls_token` and `attn_pool` are alternatives"),
        ({"average_pool_embed": True, "attn_pool": True}, "`average_pool_embed` and `attn_pool` are alternatives"),
        ({"looped": True}, "`pre_and_post_norm = True` in the stack"),
        ({"max_looped_steps": 0}, "`max_looped_steps`"),
        ({"num_output_heads": 0}, "`num_output_heads` is 0"),
        ({"num_output_heads": 2, "mixture_of_softmax": True}, "`mixture_of_softmax` works with one head"),
        ({"num_output_heads": 2, "tie_embedding": True}, "`tie_embedding` works with one head"),
        ({"num_output_heads": 2, "to_logits": nn.Linear(16, 5)}, "`to_logits` works with one head"),
        ({"tie_embedding": True, "emb_dim": 8}, "`tie_embedding` needs embeddings of the stack's width 16"),
        ({"tie_embedding": True, "logits_dim": 8}, "`tie_embedding` takes its logits from the token table"),
        ({"tie_embedding": True, "to_logits": nn.Linear(16, 5)}, "drop `to_logits`"),
        ({"tie_embedding": True, "token_emb": nn.Embedding(24, 16)}, "`tie_embedding` needs a `TokenEmbedding`"),
        ({"train_max_recycle_steps": 0}, "`train_max_recycle_steps` is 0"),
        ({"emb_frac_gradient": 0.0}, "`emb_frac_gradient` is 0"),
        ({"attn_pool": True, "num_pooled_tokens": 0}, "`num_pooled_tokens` is 0"),
        ({"embed_num_tokens": {"part": 0}}, "`embed_num_tokens` gives 'part' the vocabulary 0"),
    ],
)
def test_options_that_disagree(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"return_only_embed": True, "sigsoftmax_logits": True}, "`sigsoftmax_logits` has no effect: it is about"),
        ({"return_only_embed": True, "mixture_of_softmax": True}, "`mixture_of_softmax` has no effect"),
        ({"return_only_embed": True, "squeeze_out_last_dim": True}, "`squeeze_out_last_dim` has no effect"),
        ({"num_cls_tokens": 2}, "`num_cls_tokens` has no effect: it needs `use_cls_token`"),
        ({"dim_pooled_tokens": 8}, "`dim_pooled_tokens` has no effect: it needs `attn_pool`"),
        ({"use_cls_token": True}, "outputs do not depend on the input"),
        ({"scaled_sinu_pos_emb": True, "use_abs_pos_emb": False}, "has no effect: `use_abs_pos_emb` is False"),
        ({"scaled_sinu_pos_emb": True, "max_seq_len": 0}, "has no effect: without `max_seq_len`"),
        ({"scaled_sinu_pos_emb": True, "layers": {"rel_pos_bias": True}}, "no effect: the stack has `disable_abs_pos"),
    ],
)
@torch.no_grad()
def test_options_without_effect_are_named(options: dict[str, Any], words: str) -> None:
    said: list[str] = []
    sink = logger.add(said.append, format="{message}")
    model = build(**options)
    logger.remove(sink)
    assert len(said) == 1
    assert words in said[0]
    assert model(IDS).isfinite().all()


def test_nothing_is_said_about_the_defaults() -> None:
    said: list[str] = []
    sink = logger.add(said.append, format="{message}")
    build()
    build(Encoder, use_cls_token=True, num_cls_tokens=2)
    logger.remove(sink)
    assert not said


def test_looped_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"`looped_steps`.* are for looped models"):
        build()(IDS, looped_steps=2)


@torch.no_grad()
def test_a_tensor_over_other_tokens_is_refused() -> None:
    model = build()
    for name, given in (
        ("pos", torch.arange(8)),
        ("sum_embeds", torch.zeros(2, 8, 16)),
        ("pos", torch.zeros(2, 8, 16)),
    ):
        with pytest.raises(InputError, match="8 tokens was given for 6"):
            model(IDS, **{name: given})


@torch.no_grad()
@pytest.mark.parametrize("shape", [None, (), (16,), (1, 16), (2, 1, 16)])
def test_what_is_added_to_all_tokens_may_be_a_number_or_one_embedding(shape: tuple[int, ...] | None) -> None:
    model, more = build(), 0.5 if shape is None else torch.full(shape, 0.5)
    close(model(IDS, sum_embeds=more), model(IDS, sum_embeds=torch.full((2, 6, 16), 0.5)))
    _, state = model(IDS[:, :4], sum_embeds=more, return_intermediates=True)
    close(model(IDS, sum_embeds=more, cache=state), model(IDS, sum_embeds=more)[:, 4:])
    wrapper = AutoregressiveWrapper(model)
    greedy = {"temperature": 0.0, "seq_len": 4}
    expected = wrapper.generate(IDS, sum_embeds=torch.full((2, 9, 16), 0.5), **greedy)
    assert wrapper.generate(IDS, sum_embeds=more, **greedy).tolist() == expected.tolist()
    assert wrapper.generate(IDS, sum_embeds=more, cache="static", **greedy).tolist() == expected.tolist()
    assert wrapper.generate([IDS[0], IDS[1, 2:]], sum_embeds=more, **greedy).shape == (2, 4)
