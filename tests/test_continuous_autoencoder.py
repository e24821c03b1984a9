"""`ContinuousTransformerAutoencoder`: what predicts what, dropped latent vectors, and both bottlenecks by hand."""

import json
from typing import Any

import pytest
import torch
from catalog import close, perturb
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from x_transformers.continuous_autoencoder import (
    ContinuousTransformerAutoencoder,
    DeterministicLatentBottleneck,
    VariationalLatentBottleneck,
)
from x_transformers.errors import ConfigError

DIM, WIDTH, LATENT, N = 16, 5, 3, 6
SIZES: dict[str, Any] = {
    "dim": DIM,
    "dim_input": WIDTH,
    "dim_latent": LATENT,
    "enc_depth": 1,
    "dec_depth": 2,
    "max_seq_len": N,
    "heads": 2,
    "attn_dim_head": 8,
}
POSITIONS = pytest.mark.parametrize("positions", [{}, {"rotary_pos_emb": True}], ids=["absolute", "rotary"])


class Constant(nn.Module):
    """A bottleneck that does not read the sequence."""

    def forward(self, x: Tensor, return_unreduced_loss: bool = False) -> tuple[Tensor, None]:
        return x.new_full((len(x), LATENT), 0.7), None


def build(**options: Any) -> ContinuousTransformerAutoencoder:
    return perturb(ContinuousTransformerAutoencoder(**{**SIZES, **options})).eval()


def predictions(model: ContinuousTransformerAutoencoder, seq: Tensor, **given: Any) -> Tensor:
    """The outputs of the decoder in one pass of the model."""
    outputs: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(seq, **given)
    hook.remove()
    return outputs[0]


@POSITIONS
def test_a_vector_is_predicted_without_being_read(positions: dict[str, Any]) -> None:
    model, seq = build(bottleneck=Constant(), **positions), torch.randn(2, N, WIDTH)
    wanted = predictions(model, seq)
    assert wanted.shape == seq.shape
    for t in range(N):
        changed = seq.clone()
        changed[:, t] += 1
        moved = (predictions(model, changed) != wanted).any(dim=-1)
        assert not moved[:, : t + 1].any(), "a prediction has read what it predicts, or what comes later"
        assert moved[:, t + 1 :].all()


@pytest.mark.parametrize(("loss_type", "error"), [("l2", lambda e: e.square()), ("l1", lambda e: e.abs())])
def test_the_loss_is_the_mean_error_of_valid_vectors(loss_type: str, error: Any) -> None:
    model, seq, lens = build(loss_type=loss_type), torch.randn(3, N, WIDTH), torch.tensor([N, 2, 1])
    errors = error(predictions(model, seq, lens=lens) - seq).mean(dim=-1)
    rows = [errors[row, :length].mean() for row, length in enumerate(lens.tolist())]
    close(model(seq, lens=lens, return_unreduced_loss=True), torch.stack(rows))
    close(model(seq, lens=lens), sum(row * n for row, n in zip(rows, lens.tolist(), strict=True)) / lens.sum())
    total, (reconstruction, aux) = model(seq, lens=lens, return_all_losses=True)
    assert aux == 0
    assert torch.equal(total, reconstruction)


@POSITIONS
@pytest.mark.parametrize("bottleneck_type", ["deterministic", "variational"])
def test_a_padded_row_is_the_row_without_padding(bottleneck_type: str, positions: dict[str, Any]) -> None:
    model, seq, lens = build(bottleneck_type=bottleneck_type, **positions), torch.randn(3, N, WIDTH), [N, 4, 1]

    def losses(x: Tensor, **given: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the draw of one row
        total, parts = model(x, return_all_losses=True, return_unreduced_loss=True, **given)
        return total, *parts

    for length in lens:
        padded = seq[:1].clone()
        padded[:, length:] = 1e3
        got = losses(padded, lens=torch.tensor([length]))
        for one, another in zip(got, losses(seq[:1, :length]), strict=True):
            close(one, another)


@POSITIONS
@torch.no_grad()
def test_a_row_whose_latent_is_dropped_does_not_see_it(positions: dict[str, Any]) -> None:
    seq = torch.randn(4, N, WIDTH)
    model = build(latents_dropout_prob=1.0, **positions).train()
    dropped = predictions(model, seq)
    close(dropped[:, 1:], model.decoder(seq[:, :-1]))  # at the positions that tokens have without a latent
    perturb(model.encoder)
    perturb(model.from_latent_to_prepend_token)
    assert torch.equal(predictions(model, seq), dropped)

    model = build(latents_dropout_prob=0.5, **positions).train()
    kept = predictions(model.eval(), seq)
    torch.manual_seed(0)
    some = predictions(model.train(), seq)
    torch.manual_seed(0)
    seen = nn.functional.dropout(torch.ones(4, 1), 0.5) != 0
    assert seen.any() and not seen.all()  # noqa: PT018
    model.latents_dropout_prob = 1.0
    none = predictions(model, seq)
    close(some, torch.where(seen[..., None], kept, none))


def test_the_divergence_is_that_of_normal_distributions() -> None:
    bottleneck, x = perturb(VariationalLatentBottleneck(DIM, LATENT)), torch.randn(7, DIM)
    mean, log_variance = bottleneck.to_mean_log_var(x).split(LATENT, dim=-1)
    each = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    close(bottleneck(x, return_unreduced_loss=True)[1], each.sum(dim=-1))
    close(bottleneck(x)[1], each.sum(dim=-1).mean())
    floor = each.median().item()
    bottleneck.kl_div_floor = floor
    close(bottleneck(x, return_unreduced_loss=True)[1], (each - floor).clamp(min=0).sum(dim=-1))

    torch.manual_seed(0)
    z, _ = bottleneck(x[:1].expand(20000, -1))
    torch.testing.assert_close(z.mean(dim=0), mean[0], atol=0.1, rtol=0.02)
    torch.testing.assert_close(z.std(dim=0), (log_variance[0] / 2).exp(), atol=0.1, rtol=0.02)


def test_losses_of_the_bottleneck_are_added() -> None:
    model = build(bottleneck_type="variational", variational_bottleneck_kwargs={"kl_div_floor": 0.001})
    assert model.bottleneck.kl_div_floor == 0.001
    seq = torch.randn(3, N, WIDTH)
    total, (reconstruction, aux) = model(seq, return_all_losses=True)
    assert aux > 0
    assert torch.equal(total, reconstruction + aux)
    torch.manual_seed(0)
    latents, loss = model.encode(seq, return_aux_loss=True)
    torch.manual_seed(0)
    assert torch.equal(model.encode(seq), latents)
    assert latents.shape == (3, LATENT)
    close(loss, aux)


def test_an_activation_bounds_the_latents() -> None:
    model = build(deterministic_bottleneck_kwargs={"activation": torch.tanh})
    seq = torch.randn(3, N, WIDTH) * 100
    close(model.encode(seq), model.bottleneck.proj(model.encoder(seq)).tanh())


def test_names_of_parameters() -> None:
    names = set(build().state_dict())
    outside = {name for name in names if "attn_layers" not in name}
    assert outside == {
        "encoder.pos_emb.emb.weight",
        "encoder.project_in.weight",
        "bottleneck.proj.weight",
        "bottleneck.proj.bias",
        "from_latent_to_prepend_token.0.weight",
        "from_latent_to_prepend_token.0.bias",
        "decoder.pos_emb.emb.weight",
        "decoder.project_in.weight",
        "decoder.project_out.weight",
    }
    same_width = set(build(dim_input=None).state_dict())
    assert names - same_width == {"encoder.project_in.weight"}
    variational = set(build(bottleneck_type="variational").state_dict()) - names
    assert variational == {"bottleneck.to_mean_log_var.0.weight", "bottleneck.to_mean_log_var.0.bias"}


def test_a_config_builds_the_same_model() -> None:
    model = build(bottleneck_type="variational", enc_kwargs={"ff_glu": True}, rotary_pos_emb=True)
    again = ContinuousTransformerAutoencoder.from_config(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    seq = torch.randn(2, N, WIDTH)
    drawn = []
    for one in (model, again):
        torch.manual_seed(0)
        drawn.append(one(seq))
    assert torch.equal(*drawn)
    assert again.encoder.attn_layers.config != again.decoder.attn_layers.config
    own = build(bottleneck=Constant())
    assert ContinuousTransformerAutoencoder.from_config(own.config, bottleneck=Constant()).bottleneck is not None
    assert own.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "huber"}, "`loss_type` is 'huber'; it must be 'l2' or 'l1'"),
        ({"bottleneck_type": "vq"}, "'deterministic' or 'variational'"),
        ({"latents_dropout_prob": 1.5}, r"1.5; it must lie in \[0, 1\]"),
        ({"variational_bottleneck_kwargs": {"kl_div_floor": 0.1}}, "`bottleneck_type` is 'deterministic'"),
        (
            {"bottleneck": Constant(), "deterministic_bottleneck_kwargs": {"activation": torch.tanh}},
            "a `bottleneck` is given",
        ),
        (
            {"bottleneck_type": "variational", "variational_bottleneck_kwargs": {"kl_div_floor": -1.0}},
            "`kl_div_floor` is -1.0",
        ),
        ({"depth": 2}, "`depth`: set"),
        ({"enc_kwargs": {"dim": 8}}, "`dim` in `enc_kwargs`"),
        ({"rotary": True}, "unknown keyword `rotary`"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_a_bottleneck_by_itself() -> None:
    x = torch.randn(2, DIM)
    bottleneck = DeterministicLatentBottleneck(DIM, LATENT, activation=nn.Tanh())
    latents, loss = bottleneck(x)
    assert loss is None
    close(latents, bottleneck.proj(x).tanh())
