"""Cost of options that should be nearly free on long rows: `python -m benchmarks.features [NAME ...] [--length 1024]`.

Measures training steps (forward, backward, AdamW; eager) of a small decoder with one option, relative to the plain
decoder. All run in turn, round after round. `benchmarks.run features` records all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from benchmarks.lengths import unpadded
from benchmarks.measure import side_by_side
from benchmarks.settings import Settings
from benchmarks.speed import Figures
from benchmarks.speed import step as training_step
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary_pos_emb": True},
    "grouped heads": {"attn_kv_heads": 2},
    "QK norm": {"attn_qk_norm": True},
    "QK RMSNorm": {"attn_qk_rmsnorm": True},
    "ALiBi": {"alibi_pos_bias": True},
    "T5 bias": {"rel_pos_bias": True},
    "soft clamp": {"attn_softclamp_logits": True},
    "window": {"attn_max_attend_past": 256},
    "left padding": {},
    "right padding": {},
}


def features(settings: Settings) -> Iterator[tuple[str, Figures]]:
    """Yield tokens per second for each option; padding counts."""
    length = settings.features
    taken = seconds(FEATURES, settings, length)
    yield f"{length:,} tokens", {name: length / each for name, each in taken.items()}


def seconds(names: Iterable[str], settings: Settings, length: int) -> dict[str, float]:
    """Return seconds per training step, those of the plain decoder first."""
    names = dict.fromkeys(["plain", *names])
    return side_by_side({name: step(name, settings, length) for name in names}, settings.rounds, warmup=1)


def step(name: str, settings: Settings, length: int) -> Callable[[], None]:
    """Return a training step on one row; a quarter of it is padding in the cases that measure padding."""
    torch.manual_seed(0)
    shape = settings.shape
    layers = Decoder(dim=shape.dim, depth=settings.short, heads=shape.heads, verbose=False, **FEATURES[name])
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=shape.vocab, max_seq_len=length, attn_layers=layers))
    ids = settings.tokens(1, length)
    given: dict[str, Any] = {}
    if name == "left padding":
        given["seq_start_pos"] = torch.tensor([length // 4], device=settings.device)
    if name == "right padding":
        given["mask"] = unpadded(ids)
    return training_step(model.to(settings.device, settings.dtype), lambda tokens: model(tokens, **given), ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"options to measure, out of {', '.join(FEATURES)}; default all"
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(FEATURES))
    if unknown:
        parser.error(f"unknown options {', '.join(unknown)}; choose from {', '.join(FEATURES)}")
    torch.set_num_threads(options.threads)
    taken = seconds(options.names or FEATURES, Settings(rounds=options.rounds), options.length)
    for name, each in taken.items():
        print(f"{name:<14} {each * 1e3:7.1f} ms  {taken['plain'] / each:.2f}")


if __name__ == "__main__":
    main()
