"""Copy a string of letters with an encoder and a decoder, and draw how the decoder does it.

The decoder never reads the string itself. Through cross-attention it sees the encoder's output, where it has to find
each letter in turn, and the end. Strings have different lengths, so a batch of them is padded and masked. The picture
shows where the decoder attends while it writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers import XTransformer, plots
from x_transformers.training.small_runs import arguments, fit

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END, PAD = range(len(LETTERS), len(LETTERS) + 3)
SHORTEST, LONGEST, BATCH, TESTED = 8, 32, 32, 1000


def make_strings(rows: int) -> tuple[Tensor, Tensor]:
    """Return ids `(rows, LONGEST)` of random strings, padded on the right, and a mask that is True for letters."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (rows, 1))
    mask = torch.arange(LONGEST) < lengths
    return torch.randint(len(LETTERS), (rows, LONGEST)).masked_fill(~mask, PAD), mask


def framed(strings: Tensor, mask: Tensor) -> Tensor:
    """Return the decoder's targets `(rows, LONGEST + 2)`: start token, string, end token, padding."""
    rows = torch.arange(len(strings), device=strings.device)
    target = torch.nn.functional.pad(strings, (1, 1), value=PAD)
    target[:, 0], target[rows, mask.sum(dim=1) + 1] = START, END
    return target


def build_model() -> XTransformer:
    """Build encoder and decoder of two layers each (0.24 million parameters); the decoder ignores padding."""
    stack = {"num_tokens": len(LETTERS) + 3, "depth": 2, "heads": 4, "attn_dim_head": 16}
    return XTransformer(
        dim=64,
        tie_token_emb=True,
        ignore_index=PAD,
        pad_value=PAD,
        enc_max_seq_len=LONGEST,
        dec_max_seq_len=LONGEST + 2,
        **{f"{half}_{name}": value for half in ("enc", "dec") for name, value in stack.items()},
    )


def copy(model: XTransformer, strings: Tensor, mask: Tensor) -> Tensor:
    """Return the model's copy of each string up to its end token, `(rows, at most LONGEST + 1)`."""
    start = torch.full((len(strings), 1), START, device=strings.device)
    return model.generate(strings, start, LONGEST + 1, mask=mask, eos_token=END, temperature=0.0)


def spell(ids: Tensor) -> list[str]:
    """Return rows of ids as strings; a full stop is the end token."""
    return ["".join((LETTERS + "^.")[i] for i in row if i != PAD) for row in ids.tolist()]


@torch.no_grad()
def where_it_looks(model: XTransformer, strings: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the cross-attention weights `(b, written, read)` of each layer, averaged over heads."""
    context = model.encoder(strings, mask=mask)
    written = framed(strings, mask)[:, :-1]
    _, record = model.decoder.net(written, context=context, context_mask=mask, return_intermediates=True)
    return [attn.post_softmax_attn.mean(dim=1) for attn in record.attn_intermediates if attn.layer_type == "c"]


def main() -> None:
    options = arguments(__doc__, "copy_task", steps=600)
    model = build_model().to(options.device)

    def loss() -> Tensor:
        strings, mask = (t.to(options.device) for t in make_strings(BATCH))
        return model(strings, framed(strings, mask), mask=mask)

    fit(model, loss, options.steps, lr=3e-3)

    strings, mask = (
        t.to(options.device) for t in make_strings(TESTED)
    )  # out of at least 26 ** 8 strings: none of them was in training
    wanted, written = spell(framed(strings, mask)[:, 1:]), spell(copy(model, strings, mask))
    right = sum(copied == string for copied, string in zip(written, wanted, strict=True))
    for string, copied in zip(wanted[:5], written[:5], strict=True):
        print(f"{string}\n{copied}  {'right' if copied == string else 'wrong'}")
    print(f"exact copies: {right / TESTED:.1%} of {TESTED} strings that were not in training")

    length = len(wanted[0])
    maps = [weights[:, None, :length, : length - 1] for weights in where_it_looks(model, strings[:1], mask[:1])]
    figure = plots.attention(maps, queries=wanted[0], keys=wanted[0][:-1])
    figure.axes[0].set(xlabel="letters read", ylabel="letters written")
    figure.savefig(options.out / "attention.png", dpi=plots.DPI)
    print(f"{options.out / 'attention.png'} shows where the decoder attends.")


if __name__ == "__main__":
    main()
