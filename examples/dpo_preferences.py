"""Teach a decoder a preference by pairs of its own samples (direct preference optimization, DPO).

The decoder first learns the names and words in the source of Python's standard library. Then it makes up names itself,
and a program judges them: it prefers words joined by an underscore, `read_line` to `readline`. The policy learns from
pairs of names; a frozen copy of the decoder, the reference, keeps it close to names that look real.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import DPO, AutoregressiveWrapper, Decoder, TransformerWrapper, plots
from x_transformers.dpo import log_prob_from_model_and_seq
from x_transformers.training.small_runs import arguments, fit, library_text

LETTERS = "abcdefghijklmnopqrstuvwxyz_"
END, PAD = len(LETTERS), len(LETTERS) + 1  # a name is END, its letters, END; then comes padding
LONGEST, BATCH, SAMPLES = 16, 64, 512


def read_names() -> Tensor:
    """Return ids `(names, LONGEST + 2)` of all distinct names with at least 3 letters."""
    text = bytes(library_text()[0].numpy()).decode("utf-8", errors="ignore")
    names = sorted(set(re.findall(rf"\b[a-z_]{{3,{LONGEST}}}\b", text)))
    rows = [[END, *map(LETTERS.index, name), END, *[PAD] * (LONGEST - len(name))] for name in names]
    return torch.tensor(rows)


def spell(ids: Tensor) -> list[str]:
    """Return rows of ids as names."""
    return ["".join(LETTERS[i] for i in row if i < END) for row in ids.tolist()]


def is_preferred(ids: Tensor) -> Tensor:
    """Return `(b,)` bool, True for names with an underscore between two letters."""
    return torch.tensor([re.search("[a-z]_[a-z]", name) is not None for name in spell(ids)])


def build_model() -> AutoregressiveWrapper:
    """Build a decoder over letters that ignores padding."""
    decoder = Decoder(dim=96, depth=3, heads=3, attn_dim_head=32, rotary_pos_emb=True, rotary_emb_dim=32)
    net = TransformerWrapper(num_tokens=len(LETTERS) + 2, max_seq_len=LONGEST + 2, attn_layers=decoder)
    return AutoregressiveWrapper(net, ignore_index=PAD, pad_value=PAD)


def sample(model: AutoregressiveWrapper, rows: int) -> Tensor:
    """Sample names from the model, as ids `(rows, LONGEST + 2)`."""
    start = torch.full((rows, 1), END, device=next(model.parameters()).device)
    names = model.generate(start, LONGEST + 1, eos_token=END, filter_logits_fn="min_p")
    return F.pad(torch.cat((start, names), dim=1), (0, LONGEST + 1 - names.shape[1]), value=PAD).cpu()


@torch.no_grad()
def surprise(dpo: DPO, ids: Tensor) -> float:
    """Return the reference's nats per letter on names; they are high for names that do not look real."""
    ids = ids.to(next(dpo.parameters()).device)
    return -float(log_prob_from_model_and_seq(dpo.ref_model, ids)[ids[:, 1:] != PAD].mean())


def draw(rows: Tensor) -> Tensor:
    """Draw a random batch of rows."""
    return rows[torch.randint(len(rows), (BATCH,))]


class Judge:
    """Pool of names that the model makes up, sorted into preferred ones and others.

    Args:
        model: model that the names are sampled from.
    """

    def __init__(self, model: AutoregressiveWrapper) -> None:
        self.model = model
        self.preferred = self.others = torch.empty(0, LONGEST + 2, dtype=torch.long)
        self.fractions: list[float] = []

    def collect(self) -> Tensor:
        """Sample new names, add them to the pool, and return them."""
        new = sample(self.model, SAMPLES)
        judged = is_preferred(new)
        self.fractions.append(float(judged.float().mean()))
        self.preferred = torch.cat((self.preferred, new[judged]))
        self.others = torch.cat((self.others, new[~judged]))
        return new

    def after_step(self, step: int) -> None:
        """Collect names after every tenth step."""
        if step % 10 == 0:
            self.collect()


def main() -> None:
    options = arguments(__doc__, "dpo_preferences", steps=400)
    names, model = read_names(), build_model().to(options.device)
    fit(model, lambda: model(draw(names).to(options.device)), options.steps, lr=3e-3, name="learning names")

    judge = Judge(model)
    dpo = DPO(model.net, beta=2.0, pad_id=PAD)  # trains the net itself; the reference is a frozen copy
    prompt = torch.arange(LONGEST + 2, device=options.device).expand(BATCH, -1) == 0
    before = judge.collect()

    def loss() -> Tensor:
        pairs = draw(judge.preferred), draw(judge.others)
        return dpo(*(rows.to(options.device) for rows in pairs), prompt_mask=prompt)

    fit(
        dpo,
        loss,
        10 * max(options.steps // 40, 1),
        lr=1e-4,
        name="preferences",
        after_step=judge.after_step,
    )
    after = sample(model, SAMPLES)
    for when, new in (("before", before), ("after", after)):
        print(
            f"{when} DPO: {is_preferred(new).float().mean():.0%} of the names are preferred; the reference finds "
            f"{surprise(dpo, new):.2f} nats per letter in them: {', '.join(spell(new[:8]))}"
        )
    steps = range(0, 10 * len(judge.fractions), 10)
    figure = plots.learning_curve({"made up": (steps, judge.fractions)}, y="preferred fraction")
    figure.savefig(options.out / "preferred.png", dpi=plots.DPI)
    print(f"{options.out / 'preferred.png'} shows the fraction rising.")


if __name__ == "__main__":
    main()
