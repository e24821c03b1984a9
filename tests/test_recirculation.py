"""`Recirculation`: the second pass by hand, no change without mixing, padding, prompts, and learned mixers."""

from typing import Any

import pytest
import torch
from catalog import close, perturb
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError
from x_transformers.recirculation import Recirculation, norm_matched

VOCAB, DIM, N = 12, 16, 7
NETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "absolute": ({}, {}),
    "rotary": ({"rotary_pos_emb": True}, {}),
    "polar": ({"polar_pos_emb": True}, {}),
    "ALiBi": ({"alibi_pos_bias": True}, {}),
    "T5": ({"rel_pos_bias": True}, {}),
    "dynamic bias": ({"dynamic_pos_bias": True}, {}),
    "memory tokens": ({}, {"num_memory_tokens": 2}),
    "memory tokens between": ({}, {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3}),
    "memory keys": ({"attn_num_mem_kv": 2}, {}),
    "window": ({"attn_max_attend_past": 3}, {}),
    "shifted tokens": ({"shift_tokens": 1}, {}),
    "tied weights": ({"weight_tie_layers": True}, {}),
    "value residual": ({"add_value_residual": True}, {}),
    "latent keys": ({"attn_use_latent_kv": True, "attn_dim_latent_kv": 8}, {}),
    "post-norm": ({"pre_norm": False}, {}),
    "sigsoftmax": ({}, {"sigsoftmax_logits": True}),
    "mixture of softmaxes": ({}, {"mixture_of_softmax": True}),
}
EVERY_NET = pytest.mark.parametrize("kind", NETS)


def net(kind: str) -> TransformerWrapper:
    stack, model = NETS[kind]
    layers = Decoder(dim=DIM, depth=3, heads=2, attn_dim_head=8, verbose=False, **stack)
    return perturb(TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers, **model)).eval()


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, N))


@EVERY_NET
@torch.no_grad()
def test_without_mixing_nothing_changes(kind: str) -> None:
    model, x = net(kind), ids()
    recirculation = Recirculation(model, (2, 1), (1, 0), alpha=0.0)
    close(recirculation(x), model(x))


@EVERY_NET
@torch.no_grad()
def test_prepended_embeddings_and_padding_are_at_the_same_places_in_both_passes(kind: str) -> None:
    model, x, embeds = net(kind), ids(), torch.randn(2, 3, DIM)
    recirculation = Recirculation(model, (2, 1), (1, 0), alpha=0.0)
    hidden = torch.tensor([[True] * 3, [False, True, True]])
    for given in ({}, {"excise_prepend_embeds": True}, {"prepend_mask": hidden}):
        got, wanted = (each(x, prepend_embeds=embeds, **given) for each in (recirculation, model))
        assert got.shape == wanted.shape
        close(got[:, -N:], wanted[:, -N:])
    start = torch.tensor([3, 0])
    got, wanted = recirculation(x, seq_start_pos=start), model(x, seq_start_pos=start)
    close(got[0, 3:], wanted[0, 3:])
    close(got[1], wanted[1])


@torch.no_grad()
def test_layers_that_run_several_times_are_changed_at_one_place() -> None:
    model, x = net("rotary"), ids()
    for given in ({"repeat_blocks": ((0, 2),)}, {"layers_execute_order": (0, 1, 0, 1, 2, 3, 4, 5)}):
        close(Recirculation(model, (2, 1), (1, 0), alpha=0.0)(x, **given), model(x, **given))


@EVERY_NET
@torch.no_grad()
def test_generation_with_and_without_a_cache(kind: str) -> None:
    wrapper, x = AutoregressiveWrapper(Recirculation(net(kind), 2, 0, alpha=0.5, ramp_steps=2)), ids()[:, :4]
    out = wrapper.generate(x, 5, temperature=0.0)
    assert torch.equal(out, wrapper.generate(x, 5, temperature=0.0, cache_kv=False))
    ragged = wrapper.generate([x[0], x[1, :2]], 5, temperature=0.0)
    assert torch.equal(ragged[0], out[0])
    assert torch.equal(ragged[1], wrapper.generate(x[1, :2], 5, temperature=0.0)), "padding moves nothing"
    if kind not in ("memory tokens between", "polar"):
        assert torch.equal(out, wrapper.generate(x, 5, temperature=0.0, cache="static"))


@torch.no_grad()
def test_the_second_pass_by_hand() -> None:
    model, x, alpha, ramp = net("rotary"), ids(), 0.4, 3
    got = Recirculation(model, 2, 1, alpha=alpha, ramp_steps=ramp)(x)
    cache: Any = KVCache()
    for t in range(N):
        logits, first = model(x[:, t : t + 1], cache=cache, input_not_include_cache=True, return_intermediates=True)
        close(got[:, t : t + 1], logits)
        source, dest = first.hiddens[2], first.hiddens[1]
        a = alpha * min(t / ramp, 1)
        mixed = a * source * dest.norm(dim=-1, keepdim=True) / source.norm(dim=-1, keepdim=True) + (1 - a) * dest
        norm = model.attn_layers.layers[2].norm

        def replaced(module: Any, args: Any, mixed: Tensor = mixed) -> Any:
            return (mixed, *args[1:])

        hook = norm.register_forward_pre_hook(replaced)
        _, second = model(x[:, t : t + 1], cache=cache, input_not_include_cache=True, return_intermediates=True)
        hook.remove()
        cache = second.cache


def test_a_source_without_length_adds_nothing() -> None:
    source, dest = torch.randn(2, 1, DIM), torch.randn(2, 1, DIM)
    source[1] = 0
    out = norm_matched(source, dest)
    close(out[0].norm(), dest[0].norm())
    assert not out[1].any()


@torch.no_grad()
def test_masks_are_cut_for_each_token() -> None:
    recirculation, x = Recirculation(net("rotary"), 2, 0, alpha=0.5, ramp_steps=0), ids()
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, 2] = False
    masked = recirculation(x, mask=mask)
    other = x.clone()
    other[0, 2] = (x[0, 2] + 1) % VOCAB
    seen = torch.arange(N) != 2
    close(recirculation(other, mask=mask)[:, seen], masked[:, seen])


def test_only_the_mixers_learn() -> None:
    torch.manual_seed(0)
    recirculation, x = Recirculation(net("rotary"), 2, 0, use_learned=True, learned_hidden=5), ids(4)
    frozen = [p.clone() for p in recirculation.net.parameters()]
    recirculation.net.to_logits.weight.grad = torch.ones_like(recirculation.net.to_logits.weight)
    assert recirculation.learned_mixers is not None
    before = [p.clone() for p in recirculation.learned_mixers.parameters()]
    recirculation.train()
    first = recirculation.learn_parameters(x, steps=1, batch_size=9)
    last = recirculation.learn_parameters(x, steps=8, batch_size=9, optimizer_kwargs={"lr": 0.01}, ignore_index=-1)
    assert recirculation.net.training, "the mode is left as it was"
    assert first > 0 < last
    assert all(torch.equal(a, b) for a, b in zip(frozen, recirculation.net.parameters(), strict=True))
    assert recirculation.net.to_logits.weight.grad.eq(1).all(), "gradients of the decoder are left alone"
    assert all(not torch.equal(a, b) for a, b in zip(before, recirculation.learned_mixers.parameters(), strict=True))
    with pytest.raises(InputError, match="use_learned = True"):
        Recirculation(net("rotary"), 1, 0).learn_parameters(x)


@pytest.mark.parametrize(
    ("routes", "options", "words"),
    [
        ((0, 1), {}, "it must lead to an earlier one"),
        ((3, 1), {}, "of 0 to 2"),
        (((1, 2), (0, 0)), {}, "destinations must differ"),
        ((2, 0), {"ramp_steps": -1}, "a number of tokens"),
        ((2, 0), {"learned_hidden": 4}, "a mixer that is not built"),
    ],
)
def test_refusals(routes: tuple[Any, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recirculation(net("rotary"), *routes, **options)


def test_models_that_cannot_be_read_twice() -> None:
    layers = Decoder(dim=DIM, depth=2, heads=2, verbose=False, num_residual_streams=2)
    with pytest.raises(ConfigError, match="2 residual streams"):
        Recirculation(TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers), 1, 0)
    layers = Decoder(dim=DIM, depth=2, heads=2, verbose=False)
    with pytest.raises(ConfigError, match="able to cache"):
        Recirculation(TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers, recycling=True), 1, 0)
    whole: dict[str, Any] = {"return_attn": True, "attn_mask": torch.ones(N, N, dtype=torch.bool)}
    for name, given in whole.items():
        with pytest.raises(InputError, match=f"`{name}` is about all tokens of a pass"):
            Recirculation(net("rotary"), 1, 0)(ids(), **{name: given})
