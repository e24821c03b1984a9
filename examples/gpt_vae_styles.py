"""Write strings in the style of a latent vector: a GPT whose first position is the latent of a variational autoencoder.

A style is a place in the alphabet and a spread: the letters of a string are drawn around the place. The encoder reads a
string and draws a latent vector of two numbers; the decoder writes another string of the same style, whose first letter
says nothing about it. Afterwards the decoder continues the letter m with latent vectors from a grid, and the picture
shows what it writes: the two numbers have become a map of the styles.
"""

from __future__ import annotations

from argparse import Namespace

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from x_transformers import plots
from x_transformers.gpt_vae import GPTVAE
from x_transformers.training.small_runs import arguments, fit

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FIRST = LETTERS.index("m")
LENGTH, BATCH, TESTED, GRID = 12, 64, 256, (5, 9)


def random_styles(rows: int) -> tuple[Tensor, Tensor]:
    """Return places in the alphabet and spreads, `(rows, 1)` each."""
    return torch.rand(rows, 1) * (len(LETTERS) - 1), 0.5 + 3 * torch.rand(rows, 1)


def make_strings(place: Tensor, spread: Tensor) -> Tensor:
    """Return ids `(rows, LENGTH)` of strings: any letter, then letters around the place of their row."""
    letters = (place + spread * torch.randn(len(place), LENGTH)).round().clamp(0, len(LETTERS) - 1).long()
    letters[:, 0] = torch.randint(len(LETTERS), (len(place),))
    return letters


def build_model() -> GPTVAE:
    """Build a GPT of two layers and an encoder of one, with a latent of two numbers."""
    return GPTVAE(
        num_tokens=len(LETTERS),
        dim=64,
        depth=2,
        enc_depth=1,
        max_seq_len=LENGTH,
        dim_latent=2,
        heads=4,
        attn_dim_head=16,
        vae_kl_loss_weight=0.03,
        latents_dropout_prob=0.0,
        rotary_pos_emb=True,
        rotary_emb_dim=16,
    )


def loss(model: GPTVAE, device: torch.device | str) -> Tensor:
    """Return the loss of new strings, each with the latent vector of another one of the same style."""
    styles = random_styles(BATCH)
    return model(make_strings(*styles).to(device), seq_for_latents=make_strings(*styles).to(device))


def write(model: GPTVAE, latents: Tensor) -> Tensor:
    """Return what is written after the first letter with each latent vector `(rows, 2)`."""
    prompts = torch.full((len(latents), 1), FIRST, device=latents.device)
    return model.generate(prompts, LENGTH - 1, latents=latents, filter_logits_fn="top_p")


def draw(model: GPTVAE, options: Namespace) -> None:
    """Draw what is written at each point of a grid of latent vectors, colored by its place in the alphabet."""
    rows, columns = GRID
    grid = torch.cartesian_prod(torch.linspace(-2, 2, rows), torch.linspace(-2, 2, columns))
    written = write(model, grid.to(options.device)).cpu()
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        colors = mpl.colormaps["viridis"]
        for (x, y), letters in zip(grid.tolist(), written, strict=True):
            color = colors(letters.float().mean().item() / len(LETTERS))
            text = "".join(LETTERS[i] for i in letters)
            axes.text(x, y, text, ha="center", va="center", color=color, family="monospace")
        axes.set(xlim=(-2.6, 2.6), ylim=(-2.3, 2.3), xlabel="first number of the latent", ylabel="second number")
        figure.savefig(options.out / "styles.png", dpi=plots.DPI)


def main() -> None:
    options = arguments(__doc__, "gpt_vae_styles", steps=300)
    model = build_model().to(options.device)
    fit(model, lambda: loss(model, options.device), options.steps, lr=3e-3)
    place, spread = random_styles(TESTED)
    with torch.no_grad():
        _, (latents, _) = model.encode_to_latents(make_strings(place, spread).to(options.device), True)
        means = write(model, latents).float().mean(dim=1, keepdim=True).cpu()
        draw(model, options)
    away, apart = (means - place).abs().mean().item(), (means - place.flip(0)).abs().mean().item()
    print(f"written {away:.1f} letters away from the string that the latent is of; from any other one {apart:.1f}")
    print(f"{options.out / 'styles.png'} shows what is written over the plane of latents.")


if __name__ == "__main__":
    main()
