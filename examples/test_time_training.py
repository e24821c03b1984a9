"""Learn a cipher while reading it: weights that each row adapts at test time, and the same model without.

Each row of a batch has a cipher of its own, a random permutation of letters. A segment shows every letter once, each
followed by its cipher, and the model keeps no memory of earlier segments: all that it can carry over are steps on its
weights. Training differentiates through these steps, so that the model learns weights from which one step is enough.
The picture shows how many ciphers are predicted correctly in each segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper, plots
from x_transformers.training.small_runs import arguments, fit
from x_transformers.xl_autoregressive_wrapper import TTTModuleWrapper

LETTERS, SEGMENTS, BATCH, TESTED = 16, 4, 32, 256
ADAPTED = "attn_layers.layers.3.1.ff.2"
"""The last linear map of the second feedforward, by the name that it has in the reference."""


def make_texts(rows: int) -> Tensor:
    """Return ids `(rows, SEGMENTS * 2 * LETTERS + 1)`: letters and their ciphers, which have ids of their own."""
    cipher = torch.rand(rows, LETTERS).argsort(dim=1)
    letters = torch.rand(rows, SEGMENTS, LETTERS).argsort(dim=2)
    ciphers = cipher[:, None].expand_as(letters).gather(2, letters) + LETTERS
    text = torch.stack((letters, ciphers), dim=-1).flatten(1)
    return torch.cat((text, text[:, :1]), dim=1)


def build_model(adapts: bool) -> XLAutoregressiveWrapper:
    """Build a decoder of two layers that reads segments without a memory."""
    decoder = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, rotary_pos_emb=True, rotary_emb_dim=16)
    net = TransformerWrapper(
        num_tokens=2 * LETTERS, max_seq_len=2 * LETTERS, max_mem_len=0, attn_layers=decoder, use_abs_pos_emb=False
    )
    if not adapts:
        return XLAutoregressiveWrapper(net)
    return XLAutoregressiveWrapper(net, tbptt_steps=SEGMENTS + 1, ttt_module_paths=(ADAPTED,), ttt_lr=1.0, ttt_wd=0.0)


def correct_by_segment(model: XLAutoregressiveWrapper, texts: Tensor) -> list[float]:
    """Return the fraction of ciphers that are predicted correctly in each segment."""
    fractions = []
    if model.has_ttt:
        model.init_ttt(len(texts))
    for begin in range(0, texts.shape[1] - 1, 2 * LETTERS):
        segment, labels = texts[:, begin : begin + 2 * LETTERS], texts[:, begin + 1 : begin + 2 * LETTERS + 1]
        logits = model.net(segment)
        fractions.append((logits.argmax(dim=-1) == labels)[:, ::2].float().mean().item())
        if model.has_ttt:
            model.update_ttt(logits, labels)
    TTTModuleWrapper.reset_all(model)
    return fractions


def main() -> None:
    options = arguments(__doc__, "test_time_training", steps=120)
    lines = {}
    for name, adapts in (("fixed weights", False), ("adapted weights", True)):
        torch.manual_seed(options.seed)
        model = build_model(adapts).to(options.device)
        fit(model, lambda model=model: model(make_texts(BATCH).to(options.device)), options.steps, lr=3e-3, name=name)
        correct = correct_by_segment(model, make_texts(TESTED).to(options.device))
        lines[name] = (range(1, SEGMENTS + 1), correct)
        print(f"{name}: " + ", ".join(f"{each:.1%}" for each in correct) + " of the ciphers correct in each segment")
    figure = plots.learning_curve(lines, x="segment", y="ciphers predicted correctly")
    figure.savefig(options.out / "correct.png", dpi=plots.DPI)
    print(f"{options.out / 'correct.png'} shows both.")


if __name__ == "__main__":
    main()
