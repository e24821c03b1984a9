"""`FullBandwidth`: passes with feedback by hand, every transition and route, and generation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError
from x_transformers.full_bandwidth import RECIRC_SHORTCUTS, TRANSITIONS, FullBandwidth, dynamic_rollout_loss_weights

VOCAB, DIM, N, DEPTH = 12, 16, 7, 3
NETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "absolute": ({}, {}),
    "rotary": ({"rotary_pos_emb": True}, {}),
    "memory tokens": ({}, {"num_memory_tokens": 2}),
    "residual streams": ({"num_residual_streams": 2}, {}),
}


def net(kind: str = "absolute", **options: Any) -> TransformerWrapper:
    stack, model = NETS[kind]
    layers = Decoder(dim=DIM, depth=DEPTH, heads=2, attn_dim_head=8, verbose=False, depth_scale_residual=True, **stack)
    given = {"tie_embedding": True, "post_emb_norm": True, **model, **options}
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers, **given)


def build(kind: str = "absolute", **options: Any) -> FullBandwidth:
    return perturb(FullBandwidth(net(kind), **options)).eval()


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, N))


def rms(t: Tensor, norm: Any) -> Tensor:
    return F.normalize(t, dim=-1) * DIM**0.5 * norm.g


def transition_by_hand(kind: str, m: Any, latent: Tensor, stream: Tensor) -> Tensor:
    """The formulas of the transitions."""
    if kind == "residual_glu":
        return rms(stream + m.scale * transition_by_hand("glu", m.glu, latent, stream), m.norm)
    latents = rms(latent, m.latent_norm)
    if kind == "residual":
        return rms(stream + m.scale * latents @ m.proj.weight.T, m.norm)
    streams = rms(stream, m.stream_norm)
    if kind == "glu":
        return rms((latents @ m.to_state.weight.T) * (streams @ m.to_gate.weight.T).sigmoid(), m.norm)
    if kind == "linear":
        return rms(latents @ m.to_state.weight.T + streams @ m.to_stream.weight.T, m.norm)
    both = torch.cat((latents, streams), dim=-1)
    z = (both @ m.gate.weight.T + m.gate.bias).sigmoid()
    return rms(stream + z * ((both @ m.to_candidate.weight.T).tanh() - stream), m.norm)


@pytest.mark.parametrize("kind", TRANSITIONS)
@torch.no_grad()
def test_a_pass_with_feedback_by_hand(kind: str) -> None:
    """The route of the paper, from the last block to the token embeddings."""
    model, x = build(transition=kind, temporal_parallel_passes=3), ids()
    logits, record = model.net(x, return_intermediates=True)
    expected = [logits]
    for _ in range(2):
        latent = record.last_hidden

        def fused(embeds: Tensor, latent: Tensor = latent) -> Tensor:
            new = transition_by_hand(kind, model.transitions[f"{DEPTH}->1"], latent[:, :-1], embeds[:, 1:])
            return torch.cat((embeds[:, :1], new), dim=1)

        logits, record = model.net(x, return_intermediates=True, transform_token_embeds=fused)
        expected.append(logits)
    got = model(x, return_loss=False, return_all_pass_logits=True)
    for one, another in zip(got.all_pass_logits, expected, strict=True):
        close(one, another)
    close(got.logits, expected[-1])


def test_the_loss_by_hand() -> None:
    model, x = build(temporal_parallel_passes=4, feedback_pass_weight=0.5), ids()
    x[0, 4] = -100
    shown = x.clamp(min=0)[:, :-1]
    outputs = model(shown, return_loss=False, return_all_pass_logits=True).all_pass_logits
    counts = x[:, 1:] >= 0

    def mean(logits: Tensor, first: int) -> Tensor:
        each = -logits.log_softmax(dim=-1).gather(-1, x[:, 1:, None].clamp(min=0))[..., 0]
        return each[:, first:][counts[:, first:]].mean()

    losses = [mean(logits, min(index, 1)) for index, logits in enumerate(outputs)]
    got = model(x, return_all=True)
    close(torch.stack(got.loss_breakdown.all_pass_losses), torch.stack(losses))
    close(got.loss, losses[0] + 0.5 * torch.stack(losses[1:]).mean())
    close(got.loss_breakdown.first_pass_loss, losses[0])
    assert len(got.loss_breakdown.feedback_pass_losses) == 3
    excess = (torch.stack(losses) - 0.2).relu()
    weights = torch.stack([(-0.7 * excess[:k].sum()).exp() for k in range(1, 4)])
    close(dynamic_rollout_loss_weights(torch.stack(losses), 0.7, 0.2)[1:], weights)
    dynamic = model(x, dynamic_rollout_loss_weight=True, dynamic_loss_decay=0.7, dynamic_loss_threshold=0.2)
    close(dynamic, losses[0] + 0.5 * (weights * torch.stack(losses[1:])).sum() / weights.sum())
    close(model(x, temporal_parallel_passes=1), losses[0])


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("pairs", RECIRC_SHORTCUTS)
def test_routes_keep_the_order_of_time(kind: str, pairs: str) -> None:
    model, x = build(kind, recirc_pairs=pairs), ids()
    assert len(model.transitions) == len(model.recirc_pairs)
    with torch.no_grad():
        wanted = model(x, return_loss=False)
        other = x.clone()
        other[:, 4] = (x[:, 4] + 1) % VOCAB
        got = model(other, return_loss=False)
    assert torch.equal(got[:, :4], wanted[:, :4]), "a token has read a later one"
    assert not torch.allclose(got[:, 5:], wanted[:, 5:])


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("pairs", ["paper", "top_and_prev", "dense"])
@torch.no_grad()
def test_generation(kind: str, pairs: str) -> None:
    model, x = build(kind, recirc_pairs=pairs).train(), ids()[:, :4]
    out = model.generate(x, 5, 0.0)
    assert model.training
    # a single prompt token has no feedback, so that one pass with the tokens before it is the whole computation
    first = model.generate(x[:, :1], 1, 0.0)
    model.eval()
    assert torch.equal(first[:, 0], model.net(x[:, :1])[:, -1].argmax(dim=-1))
    assert torch.equal(out[:, 0], model(x, return_loss=False)[:, -1].argmax(dim=-1))
    ragged = model.generate([x[0], x[1, :2]], 5, 0.0)
    assert torch.equal(ragged[0], out[0])
    assert torch.equal(ragged[1], model.generate(x[1, :2], 5, 0.0)), "padding moves nothing"
    plain = model.generate(x, 5, 0.0, temporal_parallel_passes=1)
    never = model.generate(x, 5, 0.0, process_prompt=False, should_fuse_latent=lambda step: False)
    assert torch.equal(plain, never)
    ended = model.generate(x, 5, 0.0, eos_token=int(out[0, 1]))
    assert not ended[0, 2:].any()


@pytest.mark.parametrize("kind", NETS)
@torch.no_grad()
def test_cached_steps_are_as_many_passes_as_there_are_tokens(kind: str) -> None:
    """The feedback of a pass reaches one token further, so that a pass for each token is exact."""
    model, x = build(kind), ids()[:, :1]
    out = model.generate(x, 6, 0.0)
    whole = torch.cat((x, out), dim=1)
    for t in range(6):
        logits = model(whole[:, : t + 1], return_loss=False, temporal_parallel_passes=t + 2)
        assert torch.equal(out[:, t], logits[:, -1].argmax(dim=-1))


@torch.no_grad()
def test_rows_end_at_their_own_steps() -> None:
    model, x = build(), ids(4)[:, :4]
    torch.manual_seed(0)
    out = model.generate(x, 8, 5.0)
    end = int(out[0, 2])
    torch.manual_seed(0)
    ended = model.generate(x, 8, 5.0, eos_token=end)
    rows = [row[: row.index(end) + 1] if end in row else row for row in out.tolist()]
    longest = max(map(len, rows))
    assert ended.tolist() == [row + [0] * (longest - len(row)) for row in rows]
    assert len({len(row) for row in rows}) > 1


@torch.no_grad()
def test_generation_beyond_the_positions_of_the_model() -> None:
    model, x = build("rotary"), ids()
    out, ragged = model.generate(x, 20, 0.0), model.generate([x[0], x[1, :3]], 20, 0.0)
    assert torch.equal(ragged[0], out[0])
    assert torch.equal(ragged[1], model.generate(x[1, :3], 20, 0.0))
    with pytest.raises(InputError, match=r"exceed `max_seq_len` = 16.* Generate less, or build the model with rotary"):
        build("absolute").generate(x, 11, 0.0)
    assert build("absolute").generate(x, 10, 0.0).shape == (2, 10)


@torch.no_grad()
def test_every_pass_over_a_prompt_has_the_arguments_of_the_caller() -> None:
    layers = Decoder(
        dim=DIM, depth=2, heads=2, attn_dim_head=8, verbose=False, depth_scale_residual=True, cross_attend=True
    )
    tied = {"tie_embedding": True, "post_emb_norm": True}
    model = perturb(
        FullBandwidth(TransformerWrapper(num_tokens=VOCAB, max_seq_len=16, attn_layers=layers, **tied))
    ).eval()
    x, context, mask = ids(), torch.randn(2, 3, DIM), torch.ones(2, N, dtype=torch.bool)
    mask[0, 2] = False
    first = model.generate(x, 1, 0.0, context=context, mask=mask)
    logits = model(x, return_loss=False, context=context, mask=mask)
    assert torch.equal(first[:, 0], logits[:, -1].argmax(dim=-1))
    other = x.clone()
    other[0, 2] = (x[0, 2] + 1) % VOCAB
    out = model.generate(x, 6, 0.0, context=context, mask=mask)
    assert torch.equal(out, model.generate(other, 6, 0.0, context=context, mask=mask)), "a hidden token was read"


def test_transitions_by_route_and_by_call() -> None:
    own = torch.nn.Bilinear(DIM, DIM, DIM)
    model = FullBandwidth(
        net(), recirc_pairs=[(3, 1, own), (2, 1), (3, 2)], transitions={(2, 1): "gru", 2: "linear"}, transition="glu"
    )
    kinds = [type(each).__name__ for each in model.transitions.values()]
    assert kinds == ["Bilinear", "GRUGatingTransition", "LinearTransition"]
    x = ids()
    plain = model.eval().net(x)
    close(model(x, return_loss=False, transition=lambda latents, stream: stream), plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temporal_parallel_passes": 0}, "read at least once"),
        ({"recirc_pairs": "some"}, "it must be pairs of blocks, or one of"),
        ({"recirc_pairs": [(4, 1)]}, "of blocks 1 to 3"),
        ({"recirc_pairs": [(3, 1), (3, 1)]}, "none twice"),
        ({"transition": "mlp"}, "`transition` is 'mlp'"),
        ({"transitions": {2: "glu"}}, r"`transitions` names \[2\]"),
        ({"jitter_noise_delta": -1.0}, "a size of 0 or more"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FullBandwidth(net(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tie_embedding": False}, "`tie_embedding = True`"),
        ({"post_emb_norm": False}, "`post_emb_norm = True`"),
        ({"emb_dim": 8}, "`tie_embedding` needs embeddings of the stack's width 16"),
        ({"num_memory_tokens": 1, "memory_tokens_interspersed_every": 2}, "between tokens"),
    ],
)
def test_models_without_feedback(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FullBandwidth(net(**options))
    for call in (build(), lambda x, **given: build().generate(x, 2, **given)):
        with pytest.raises(InputError, match="cannot be given to passes with feedback"):
            call(ids(), prepend_embeds=torch.zeros(2, 1, DIM))
    with pytest.raises(InputError, match="new, untrained weights"):
        build()(ids(), transition=str)


@pytest.mark.parametrize("kind", ["rotary", "memory tokens", "residual streams"])
@torch.no_grad()
def test_nothing_follows_from_hidden_tokens(kind: str) -> None:
    """Neither in a mask of any form, nor after the last prompt token."""
    model, x = build(kind, recirc_pairs="dense"), ids()
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, :2], mask[1, 3], mask[1, -1] = False, False, False
    other = torch.where(mask, x, (x + 1) % VOCAB)
    wanted, got = (model(each, return_loss=False, mask=mask) for each in (x, other))
    close(got[mask], wanted[mask])
    assert torch.equal(model.generate(x, 5, 0.0, mask=mask), model.generate(other, 5, 0.0, mask=mask))
    # the mask of a loss covers all tokens, or those that are read
    ignored = x.masked_fill(~mask, -100)
    close(model(ignored, mask=mask), model(ignored, mask=mask[:, :-1]))
    assert model(ignored, mask=mask) != model(ignored)
