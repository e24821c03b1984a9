"""Fill in masked bytes of text from both sides, and write text by filling in a window of nothing but masks.

An encoder sees windows of the source of Python's standard library with a part of the bytes masked, between all and
none, and predicts those; near the end it also learns to criticise what it filled in. It then fills in held-out text,
says how likely it finds each byte given all others (the pseudo-likelihood), and writes windows of its own in 32 rounds,
each of which keeps the new bytes that its critic likes best.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from text_data import random_windows, read_text, spaced_windows
from text_model import small_stack, start_evenly
from torch import Tensor
from training import arguments, train

from x_transformers import Encoder, NonAutoregressiveWrapper, TransformerWrapper

LENGTH, BATCH, MASK, TESTED = 64, 16, 256, 256
FRACTIONS = (0.02, 0.15, 0.3, 0.5, 0.8)


def build_model() -> NonAutoregressiveWrapper:
    """A small encoder over bytes and the mask, with a head that tells wrong bytes from right ones."""
    net = TransformerWrapper(num_tokens=257, max_seq_len=LENGTH, attn_layers=small_stack(Encoder))
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
    """The rows with the likeliest byte in each masked place."""
    return torch.where(masked, model.net(rows.masked_fill(masked, MASK))[..., :MASK].argmax(dim=-1), rows)


@torch.no_grad()
def pseudo_likelihood(model: NonAutoregressiveWrapper, rows: Tensor) -> float:
    """Bits per byte of each byte given all others: one pass for each place, with that place masked."""
    bits = []
    for place in range(LENGTH):
        masked = torch.arange(LENGTH) == place
        logits = model.net(rows.masked_fill(masked, MASK))[:, place]
        bits.append(F.cross_entropy(logits, rows[:, place]) / math.log(2))
    return float(torch.stack(bits).mean())


def readable(row: Tensor, masked: Tensor | None = None) -> str:
    """A row as one line, with dots for masks and arrows for line ends."""
    text = bytes(row.tolist()).decode("latin-1")
    shown = [c if c.isprintable() else "↵" if c == "\n" else "?" for c in text]
    return "".join(c if masked is None or not masked[i] else "·" for i, c in enumerate(shown))


def main() -> None:
    options = arguments(__doc__, "masked_text", steps=600)
    text, held_out = read_text(None, LENGTH)
    model = build_model()
    steps = itertools.count()

    def loss() -> Tensor:
        step = next(steps)
        windows = random_windows(text, BATCH, LENGTH, options.seed, step)
        # there is little to criticise before the model fills in well
        return model(windows, only_train_generator=step < 0.7 * options.steps).loss

    train(model, loss, options.steps, lr=1e-2, muon_lr=2e-2)

    rows = spaced_windows(held_out, LENGTH, most=TESTED)[:, :LENGTH]
    lines = [f"{(rows == 32).float().mean():.0%} of the bytes are the commonest one, a space."]
    for fraction in FRACTIONS:
        masked = torch.rand(rows.shape) < fraction
        right = (fill(model, rows, masked) == rows)[masked].float().mean()
        lines.append(f"{fraction:4.0%} masked: {right:.1%} of the masked bytes are filled in as they were")
    lines.append(f"pseudo-likelihood of held-out text: {pseudo_likelihood(model, rows[:64]):.2f} bits per byte")
    for row in rows[20:23]:
        masked = torch.rand(row.shape) < 0.15
        lines += ["", readable(row, masked), readable(fill(model, row[None], masked[None])[0]), readable(row)]
    lines += ["", "Written from masks alone:"]
    lines += [
        readable(row) for row in model.generate(6, start_temperature=2.0, filter_thres=0.9, noise_level_scale=2.0)
    ]
    (options.out / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
