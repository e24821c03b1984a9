"""Train on short text, then read text that is eight times as long: which position encodings extrapolate?

For each position encoding, a small decoder learns from windows of 64 bytes of the source of Python's standard library.
Then each of them predicts the same held-out bytes with 64, 128, 256 and 512 bytes of text before them. More text can
only help a model that can use it; where a curve rises, the model fails at distances that were not in training.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from pictures import extrapolation_curves
from text_data import random_windows, read_text, spaced_windows
from text_model import start_evenly
from torch import Tensor
from training import arguments, train

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

CONTEXT, BATCH, TIMES, WINDOWS = 64, 32, (1, 2, 4, 8), 128
SCORED = CONTEXT // 2  # bytes at the end of a window; each has at least as many bytes before it

ROTARY = {"rotary_pos_emb": True, "rotary_emb_dim": 32}
NO_TABLE = {"use_abs_pos_emb": False}  # rotary positions and the T5 bias imply it
POSITIONS = {
    "learned table": {},
    "sinusoids": {"scaled_sinu_pos_emb": True},
    "none": NO_TABLE,
    "rotary": ROTARY,
    "rotary, window of 32": ROTARY | {"attn_max_attend_past": CONTEXT // 2},
    "xPos": ROTARY | {"rotary_xpos": True},
    "T5 bias": {"rel_pos_bias": True, "rel_pos_max_distance": CONTEXT // 2},
    "ALiBi": NO_TABLE | {"alibi_pos_bias": True},
    "forget gates": NO_TABLE | {"attn_data_dependent_alibi": True},
}
OF_THE_MODEL = ("use_abs_pos_emb", "scaled_sinu_pos_emb")  # all others are keywords of the stack


def build_model(positions: dict[str, Any]) -> AutoregressiveWrapper:
    """Build a decoder of two layers over bytes with these options, for sequences up to the longest text."""
    decoder = Decoder(
        dim=64,
        depth=2,
        heads=4,
        attn_dim_head=32,
        attn_qk_rmsnorm=True,
        attn_zero_init_output=True,
        ff_zero_init_output=True,
        **{name: value for name, value in positions.items() if name not in OF_THE_MODEL},
    )
    net = TransformerWrapper(
        num_tokens=256,
        max_seq_len=CONTEXT * max(TIMES),
        attn_layers=decoder,
        **{name: value for name, value in positions.items() if name in OF_THE_MODEL},
    )
    start_evenly(net)
    return AutoregressiveWrapper(net)


@torch.no_grad()
def bits_per_byte(model: AutoregressiveWrapper, windows: Tensor, length: int) -> float:
    """Return bits per byte of the last `SCORED` bytes of windows; the last byte has `length` bytes before it."""
    bits = []
    for rows in windows[:, -length - 1 :].split(32):
        logits = model.net(rows[:, :-1])[:, -SCORED:]
        bits.append(F.cross_entropy(logits.transpose(1, 2), rows[:, -SCORED:], reduction="none") / math.log(2))
    return float(torch.cat(bits).mean())


def main() -> None:
    options = arguments(__doc__, "length_extrapolation", steps=160)
    lengths = [CONTEXT * times for times in TIMES]
    text, held_out = read_text(None, lengths[-1])
    held_out = spaced_windows(held_out, lengths[-1], most=WINDOWS)

    print(f"{'held-out bits per byte with':>28}" + "".join(f"{length:>8}" for length in lengths) + " bytes")
    curves = {}
    for name, positions in POSITIONS.items():
        torch.manual_seed(options.seed)
        model = build_model(positions)
        batches = (random_windows(text, BATCH, CONTEXT + 1, options.seed, step) for step in itertools.count())
        train(model, lambda: model(next(batches)), options.steps, lr=1e-2, muon_lr=2e-2, name=f"{name:>28}")  # noqa: B023
        curves[name] = [bits_per_byte(model, held_out, length) for length in lengths]
        print(f"{name:>28}" + "".join(f"{bits:8.3f}" for bits in curves[name]))
    extrapolation_curves(curves, lengths, options.out / "extrapolation.png")
    print(f"{options.out / 'extrapolation.png'} shows the curves.")


if __name__ == "__main__":
    main()
