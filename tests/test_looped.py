"""Looped language models: their loops, the loss and the gates by hand, and decoding with a cache of each loop."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError

VOCAB, DIM, N, LOOPS = 12, 16, 8, 3
NETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "absolute": ({}, {}),
    "rotary": ({"rotary_pos_emb": True}, {}),
    "polar": ({"polar_pos_emb": True}, {}),
    "ALiBi": ({"alibi_pos_bias": True}, {}),
    "memory tokens": ({}, {"num_memory_tokens": 2}),
    "window": ({"attn_max_attend_past": 3}, {}),
    "shifted tokens": ({"shift_tokens": 1}, {}),
    "mixture of softmaxes": ({}, {"mixture_of_softmax": True}),
    "sigsoftmax": ({}, {"sigsoftmax_logits": True}),
}
EVERY_NET = pytest.mark.parametrize("kind", NETS)


def net(kind: str = "rotary", **options: Any) -> TransformerWrapper:
    stack, model = NETS[kind]
    layers = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, verbose=False, **{"pre_and_post_norm": True, **stack})
    given = {"looped": True, "max_looped_steps": LOOPS, **model, **options}
    return perturb(TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers, **given)).eval()


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, N))


@torch.no_grad()
def test_the_stack_reads_its_own_output() -> None:
    model, x = net(), ids()
    stream = model.token_emb(x)
    features = []
    for _ in range(4):
        stream = model.attn_layers(stream)
        features.append(stream)
    for steps in range(1, 5):
        got, record = model(
            x, looped_steps=steps, return_embeddings_and_intermediates=True, looped_pred_all_logits=True
        )
        close(got, features[steps - 1])
        assert record.exit_indices.tolist() == [[steps - 1]]
        for index, (gate, logits) in enumerate(zip(record.exit_logits, features[:steps], strict=True)):
            close(gate, model.exit_gate(features[index]))
            assert logits.shape == features[0].shape
        assert record.all_pred_logits is None, "features were requested"
    _, record = model(x, max_looped_steps=2, return_intermediates=True, looped_pred_all_logits=True)
    close(record.all_pred_logits[1], model.to_logits(features[1]))
    assert model(x, return_intermediates=True)[1].all_pred_logits is None, "in evaluation only on request"


@EVERY_NET
@pytest.mark.parametrize("options", [{}, {"loss_chunk_size": 3}], ids=["whole", "chunks"])
def test_the_loss_by_hand(kind: str, options: dict[str, Any]) -> None:
    wrapper = AutoregressiveWrapper(
        net(kind),
        looped_loss_threshold_exit=0.1,
        looped_loss_slope=3,
        looped_exit_loss_weight=0.5,
        **options,
    )
    x = ids()
    x[1, 5:] = -100
    got = wrapper(x)
    shown, labels = x.clamp(min=0), x[:, 1:]
    _, record = wrapper.net(shown, return_intermediates=True, looped_pred_all_logits=True)
    log_probs = [logits.log_softmax(dim=-1) for logits in record.all_pred_logits]
    losses = torch.stack([-each[:, :-1].gather(-1, labels[..., None].clamp(min=0))[..., 0] for each in log_probs])
    gates, counts = torch.stack(record.exit_logits)[:, :, :-1, 0], labels >= 0
    p, stays = [], torch.ones_like(gates[0])
    for g in gates[:-1].detach():
        p.append(stays * g.sigmoid())
        stays = stays * (-g).sigmoid()
    p.append(stays)
    close(sum(p), torch.ones_like(stays))
    wanted = (3 * (losses[1:] - losses[:-1] + 0.1)).sigmoid().detach()
    of_gates = F.binary_cross_entropy_with_logits(gates[:-1], wanted, reduction="none")[:, counts].mean()
    close(got, (torch.stack(p) * losses)[:, counts].mean() + 0.5 * of_gates)
    (gradient,) = torch.autograd.grad(got, wrapper.net.exit_gate.weight, retain_graph=True)
    (of_gates,) = torch.autograd.grad(0.5 * of_gates, wrapper.net.exit_gate.weight)
    close(gradient, of_gates)


def test_one_loop_is_the_model_without() -> None:
    model, x = net(), ids()
    plain = net(looped=False, max_looped_steps=4)
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if name != "exit_gate.weight"})
    close(model(x, looped_steps=1), plain(x))
    close(AutoregressiveWrapper(model)(x, looped_steps=1), AutoregressiveWrapper(plain)(x))
    outputs = [
        AutoregressiveWrapper(each).generate(x[:, :4], 5, temperature=0.0, **given)
        for each, given in ((model, {"looped_steps": 1}), (plain, {}))
    ]
    assert torch.equal(*outputs)


def test_prepended_embeddings_and_outputs() -> None:
    wrapper, x, embeds = AutoregressiveWrapper(net("memory tokens")), ids(), torch.randn(2, 3, DIM)
    loss, (logits, record) = wrapper(x, prepend_embeds=embeds, return_outputs=True)
    close(loss, wrapper(x, prepend_embeds=embeds))
    assert logits.shape == (2, N - 1, VOCAB)
    assert [gate.shape for gate in record.exit_logits] == [(2, N, 1)] * LOOPS
    loss.backward()
    assert [name for name, p in wrapper.named_parameters() if p.grad is None] == []


class Reference:
    """Decoding by the text of the method: in each loop the keys of that loop's prompt, then the last loop's keys."""

    def __init__(
        self, model: TransformerWrapper, prompt: Tensor, threshold: float | None, window: int | None = None
    ) -> None:
        self.model, self.threshold, self.window = model, threshold, window
        x, self.prompts, self.own = model.token_emb(prompt), [], []
        for _ in range(LOOPS):
            x, record = model.attn_layers(x, return_hiddens=True)
            self.prompts.append(record.cache)
        self.logits, self.exits = model.logits_of(x[:, -1:]), []

    def step(self, token: Tensor) -> Tensor:
        x, left, stays = self.model.token_emb(token), 0.0, 1.0
        for loop in range(LOOPS):
            # a cache of the prompt in this loop, after which the generated tokens have the keys of their last loop
            cache = self.prompts[loop].begin(len(self.own))
            cache.tokens += len(self.own)
            for new in self.own:
                for entry, streams in zip(cache.entries, new, strict=True):
                    for name, t in streams.items():
                        entry.grow(name, t)
            if self.window is not None:
                cache.crop(self.window - 1)
            x, record = self.model.attn_layers(x, cache=cache, input_not_include_cache=True, return_hiddens=True)
            newest = [{name: t[..., -1:, :] for name, t in entry.grown.items()} for entry in record.cache.entries]
            g = self.model.exit_gate(x)[0, 0, 0]
            left, stays = left + float(stays * g.sigmoid()), stays * (-g).sigmoid()
            if loop < LOOPS - 1 and self.threshold is not None and left >= self.threshold:
                break
        self.own.append(newest)
        self.exits.append(loop)
        return self.model.logits_of(x)


@pytest.mark.parametrize("threshold", [0.3, 0.9, None])
@torch.no_grad()
def test_decoding_by_the_text_of_the_method(threshold: float | None) -> None:
    model, x = net(), ids(1)
    given = {"looped_steps": LOOPS} if threshold is None else {"looped_exit_prob_threshold": threshold}
    reference = Reference(model, x[:, :4], threshold)
    logits, record = model(x[:, :4], cache=KVCache(), return_intermediates=True, **given)
    close(logits[:, -1:], reference.logits)
    assert len(record.looped_prompt_kv_cache) == LOOPS
    for place in range(4, N):
        token = x[:, place : place + 1]
        logits, record = model(token, cache=record, input_not_include_cache=True, return_intermediates=True, **given)
        close(logits, reference.step(token))
    assert record.exit_indices.tolist() == [[LOOPS - 1, *reference.exits]]


@EVERY_NET
@torch.no_grad()
def test_rows_leave_the_loops_by_themselves(kind: str) -> None:
    torch.manual_seed(0)
    wrapper, x = AutoregressiveWrapper(net(kind)), ids(4)[:, :4]
    torch.nn.init.normal_(wrapper.net.exit_gate.weight)
    given = {"temperature": 0.0, "looped_exit_prob_threshold": 0.6}
    out, record = wrapper.generate(x, 6, return_intermediates=True, **given)
    assert len(record.exit_indices[:, 1:].unique()) > 1, "some tokens leave early and some do not"
    for row in range(4):
        assert torch.equal(wrapper.generate(x[row], 6, **given), out[row])
    ragged = wrapper.generate([x[0], x[1, :2], x[2, :1]], 6, **given)
    assert torch.equal(ragged[0], out[0])
    assert torch.equal(ragged[1], wrapper.generate(x[1, :2], 6, **given))
    first = wrapper.generate(x, 1, cache_kv=False, **given)
    assert torch.equal(first, out[:, :1])


@torch.no_grad()
def test_the_window_slides_over_prompt_and_generated_tokens_of_every_loop() -> None:
    model, x, given = net(), ids(1), {"looped_steps": LOOPS, "return_intermediates": True}
    out, record = AutoregressiveWrapper(model).generate(x, 20, temperature=0.0, **given)
    held = [entry.grown["k"].shape[-2] for cache in record.cache.loops for entry in cache.entries if entry.grown]
    assert set(held) == {16}, "prompt and generated keys are cut together"
    reference = Reference(model, x, None, window=16)
    for token in out[0, :-1]:
        reference.step(token.view(1, 1))
    newest, cache = out[:, -1:], record.cache
    cache.crop(15)
    got = model(newest, cache=cache, input_not_include_cache=True, **given)[0]
    close(got, reference.step(newest))


def test_loops_in_half_precision_and_in_a_graph() -> None:
    wrapper, x = AutoregressiveWrapper(net("rotary")), ids()
    whole = torch.compile(wrapper, backend="eager", fullgraph=True)
    for n in (N, N - 3):
        close(whole(x[:, :n]), wrapper(x[:, :n]))
    half = AutoregressiveWrapper(net("rotary")).bfloat16()
    loss = half(x)
    assert loss.isfinite()
    assert (half.float()(x) - loss).abs() < 0.1
    assert half.bfloat16().generate(x[:, :3], 4).shape == (2, 4)


@torch.no_grad()
def test_beams_follow_their_caches() -> None:
    model, x = net(), ids()[:, :4]
    wrapper = AutoregressiveWrapper(model)
    tokens, scores = wrapper.beam_search(x, 3, beams=2, return_beams_and_scores=True)
    for beam in range(2):
        _, record = model(x, cache=KVCache(), return_intermediates=True)
        logits, total = model(x)[:, -1], torch.zeros(2)
        for place in range(3):
            total = total + logits.log_softmax(dim=-1).gather(-1, tokens[beam][:, place, None])[:, 0]
            token = tokens[beam][:, place : place + 1]
            out, record = model(token, cache=record, input_not_include_cache=True, return_intermediates=True)
            logits = out[:, -1]
        close(scores[beam], total)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="`pre_and_post_norm = True`"):
        TransformerWrapper(
            num_tokens=VOCAB, max_seq_len=16, looped=True, attn_layers=Decoder(dim=DIM, depth=1, verbose=False)
        )
    with pytest.raises(ConfigError, match="both run the stack several times"):
        net(recycling=True)
    with pytest.raises(ConfigError, match="`max_looped_steps`"):
        net(max_looped_steps=0)
    with pytest.raises(InputError, match="it must run at least once"):
        net()(ids(), looped_steps=0)
    wrapper = AutoregressiveWrapper(net())
    with pytest.raises(InputError, match="fixed buffers cannot follow"):
        wrapper.generate(ids(), 3, cache="static")
    with pytest.raises(InputError, match="one at a time"):
        wrapper.generate(ids(), 6, prompt_lookup=2, temperature=0.0)
    _, record = wrapper.net(ids(), cache=KVCache(), return_intermediates=True)
    with pytest.raises(InputError, match="the cache is of 3 loops, and 2 are to run"):
        wrapper.net(ids()[:, :1], cache=record, input_not_include_cache=True, looped_steps=2, return_intermediates=True)
