"""Recall values by their keys: recurrences forget, and one layer of attention in four remembers.

A row draws some keys and a value for each, and repeats these pairs in random order: after a key that was there before,
its value can be predicted. A recurrence has to hold all pairs in a state of fixed size, into which only a few fit. A
hybrid, three recurrences and one attention, only needs recurrences that join each value to its key, since attention
finds it again. The picture shows the fraction of values that are recalled, by the number of pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper, plots
from x_transformers.training.small_runs import arguments, fit

KEYS, VALUES, SHOWN, BATCH, TESTED = 64, 16, 64, 32, 256
PAIRS = (4, 8, 16, 32)  # of a row; training has all of these
NEW = -1  # instead of the value of a key that was not there before

MAMBA: dict[str, Any] = {"mixer": "mamba2", "mixer_expand": 1, "mixer_head": 16, "mixer_state": 8}
DELTA: dict[str, Any] = {"mixer": "gated_delta", "mixer_heads": 2, "mixer_dim_key": 8, "mixer_dim_value": 16}
LAYERS = {
    "Mamba-2": MAMBA,
    "Gated DeltaNet": DELTA,
    "Mamba-2, one attention in four": MAMBA | {"layer_period": "mmam"},
}


def make_rows(rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Return ids `(rows, 2 SHOWN)`, keys and their values in turn, and the values `(rows, SHOWN)` to recall."""
    keys, values = torch.rand(rows, KEYS).argsort(dim=1)[:, :pairs], torch.randint(VALUES, (rows, pairs))
    shown = torch.randint(pairs, (rows, SHOWN))
    again = (shown[:, :, None] == shown[:, None, :]).tril(-1).any(dim=-1)
    value = values.gather(1, shown)
    ids = torch.stack((keys.gather(1, shown), value + KEYS), dim=-1).flatten(1)
    return ids, value.masked_fill(~again, NEW)


def build_model(layers: dict[str, Any]) -> TransformerWrapper:
    """Build a decoder of four blocks with these token mixers; the order of tokens is in the recurrences."""
    decoder = Decoder(dim=64, depth=4, heads=4, attn_dim_head=16, ff_mult=2, **layers)
    net = TransformerWrapper(
        num_tokens=KEYS + VALUES, max_seq_len=2 * SHOWN, use_abs_pos_emb=False, attn_layers=decoder
    )
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    torch.nn.init.normal_(net.to_logits.weight, std=1e-4)  # all values are equally likely at first
    return net


def answers(model: TransformerWrapper, ids: Tensor) -> Tensor:
    """Return the logits of values `(rows, SHOWN, VALUES)` after each key."""
    return model(ids[:, :-1])[:, ::2, KEYS:]


@torch.no_grad()
def recalled(model: TransformerWrapper, pairs: int, device: torch.device) -> float:
    """Return the fraction of values that the model recalls out of this number of pairs."""
    ids, values = (t.to(device) for t in make_rows(TESTED, pairs))
    right = answers(model, ids).argmax(dim=-1) == values
    return right[values != NEW].float().mean().item()


def drawn(lines: dict[str, Any]) -> Any:
    """Return a figure of the fractions that are recalled, by the number of pairs."""
    figure = plots.learning_curve(lines, x="pairs", y="values recalled")
    (axes,) = figure.axes
    axes.set_xscale("log", base=2)
    axes.set_xticks(PAIRS, [str(pairs) for pairs in PAIRS])
    axes.set_ylim(0, 1.05)
    return figure


def main() -> None:
    options = arguments(__doc__, "recall_hybrid", steps=300)
    lines = {}
    for name, layers in LAYERS.items():
        torch.manual_seed(options.seed)
        model = build_model(layers).to(options.device)

        def loss(model: TransformerWrapper = model) -> Tensor:
            pairs = PAIRS[int(torch.randint(len(PAIRS), ()))]
            ids, values = (t.to(options.device) for t in make_rows(BATCH, pairs))
            return F.cross_entropy(answers(model, ids).flatten(0, 1), values.flatten(), ignore_index=NEW)

        fit(model, loss, options.steps, lr=1e-2, muon_lr=2e-2, name=f"{name:>30}")
        found = [recalled(model, pairs, options.device) for pairs in PAIRS]
        lines[name] = (PAIRS, found)
        print(f"{name:>30}: " + ", ".join(f"{each:.1%}" for each in found) + f" recalled out of {PAIRS} pairs")
    figure = drawn(lines)
    figure.savefig(options.out / "recalled.png", dpi=plots.DPI)
    print(f"{options.out / 'recalled.png'} shows them.")


if __name__ == "__main__":
    main()
