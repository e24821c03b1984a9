"""What should cost nothing, measured at length: `python -m benchmarks.features [NAME ...] [--length 1024]`.

Training steps per second (forward, backward, AdamW; eager) of a small decoder with one option, relative to the plain
one. All run in turn, round after round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import side_by_side
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

VOCABULARY, DIM, DEPTH, HEADS = 256, 384, 2, 6
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


def step(name: str, length: int) -> Callable[[], None]:
    """A training step on one row, of which padding takes a quarter where it is what is measured."""
    torch.manual_seed(0)
    layers = Decoder(dim=DIM, depth=DEPTH, heads=HEADS, **FEATURES[name])
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=length + 1, attn_layers=layers))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, VOCABULARY, (1, length + 1))
    given: dict[str, Any] = {}
    if name == "left padding":
        given["seq_start_pos"] = torch.tensor([length // 4])
    if name == "right padding":
        given["mask"] = torch.arange(length + 1)[None] < length * 3 // 4

    def once() -> None:
        optimizer.zero_grad()
        model(ids, **given).backward()
        optimizer.step()

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FEATURES)}; default all")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(FEATURES))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)} here; there are {', '.join(FEATURES)}")
    torch.set_num_threads(options.threads)
    names = dict.fromkeys(["plain", *(options.names or FEATURES)])
    seconds = side_by_side({name: step(name, options.length) for name in names}, options.rounds, warmup=1)
    for name in names:
        print(f"{name:<14} {seconds[name] * 1e3:7.1f} ms  {seconds['plain'] / seconds[name]:.2f}")


if __name__ == "__main__":
    main()
