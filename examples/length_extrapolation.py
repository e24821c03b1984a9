"""Train on short text, then read text that is eight times as long: which position encodings extrapolate?

For each position encoding, a small decoder learns from windows of 64 bytes of the source of Python's standard library.
Then each of them predicts the same held-out bytes with 64, 128, 256 and 512 bytes of text before them. More text can
only help a model that can use it; where a curve rises, the model fails at distances that were not in training.
"""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, plots
from x_transformers.training.small_runs import arguments, fit, library_text, random_windows, spaced_windows

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


def start_evenly(net: TransformerWrapper) -> None:
    """Initialize embeddings with unit variance and the head near zero: all bytes are equally likely at first."""
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    torch.nn.init.normal_(net.to_logits.weight, std=1e-4)


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


def train_model(positions: dict[str, Any], text: Tensor, options: Namespace, name: str) -> AutoregressiveWrapper:
    """Train a model; all models see the same windows."""
    torch.manual_seed(options.seed)
    model = build_model(positions).to(options.device)
    windows = (random_windows(text, BATCH, CONTEXT + 1, options.seed, step) for step in itertools.count())
    fit(model, lambda: model(next(windows).to(options.device)), options.steps, lr=1e-2, muon_lr=2e-2, name=name)
    return model


def main() -> None:
    options = arguments(__doc__, "length_extrapolation", steps=160)
    lengths = [CONTEXT * times for times in TIMES]
    text, held_out = library_text()
    held_out = spaced_windows(held_out, lengths[-1], most=WINDOWS).to(options.device)

    print(f"{'held-out bits per byte with':>28}" + "".join(f"{length:>8}" for length in lengths) + " bytes")
    curves = {}
    for name, positions in POSITIONS.items():
        model = train_model(positions, text, options, f"{name:>28}")
        curves[name] = [bits_per_byte(model, held_out, length) for length in lengths]
        print(f"{name:>28}" + "".join(f"{bits:8.3f}" for bits in curves[name]))
    lines = {f"{name}: {bits[-1] - bits[0]:+.2f}": (lengths, bits) for name, bits in curves.items()}
    figure = plots.learning_curve(lines, x="bytes of text, trained with the first", y="held-out bits per byte")
    figure.set_size_inches(7, 4.2)
    (axes,) = figure.axes
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length}\n{times}x" for length, times in zip(lengths, TIMES, strict=True)])
    for number, line in enumerate(axes.lines):
        line.set_marker("os^vDPX*<>"[number % 10])
    axes.get_legend().remove()
    figure.legend(loc="outside right center", title="change")
    figure.savefig(options.out / "extrapolation.png", dpi=plots.DPI)
    print(f"{options.out / 'extrapolation.png'} shows the curves.")


if __name__ == "__main__":
    main()
