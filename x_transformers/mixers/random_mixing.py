"""Random mixing, a baseline of MetaFormer (2210.13452): means of tokens with weights that are drawn once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.errors import ConfigError
from x_transformers.mixers.base import Mixer, Row, State, state_dtype
from x_transformers.mixers.parts import check_length, moved
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.options.schema import Feature, at_least


class RandomMixing(KeepsFloat32, Mixer):
    """Mean of tokens with weights `softmax(logits_t)`, by their numbers in a row: `logits` are normal and not trained.

    Causal: the softmax is over the token and those before it. The logits are in state dicts.

    Args:
        dim: width of the model.
        len: most tokens L of a row.
    """

    name = "random"
    has_whole_form = True
    has_output_map = False

    def __init__(self, dim: int, len: int | None = None) -> None:
        super().__init__()
        if len is None:
            raise ConfigError(
                f'`mixer = "{self.name}"` needs `len`, the most tokens of a row; give it `max_seq_len` of the model.'
            )
        at_least(1, len=len)
        self.length, self.seed = len, int(torch.randint(2**31, (), device="cpu"))
        self.register_derived(persistent=True)
        self.state_shapes |= {"random": (len, dim), "count": (1,)}

    def derived_buffers(self) -> dict[str, Tensor]:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        logits = torch.randn(self.length, self.length, generator=generator, device="cpu", dtype=torch.float32)
        return {"logits": logits.to(torch.empty(0).device)}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        n, live = x.shape[1], row.silence(x)
        count = row.count(x)
        before = torch.zeros_like(count) if state is None else state["count"]
        check_length(self.name, self.length, before, count, n)
        logits = self.get_buffer("logits")
        if state is not None:
            held = state["random"].to(x.dtype) + moved(live.mT, before.long(), self.length).mT
            place = before.long() + torch.arange(n, device=x.device)
            seen = torch.arange(self.length, device=x.device) <= place.unsqueeze(-1)
            out = mean(F.embedding(place.clamp(max=self.length - 1), logits), seen, held)
            # what the check does not see must not have an output that looks like others
            out = out.masked_fill((place >= self.length).unsqueeze(-1), torch.nan)
            return out, {"random": held.to(state_dtype(x)), "count": before + count}
        if row.causal:
            seen: Tensor | None = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        else:
            seen = None if row.live is None else row.live.unsqueeze(1)
        out = mean(logits[:n, :n], seen, live)
        if not row.causal or not row.keeps_state:
            return out, {}
        return out, {"random": F.pad(live, (0, 0, 0, self.length - n)).to(state_dtype(x)), "count": count}


def mean(logits: Tensor, seen: Tensor | None, x: Tensor) -> Tensor:
    """Return the means of `x (b, j, D)` with weights `softmax(logits)` of those that are seen, `(1|b, i, j)`."""
    logits = logits.to(state_dtype(x))
    if seen is not None:
        # not -inf: a row without a live token has finite outputs, which nobody reads
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1).to(x.dtype) @ x


@dataclass(frozen=True, kw_only=True)
class RandomOptions:
    pass


FEATURE = Feature(
    name="random",
    group="mixer",
    slot="mixer",
    options=RandomOptions,
    build=RandomMixing,
    summary="means of tokens with random weights that are not trained",
    paper="2210.13452",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "random", "mixer_len": 64},
        {"mixer": "random", "layer_period": "ma", "mixer_len": 48},
    ),
)
