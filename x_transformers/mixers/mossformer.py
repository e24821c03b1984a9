"""MossFormer (2302.11824) and the gated FSMN of MossFormer2 (2312.11825): mixers of audio, with many short filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.parts import MixerLayerNorm, ShortConvolution, last_live, moved, rotate_pairs
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, at_least, opt, require
from x_transformers.recurrences.base import full_precision
from x_transformers.recurrences.groups import Grouped, both_ways, cut, left_to_right


class LengthNorm(nn.Module):
    """Norm with one gain: `x / max(|x| D^{-1/2}, 1e-5) * gain`.

    Args:
        dim: number of features D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(..., D)`, at least in float32."""
        x = at_least_float32(x)
        # a root of 0 has no derivative
        length = x.square().sum(dim=-1, keepdim=True).clamp(min=1e-30).sqrt() * self.scale
        return x / length.clamp(min=1e-5) * self.gain


class ConvolvedMap(nn.Module):
    """Map with a short filter: `z + depthwise(z)`, with `z = silu(linear(norm(x)))`.

    Args:
        dim: number of inputs.
        inner: number of outputs.
        taps: of the filter; 1 or more.
        norm: of the inputs.
    """

    def __init__(self, dim: int, inner: int, taps: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear, self.conv = norm, nn.Linear(dim, inner), ShortConvolution(inner, taps)

    def forward(self, x: Tensor, row: Row, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map `(b, n, dim)`; of passes that are not causal, the filter is around each token.

        Returns:
            `(b, n, inner)`, and the inputs of the filter that later tokens need.
        """
        z = F.silu(self.linear(self.norm(x).to(x.dtype)))
        y, last = filtered(self.conv, z, row, past)
        return z + y, last


def filtered(conv: ShortConvolution, x: Tensor, row: Row, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply a filter in the direction of a pass, and return what later tokens need of its inputs."""
    return conv(x, row, past) if row.causal else (conv.whole(x, row), x[:, :0])


class MossFormer(KeepsFloat32, Mixer):
    """Gated attention in groups of tokens and, linearly, to all others.

    Half of the features of x are those of the token before. `v, u` are halves of `hidden(x)`, and four affine copies of
    `qk(x)` are queries and keys; with `att(z)_t = sum_s relu(q_t . k_s / p)^2 z_s` over a group of p tokens plus
    `sum_s (q'_t . k'_s) z_s / n` over the row, the output is `out(att(u) v sigmoid(att(v) u))`. Causal: within the
    group up to the token, and `/ p` over whole groups before it.

    Args:
        dim: width D of the model.
        group: number p of tokens of a group.
        dim_key: width of queries and keys.
        expand: features of `v` and `u` together, over D.
        conv: taps of the filters.
        rotary_dim: number of features of queries and keys that rotate, in pairs of neighbors; default 32, or all if
            there are fewer.
    """

    name = "mossformer"
    has_whole_form = True
    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        group: int = 256,
        dim_key: int = 128,
        expand: float = 4,
        conv: int = 17,
        rotary_dim: int | None = None,
    ) -> None:
        super().__init__()
        at_least(1, group=group, dim_key=dim_key, conv=conv)
        rotary_dim = min(32, dim_key // 2 * 2) if rotary_dim is None else rotary_dim
        require(
            0 <= rotary_dim <= dim_key and rotary_dim % 2 == 0,
            f"`rotary_dim` is {rotary_dim}; it must be an even number up to `dim_key`, which is {dim_key}, or 0.",
        )
        inner = divided(int(expand * dim), 2, "the inner width (`expand * dim`)")
        self.size, self.rotary_dim = group, rotary_dim
        self.hidden = ConvolvedMap(dim, 2 * inner, conv, LengthNorm(dim))
        self.qk = ConvolvedMap(dim, dim_key, conv, LengthNorm(dim))
        self.out = ConvolvedMap(inner, dim, conv, LengthNorm(inner))
        self.offset = Offset(4, dim_key)
        self.register_derived()
        self.state_shapes |= {
            "shift": (1, dim - dim // 2),
            "far": (dim_key, 2 * inner),
            "current": (dim_key, 2 * inner),
            "group": (group, dim_key + 2 * inner),
            "count": (1,),
        }
        self.maps = ("hidden", "qk", "out")
        if conv > 1:
            self.state_shapes |= {name: getattr(self, name).conv.state_shape for name in self.maps}

    @property
    def to_out(self) -> nn.Linear:
        """The linear map of the output, before its activation and filter."""
        return self.out.linear

    def derived_buffers(self) -> dict[str, Tensor]:
        pairs = torch.arange(self.rotary_dim // 2, dtype=torch.float64) / max(self.rotary_dim // 2, 1)
        return {"frequencies": (10000.0**-pairs).float()}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        held: State = {} if state is None else state
        left: State = {}
        count = row.count(x)
        before = held.get("count", torch.zeros_like(count))
        x, left["shift"] = self._shifted(x, row, held.get("shift"))
        hidden, left["hidden"] = self.hidden(x, row, held.get("hidden"))
        qk, left["qk"] = self.qk(x, row, held.get("qk"))
        with full_precision(x.device.type):
            near, far, near_keys, far_keys = self._rotated(self.offset(at_least_float32(qk)), before).unbind(-2)
            near_keys, far_keys = row.silence(near_keys), row.silence(far_keys)
            tokens = Grouped(near, far, near_keys, far_keys, row.silence(at_least_float32(hidden)))
            if not row.causal:
                attended = both_ways(tokens, self.size, count)
            elif x.shape[1] == 1:
                attended, left = self._step(tokens, before, count, held, left)
            else:
                attended, left = self._pass(tokens, before, count, held, left, row.keeps_state)
        v, u = hidden.chunk(2, dim=-1)
        of_v, of_u = attended.to(x.dtype).chunk(2, dim=-1)
        y, left["out"] = self.out(of_u * v * (of_v * u).sigmoid(), row, held.get("out"))
        left["count"] = before + count
        return y, {name: left[name] for name in self.state_shapes if name in left}

    def _shifted(self, x: Tensor, row: Row, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Replace the first half of the features by those of the token before."""
        half = x.shape[-1] - x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        whole = F.pad(first, (0, 0, 1, 0)) if past is None else torch.cat((past.to(x.dtype), first), dim=1)
        n = x.shape[1]
        return torch.cat((whole[:, :n], second), dim=-1), last_live(whole, row, n, 1)

    def _rotated(self, t: Tensor, before: Tensor) -> Tensor:
        """Rotate queries and keys `(b, n, 4, d)` by the number of their token in the row."""
        if not self.rotary_dim:
            return t
        place = before + torch.arange(t.shape[1], device=t.device, dtype=before.dtype)
        angles = (place.unsqueeze(-1) * self.frequencies.to(t.dtype)).unsqueeze(2)
        return torch.cat((rotate_pairs(t[..., : self.rotary_dim], angles), t[..., self.rotary_dim :]), dim=-1)

    def _pass(
        self, tokens: Grouped, before: Tensor, count: Tensor, held: State, left: State, keeps_state: bool
    ) -> tuple[Tensor, State]:
        """Attend from any number of tokens; rows whose group has begun are moved to their place in it."""
        n, size, phase = tokens.far.shape[1], self.size, None
        if held:
            phase = before.long().remainder(size)
            tokens = Grouped(*(moved(t.mT, phase, n + size - 1).mT for t in tokens))
            begun = F.pad(held["group"], (0, 0, 0, n - 1)).to(tokens.values.dtype)
            own = (tokens.near_keys.shape[-1], tokens.values.shape[-1])
            keys, values = begun.split(own, dim=-1)
            tokens = tokens._replace(near_keys=tokens.near_keys + keys, values=tokens.values + values)
        out, sums = left_to_right(tokens, size, held.get("far"), held.get("current"))
        if phase is not None:
            index = phase + torch.arange(n, device=out.device)
            out = out.gather(1, index.unsqueeze(-1).expand(-1, -1, out.shape[-1]))
        if keeps_state:
            last = (count.long() if phase is None else count.long() + phase) // size
            groups = cut(torch.cat((tokens.near_keys, tokens.values), dim=-1), size)
            found = (of_group(t, last) for t in (sums.earlier, sums.own, groups))
            left |= dict(zip(("far", "current", "group"), found, strict=True))
        return out, left

    def _step(self, tokens: Grouped, before: Tensor, count: Tensor, held: State, left: State) -> tuple[Tensor, State]:
        """Attend from one token, which joins the tokens of its group."""
        size, b = self.size, before.shape[0]
        shapes = {name: (b, *self.state_shapes[name]) for name in ("far", "current", "group")}
        far, current, group = (held[name] if held else tokens.values.new_zeros(shape) for name, shape in shapes.items())
        phase = before.remainder(size)
        place = torch.arange(size, device=before.device, dtype=before.dtype) == phase
        new = torch.cat((tokens.near_keys, tokens.values), dim=-1)
        group = torch.where((place & (count > 0)).unsqueeze(-1), new, group)
        keys, values = group.split((tokens.near_keys.shape[-1], tokens.values.shape[-1]), dim=-1)
        out = F.relu(tokens.near @ keys.mT / size).square() @ values + tokens.far @ far
        current = current + tokens.far_keys.mT @ tokens.values / size
        full = (phase + count == size).unsqueeze(-1)
        left["far"] = torch.where(full, far + current, far)
        left["current"] = current.masked_fill(full, 0.0)
        left["group"] = group.masked_fill(full, 0.0)
        return out, left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        d, e = self.state_shapes["far"]
        return "groups", "", 2 * (min(self.size, tokens) * (d + e) + 2 * d * e)


def of_group(t: Tensor, number: Tensor) -> Tensor:
    """Return what one group of each row has, of `(b, g, ...)`, for `(b, 1)` numbers."""
    index = number.view(-1, 1, 1, 1).expand(-1, 1, *t.shape[2:])
    return t.gather(1, index).squeeze(1)


class Offset(nn.Module):
    """Affine copies of the same features: `x * gamma_i + beta_i`.

    Args:
        copies: their number.
        dim: number of features.
    """

    def __init__(self, copies: int, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.02 * torch.randn(copies, dim))
        self.beta = nn.Parameter(torch.zeros(copies, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the copies of `(..., dim)`, `(..., copies, dim)`."""
        return x.unsqueeze(-2) * self.gamma + self.beta


class SequentialMemory(nn.Module):
    """Feedforward sequential memory: `x + p + depthwise(p)`, with `p = project(relu(hidden x))`.

    Args:
        dim: number of features.
        taps: tokens T on each side that the filter reads, with the token itself; it has `2 T - 1` taps.
    """

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        self.hidden, self.project = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.conv = ShortConvolution(dim, 2 * taps - 1)

    def forward(self, x: Tensor, row: Row, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `(b, n, dim)`, and the inputs of the filter that later tokens need."""
        p = self.project(F.relu(self.hidden(x)))
        y, last = filtered(self.conv, p, row, past)
        return x + p + y, last


class FSMN(Mixer):
    """Gated feedforward sequential memory: `y = v(x) * memory(u(x))`, with maps that have short filters.

    Args:
        dim: width of the model.
        taps: tokens T on each side that the memory reads, with the token itself; causal: the last `2 T - 1`.
        conv: taps of the filters of maps.
    """

    name = "fsmn"
    has_whole_form = True
    has_output_map = False
    has_gains = True

    def __init__(self, dim: int, taps: int = 20, conv: int = 17) -> None:
        super().__init__()
        at_least(1, taps=taps, conv=conv)
        self.u, self.v = (ConvolvedMap(dim, dim, conv, MixerLayerNorm(dim)) for _ in range(2))
        self.memory = SequentialMemory(dim, taps)
        self.state_shapes |= {
            name: filters.conv.state_shape
            for name, filters in (("u", self.u), ("v", self.v), ("memory", self.memory))
            if filters.conv.taps > 1
        }

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        held: State = {} if state is None else state
        left: State = {}
        u, left["u"] = self.u(x, row, held.get("u"))
        v, left["v"] = self.v(x, row, held.get("v"))
        memory, left["memory"] = self.memory(u, row, held.get("memory"))
        return v * memory, {name: left[name] for name in self.state_shapes}


@dataclass(frozen=True, kw_only=True)
class MossFormerOptions:
    group: int | None = opt(None, "tokens of a group of MossFormer")
    rotary_dim: int | None = opt(None, "features of its queries and keys that rotate")


@dataclass(frozen=True, kw_only=True)
class FSMNOptions:
    taps: int | None = opt(None, "tokens on each side that the memory of an FSMN reads, with the token itself")


EXEMPT = {"export": "the reference has no mixers"}

FEATURES = (
    Feature(
        name="mossformer",
        group="mixer",
        slot="mixer",
        options=MossFormerOptions,
        build=MossFormer,
        summary="gated attention in groups and, linearly, to all tokens, with short filters",
        paper="2302.11824",
        exempt=EXEMPT,
        examples=(
            {"mixer": "mossformer", "mixer_group": 3, "mixer_dim_key": 4, "mixer_expand": 2, "mixer_conv": 3},
            {
                "mixer": "mossformer",
                "layer_period": "mma",
                "mixer_group": 4,
                "mixer_dim_key": 6,
                "mixer_rotary_dim": 2,
                "mixer_conv": 1,
            },
        ),
    ),
    Feature(
        name="fsmn",
        group="mixer",
        slot="mixer",
        options=FSMNOptions,
        build=FSMN,
        summary="a memory of filters between gated maps that have filters",
        paper="2312.11825",
        exempt=EXEMPT,
        examples=(
            {"mixer": "fsmn", "mixer_taps": 3, "mixer_conv": 3},
            {"mixer": "fsmn", "layer_period": "mma", "mixer_taps": 1, "mixer_conv": 1},
        ),
    ),
)
