"""Read long text in short segments, with memories of earlier segments (Transformer-XL) and without.

Two models, trained on the same windows of the source of Python's standard library, see 16 bytes at a time. One of them
keeps the inputs of its layers for the last 64 bytes as memories; the other starts over with each segment. Both then
read held-out text segment by segment, and the picture shows how well they predict the bytes at each place.
"""

from __future__ import annotations

import itertools
import math
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper, plots
from x_transformers.training.small_runs import arguments, fit, library_text, random_windows, spaced_windows

SEGMENT, MEMORY, SEGMENTS, BATCH, TESTED = 16, 64, 8, 8, 64


def small_stack() -> Decoder:
    """Build three layers with rotary positions and QK-RMSNorm; each sublayer starts as the identity."""
    return Decoder(
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


def build_model(memory: int) -> XLAutoregressiveWrapper:
    """Build a small decoder that reads segments, with memories of the last `memory` bytes."""
    decoder = small_stack()
    net = TransformerWrapper(num_tokens=256, max_seq_len=SEGMENT, max_mem_len=memory, attn_layers=decoder)
    start_evenly(net)
    return XLAutoregressiveWrapper(net)


def train_model(memory: int, text: Tensor, options: Namespace, name: str) -> XLAutoregressiveWrapper:
    """Train a model; all models see the same windows of `SEGMENTS` segments."""
    model = build_model(memory).to(options.device)
    length = SEGMENT * SEGMENTS + 1
    windows = (random_windows(text, BATCH, length, options.seed, step) for step in itertools.count())
    fit(model, lambda: model(next(windows).to(options.device)), options.steps, lr=1e-2, muon_lr=2e-2, name=name)
    return model


@torch.no_grad()
def bits_by_place(model: XLAutoregressiveWrapper, rows: Tensor) -> Tensor:
    """Return bits per byte at each place of a segment, `(SEGMENT,)`, over rows `(b, n * SEGMENT + 1)`."""
    segments = zip(rows[:, :-1].split(SEGMENT, dim=1), rows[:, 1:].split(SEGMENT, dim=1), strict=True)
    bits, mems = [], None
    for segment, following in segments:
        logits, mems = model.net(segment, mems=mems, return_mems=True)
        bits.append(F.cross_entropy(logits.transpose(1, 2), following, reduction="none") / math.log(2))
    return torch.stack(bits).mean(dim=(0, 1))


def main() -> None:
    options = arguments(__doc__, "xl_long_text", steps=250)
    text, held_out = library_text()
    rows = spaced_windows(held_out, context=64 * SEGMENT, most=TESTED).to(options.device)
    lines = {}
    for name, memory in (("without memories", 0), ("with memories", MEMORY)):
        bits = bits_by_place(train_model(memory, text, options, name), rows)
        lines[f"{name}: {bits.mean():.3f}"] = (range(SEGMENT), bits.tolist())
        print(f"{name}: {bits.mean():.3f} held-out bits per byte, {bits[0]:.2f} at the first byte of a segment")
    figure = plots.learning_curve(lines, x="place in the segment", y="held-out bits per byte")
    figure.savefig(options.out / "bits.png", dpi=plots.DPI)
    print(f"{options.out / 'bits.png'} shows both at each place of a segment.")


if __name__ == "__main__":
    main()
