"""Teach a decoder a preference, by pairs of its own samples (direct preference optimisation).

The decoder first learns the names and words that Python's standard library is written in. Then it makes up names of its
own, and a program judges them: it prefers words joined by an underscore, `read_line` to `readline`. The policy learns
from pairs of names, while the reference, the decoder as it was, keeps it near to names that look real.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from series_pictures import draw_lines
from text_data import read_text
from torch import Tensor
from training import arguments, train

from x_transformers import DPO, AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.dpo import log_prob_from_model_and_seq

LETTERS = "abcdefghijklmnopqrstuvwxyz_"
END, PAD = len(LETTERS), len(LETTERS) + 1  # a name is END, its letters, END; then comes padding
LONGEST, BATCH, SAMPLES = 16, 64, 512


def read_names() -> Tensor:
    """`(names, LONGEST + 2)` ids of all different names of at least 3 letters."""
    text = bytes(read_text(None, LONGEST)[0].numpy()).decode("utf-8", errors="ignore")
    names = sorted(set(re.findall(rf"\b[a-z_]{{3,{LONGEST}}}\b", text)))
    rows = [[END, *map(LETTERS.index, name), END, *[PAD] * (LONGEST - len(name))] for name in names]
    return torch.tensor(rows)


def spell(ids: Tensor) -> list[str]:
    """The names that rows of ids stand for."""
    return ["".join(LETTERS[i] for i in row if i < END) for row in ids.tolist()]


def is_preferred(ids: Tensor) -> Tensor:
    """`(b,)` bool: whether an underscore joins two letters."""
    return torch.tensor([re.search("[a-z]_[a-z]", name) is not None for name in spell(ids)])


def build_model() -> AutoregressiveWrapper:
    """A decoder over letters, which neither reads nor predicts padding."""
    decoder = Decoder(dim=96, depth=3, heads=3, attn_dim_head=32, rotary_pos_emb=True, rotary_emb_dim=32)
    net = TransformerWrapper(num_tokens=len(LETTERS) + 2, max_seq_len=LONGEST + 2, attn_layers=decoder)
    return AutoregressiveWrapper(net, ignore_index=PAD, pad_value=PAD)


def sample(model: AutoregressiveWrapper, rows: int) -> Tensor:
    """`(rows, LONGEST + 2)` names that the model makes up."""
    start = torch.full((rows, 1), END)
    names = model.generate(start, LONGEST + 1, eos_token=END, filter_logits_fn="min_p")
    return F.pad(torch.cat((start, names), dim=1), (0, LONGEST + 1 - names.shape[1]), value=PAD)


@torch.no_grad()
def surprise(dpo: DPO, ids: Tensor) -> float:
    """Nats per letter that the reference finds in names: more in those that do not look real."""
    return -float(log_prob_from_model_and_seq(dpo.ref_model, ids)[ids[:, 1:] != PAD].mean())


def draw(rows: Tensor) -> Tensor:
    """A batch of rows."""
    return rows[torch.randint(len(rows), (BATCH,))]


class Judge:
    """Collects names that the model makes up, in two heaps, and notes how many of them are preferred.

    Args:
        model: what makes them up.
    """

    def __init__(self, model: AutoregressiveWrapper) -> None:
        self.model = model
        self.preferred = self.others = torch.empty(0, LONGEST + 2, dtype=torch.long)
        self.fractions: list[float] = []

    def collect(self) -> Tensor:
        """New names, which are added to the heaps."""
        new = sample(self.model, SAMPLES)
        judged = is_preferred(new)
        self.fractions.append(float(judged.float().mean()))
        self.preferred = torch.cat((self.preferred, new[judged]))
        self.others = torch.cat((self.others, new[~judged]))
        return new

    def look(self, step: int) -> None:
        """Collect at every tenth step."""
        if step % 10 == 0:
            self.collect()


def main() -> None:
    options = arguments(__doc__, "dpo_preferences", steps=400)
    names, model = read_names(), build_model()
    train(model, lambda: model(draw(names)), options.steps, lr=3e-3, name="learning names")

    judge = Judge(model)
    dpo = DPO(model.net, beta=2.0, pad_id=PAD)  # trains the net itself; a frozen copy is the reference
    prompt = torch.arange(LONGEST + 2).expand(BATCH, -1) == 0
    before = judge.collect()
    train(
        dpo,
        lambda: dpo(draw(judge.preferred), draw(judge.others), prompt_mask=prompt),
        10 * max(options.steps // 40, 1),
        lr=1e-4,
        name="preferences",
        look=judge.look,
    )
    after = sample(model, SAMPLES)
    for when, new in (("before", before), ("after", after)):
        print(
            f"{when} DPO: {is_preferred(new).float().mean():.0%} of the names are preferred; the reference finds "
            f"{surprise(dpo, new):.2f} nats per letter in them: {', '.join(spell(new[:8]))}"
        )
    steps = range(0, 10 * len(judge.fractions), 10)
    draw_lines({"made up": (steps, judge.fractions)}, options.out / "preferred.png", x="step", y="preferred fraction")
    print(f"{options.out / 'preferred.png'} shows the fraction rising.")


if __name__ == "__main__":
    main()
