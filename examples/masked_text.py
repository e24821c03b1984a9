"""Fill in masked bytes of text from both sides, and generate text by filling in windows of masks only.

An encoder reads windows of the source of Python's standard library in which a random fraction of the bytes is masked,
and predicts the masked bytes; near the end of training it also learns to criticize its own predictions. It then fills
in held-out text, scores each byte given all others (the pseudo-likelihood), and generates windows in 32 rounds, each of
which keeps the new bytes that the critic scores best.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import Encoder, NonAutoregressiveWrapper, TransformerWrapper
from x_transformers.training.small_runs import arguments, fit, library_text, random_windows, spaced_windows

LENGTH, BATCH, MASK, TESTED = 64, 16, 256, 256
FRACTIONS = (0.02, 0.15, 0.3, 0.5, 0.8)


def small_stack() -> Encoder:
    """Build three layers with rotary positions and QK-RMSNorm; each sublayer starts as the identity."""
    return Encoder(
        dim=96,
        depth=3,
        heads=3,
        attn_dim_head=32,
        rotary_pos_emb=True,
        rotary_emb_dim=32,
        attn_qk_rmsnorm=True,
        attn_zero_init_output=True,
        ff_zero_init_output=True,
    )


def start_evenly(net: TransformerWrapper) -> None:
    """Initialize embeddings with unit variance and the head near zero: all bytes are equally likely at first."""
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    torch.nn.init.normal_(net.to_logits.weight, std=1e-4)


def build_model() -> NonAutoregressiveWrapper:
    """Build a small encoder over bytes and the mask token, with a critic head that detects wrong bytes."""
    net = TransformerWrapper(num_tokens=257, max_seq_len=LENGTH, attn_layers=small_stack())
    start_evenly(net)
    return NonAutoregressiveWrapper(
        net,
        mask_id=MASK,
        steps=32,
        self_token_critic=True,
        use_simple_mdlm_loss_weight=False,
    )


@torch.no_grad()
def fill(model: NonAutoregressiveWrapper, rows: Tensor, masked: Tensor) -> Tensor:
    """Return the rows with the most likely byte at each masked place."""
    return torch.where(masked, model.net(rows.masked_fill(masked, MASK))[..., :MASK].argmax(dim=-1), rows)


@torch.no_grad()
def pseudo_likelihood(model: NonAutoregressiveWrapper, rows: Tensor) -> float:
    """Return bits per byte of each byte given all others, from one pass per place, with that place masked."""
    bits = []
    for place in range(LENGTH):
        masked = torch.arange(LENGTH, device=rows.device) == place
        logits = model.net(rows.masked_fill(masked, MASK))[:, place]
        bits.append(F.cross_entropy(logits, rows[:, place]) / math.log(2))
    return float(torch.stack(bits).mean())


def readable(row: Tensor, masked: Tensor | None = None) -> str:
    """Return a row as one line of text, with dots for masks and arrows for line ends."""
    text = bytes(row.tolist()).decode("latin-1")
    shown = [c if c.isprintable() else "↵" if c == "\n" else "?" for c in text]
    return "".join(c if masked is None or not masked[i] else "·" for i, c in enumerate(shown))


def main() -> None:
    options = arguments(__doc__, "masked_text", steps=600)
    text, held_out = library_text()
    model = build_model().to(options.device)
    steps = itertools.count()

    def loss() -> Tensor:
        step = next(steps)
        windows = random_windows(text, BATCH, LENGTH, options.seed, step).to(options.device)
        # the critic learns late: at first almost every prediction is wrong
        return model(windows, only_train_generator=step < 0.7 * options.steps).loss

    fit(model, loss, options.steps, lr=1e-2, muon_lr=2e-2)

    rows = spaced_windows(held_out, LENGTH, most=TESTED)[:, :LENGTH].to(options.device)
    lines = [f"{(rows == 32).float().mean():.0%} of the bytes are the most common one, a space."]
    for fraction in FRACTIONS:
        masked = (torch.rand(rows.shape) < fraction).to(options.device)
        right = (fill(model, rows, masked) == rows)[masked].float().mean()
        lines.append(f"{fraction:4.0%} masked: {right:.1%} of the masked bytes are filled in correctly")
    lines.append(f"pseudo-likelihood of held-out text: {pseudo_likelihood(model, rows[:64]):.2f} bits per byte")
    for row in rows[20:23]:
        masked = (torch.rand(row.shape) < 0.15).to(options.device)
        lines += ["", readable(row, masked), readable(fill(model, row[None], masked[None])[0]), readable(row)]
    lines += ["", "Generated from masks only:"]
    lines += [
        readable(row) for row in model.generate(6, start_temperature=2.0, filter_thres=0.9, noise_level_scale=2.0)
    ]
    (options.out / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
