"""`GPTVAE`: the loss by hand, padding, dropped latent vectors, and generation from latent vectors."""

from typing import Any

import pytest
import torch
from catalog import close, perturb
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from x_transformers.errors import ConfigError, InputError
from x_transformers.gpt_vae import GPTVAE

VOCAB, N, LATENT = 12, 8, 3
SIZES: dict[str, Any] = {
    "num_tokens": VOCAB,
    "dim": 16,
    "depth": 1,
    "enc_depth": 1,
    "max_seq_len": 16,
    "dim_latent": LATENT,
    "heads": 2,
    "attn_dim_head": 8,
    "verbose": False,
}
POSITIONS = pytest.mark.parametrize("positions", [{}, {"rotary_pos_emb": True}], ids=["absolute", "rotary"])


def build(**options: Any) -> GPTVAE:
    return perturb(GPTVAE(**{**SIZES, **options})).eval()


def ids(batch: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (batch, N))


class Encoder(nn.Module):
    """An encoder of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.table(x) * mask[..., None]).sum(dim=1)


@pytest.mark.parametrize("options", [{}, {"encoder": Encoder()}, {"vae_kl_div_floor": 0.1, "vae_kl_loss_weight": 2.0}])
def test_the_loss_by_hand(options: dict[str, Any]) -> None:
    model, x = build(**options), ids()
    torch.manual_seed(0)
    latents, (mean, log_variance) = model.encode_to_latents(x, return_mean_log_var=True)
    torch.manual_seed(0)
    total, (loss, divergence) = model(x, return_all_losses=True)
    each = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0, 1))
    close(divergence, (each - options.get("vae_kl_div_floor", 0)).relu().sum(dim=-1).mean())
    slot = model.from_latent_to_prepend_token(latents)[:, None]
    close(loss, model.ar_wrapped_decoder(x, prepend_embeds=slot))
    close(total, loss + divergence * options.get("vae_kl_loss_weight", 1))


@POSITIONS
@pytest.mark.parametrize("pad_id", [-1, 5])
def test_a_padded_row_is_the_row_alone(pad_id: int, positions: dict[str, Any]) -> None:
    model, x = build(pad_id=pad_id, **positions), ids(1)
    x[x == pad_id] = 0
    padded = torch.cat((x[:, :5], torch.full((1, 3), pad_id)), dim=1)
    losses = []
    for row in (x[:, :5], padded):
        torch.manual_seed(0)
        losses.append(model(row))
    close(*losses)


@POSITIONS
def test_a_row_whose_latent_is_dropped_is_a_row_without(positions: dict[str, Any]) -> None:
    model, x = build(latents_dropout_prob=1.0, **positions).train(), ids()
    _, (loss, _) = model(x, return_all_losses=True)
    close(loss, model.ar_wrapped_decoder(x))
    perturb(model.from_latent_to_prepend_token)
    close(model(x, return_all_losses=True)[1][0], loss)


def test_latents_come_from_another_text() -> None:
    model, x, other = build(), ids(), torch.randint(0, VOCAB, (3, 4))
    torch.manual_seed(0)
    latents = model.encode_to_latents(other)
    torch.manual_seed(0)
    _, (loss, _) = model(x, seq_for_latents=other, return_all_losses=True)
    close(loss, model.ar_wrapped_decoder(x, prepend_embeds=model.from_latent_to_prepend_token(latents)[:, None]))


@POSITIONS
def test_generation_from_latents(positions: dict[str, Any]) -> None:
    model, x, latents = build(ff_dropout=0.3, **positions).train(), ids(2)[:, :4], torch.randn(2, LATENT)
    out = model.generate(x, 5, latents=latents, temperature=0.0)
    close(out, model.generate(x, 5, latents=latents.tolist(), temperature=0.0, cache_kv=False))
    close(out[1], model.generate(x[1], 5, latents=latents[1], temperature=0.0))
    ragged = model.generate([x[0], x[1, :2]], 5, latents=latents, temperature=0.0)
    close(ragged[0], out[0])
    close(ragged[1], model.generate(x[1, :2], 5, latents=latents[1], temperature=0.0))
    assert model.training
    torch.manual_seed(0)
    drawn = model.generate(x, 5, seq_for_latents=x, temperature=0.0)
    torch.manual_seed(0)
    latents = model.eval().encode_to_latents(x)
    close(drawn, model.generate(x, 5, latents=latents, temperature=0.0))


def test_refusals() -> None:
    model, x = build(), ids(2)
    with pytest.raises(InputError, match="give only one of them"):
        model.generate(x, 2, latents=torch.zeros(LATENT), seq_for_latents=x)
    with pytest.raises(InputError, match=r"`latents` has shape \(3, 3\); it must be \(3,\), or \(2, 3\)"):
        model.generate(x, 2, latents=torch.zeros(3, LATENT))
    with pytest.raises(InputError, match="where the latent vector goes"):
        model.generate(x, 2, latents=torch.zeros(LATENT), prepend_embeds=torch.zeros(2, 1, 16))
    for options, words in (
        ({"latents_dropout_prob": 2.0}, r"must lie in \[0, 1\]"),
        ({"vae_kl_div_floor": -1.0}, "a divergence is 0 or more"),
        ({"encoder": Encoder(), "enc_kwargs": {"heads": 1}}, "an encoder that is not built"),
        ({"enc_kwargs": {"dim": 8}}, "`dim` in `enc_kwargs`"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(**options)
