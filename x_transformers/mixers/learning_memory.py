"""Memories that are small networks and learn while they read, of Titans and of ATLAS."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import Faults
from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import memory_cost
from x_transformers.mixers.parts import MixerGain, MixerNorm, rms, unit
from x_transformers.ops import at_least_float32, merge_heads, split_heads
from x_transformers.options.checked import check_arguments
from x_transformers.options.schema import at_least, positive, require
from x_transformers.recurrences.memory import Held, Rates, memorize
from x_transformers.recurrences.memory_rule import Rule

Place = Literal["inside", "outside"]
Read = Literal["before", "after"]
Length = Literal["unit", "rms", "none"]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a memory is made, and how it learns.

    Args:
        memory_depth: 1 for a matrix, which is zero before the first token; 2 for two layers, which are learned.
        memory_expand: hidden width of a memory of two layers, over `dim_key`.
        memory_residual: `LN(M(k)) (1 + gamma) + k` instead of `M(k)`, with gamma a part of the memory.
        memory_read: whether tokens read "before" or "after" they write.
        rate: "inside" or "outside" of the momentum.
        loss_scale: s; by default, the steps of a chunk, all of them at the rate 1 and for one key of typical length,
            together make up for its whole error, since more would diverge; over a window they are means.
        muon_steps: steps of Newton and Schulz that make each update orthogonal; 0 for none.

    Attributes:
        omega_window: tokens whose gradients, with learned weights, each step adds up.
        feature_degree: keys and queries are `k + k^2 + ...` up to this power.
    """

    omega_window: ClassVar[int] = 1
    feature_degree: ClassVar[int] = 1
    memory_depth: int = 1
    memory_expand: float = 2.0
    memory_residual: bool = False
    memory_read: Read = "after"
    rate: Place = "inside"
    loss_scale: float | None = None
    muon_steps: int = 0

    def __post_init__(self) -> None:
        at_least(0, muon_steps=self.muon_steps)
        positive(memory_expand=self.memory_expand, loss_scale=self.loss_scale)
        require(self.memory_depth in (1, 2), f"`memory_depth` is {self.memory_depth}; a memory has 1 or 2 layers.")

    @classmethod
    def of(cls, mixer: type[Mixer], given: dict[str, Any]) -> Self:
        """Return the options that were given.

        Raises:
            ConfigError: if there is no such keyword, or a value does not fit.
        """
        faults, names = Faults(), list(inspect.signature(mixer).parameters)
        for name in given.keys() - set(names):
            faults.add_unknown(name, names)
        faults.raise_if_any(mixer.__name__)
        check_arguments(mixer.__name__, cls.__init__, given)
        return cls(**given)

    def rule(self, dim_key: int, dim_value: int, chunk: int, *, unit_keys: bool) -> Rule:
        """Return the rule of memories of these widths."""
        require(
            not self.memory_residual or dim_key == dim_value,
            f"`memory_residual` adds keys of width {dim_key} to values of width {dim_value}; give `dim_key` and "
            "`dim_value` the same value.",
        )
        length = largest_length(self.feature_degree) if unit_keys else dim_key * mean_square(self.feature_degree)
        scale = 0.5 / (length * self.omega_window * chunk)
        return Rule(
            dim_key,
            dim_value,
            hidden=max(1, int(self.memory_expand * dim_key)) if self.memory_depth == 2 else 0,
            residual=self.memory_residual,
            reads_before=self.memory_read == "before",
            chunk=chunk,
            window=self.omega_window,
            muon_steps=self.muon_steps,
            loss_scale=scale if self.loss_scale is None else self.loss_scale,
        )


def mean_square(degree: int) -> float:
    """Return the mean of `(z + z^2 + ... + z^degree)^2` over a normal distribution."""
    powers = range(1, degree + 1)
    # the mean of z^(2 n) is (2 n - 1)!!, that of odd powers is 0
    return sum(math.prod(range(1, i + j, 2)) for i in powers for j in powers if (i + j) % 2 == 0)


def largest_length(degree: int) -> float:
    """Return a bound of `|k + k^2 + ... + k^degree|^2` for vectors k of unit length."""
    return float(degree**2)


class LearningMemory(Mixer):
    """Abstract base class of memories that learn to answer keys by values.

    Each head has a memory M, `M(k) = k W` or `gelu(k W_0) W_1`, which takes one step of gradient descent for each token
    on the loss `s |M(k_t) - v_t|^2`, with momentum and decay:

    - rate inside: `Z_t = theta_t Z_{t-1} - eta_t grad_t` and `M_t = (1 - alpha_t) M_{t-1} + Z_t`,
    - rate outside: `Z_t = theta_t Z_{t-1} + grad_t` and `M_t = alpha_t M_{t-1} - eta_t Z_t`,

    where eta, theta and alpha are sigmoids of linear maps. The gradient is that of the memory before the first token of
    a chunk. Chunks are those of the row from its first token on, so that their size is a part of the definition: 1 is
    the online rule. The output is `to_out(sigmoid(to_gate x) * M_t(q_t))`.

    Args:
        dim: width D of the model.
        learning: how the memory is made, and how it learns.
        heads: number of heads h.
        dim_key: width of queries and keys of a head; default `dim / heads`.
        dim_value: width of values of a head; default `dim / heads`.
        qk_norm: divide queries and keys by their length ("unit"), their root mean square ("rms") or not at all
            ("none"), which long keys may make diverge; default "rms" with the rate outside, else "unit".
        gate: gate the output of each head; default with the rate inside.
        norm_eps: added to mean squares.
        chunk: tokens whose gradients are taken at once.
    """

    has_gains = True

    def __init__(
        self,
        dim: int,
        learning: Learning,
        *,
        heads: int,
        dim_key: int | None,
        dim_value: int | None,
        qk_norm: Length | None,
        gate: bool | None,
        norm_eps: float,
        chunk: int,
    ) -> None:
        super().__init__()
        at_least(1, heads=heads, chunk=chunk)
        positive(norm_eps=norm_eps)
        dim_key = divided(dim, heads, "the width of the model") if dim_key is None else dim_key
        dim_value = divided(dim, heads, "the width of the model") if dim_value is None else dim_value
        at_least(1, dim_key=dim_key, dim_value=dim_value)
        outside = learning.rate == "outside"
        self.heads, self.norm_eps, self.outside = heads, norm_eps, outside
        self.feature_degree = learning.feature_degree
        self.qk_norm = ("rms" if outside else "unit") if qk_norm is None else qk_norm
        self.rule = learning.rule(dim_key, dim_value, chunk, unit_keys=self.qk_norm == "unit")
        # what is written and what is read have gains of their own where the rate is inside
        self.norm_in = MixerNorm(dim, norm_eps) if outside else None
        self.norm_write, self.norm_read = (None if outside else MixerNorm(dim, norm_eps) for _ in range(2))
        self.to_q, self.to_k = (nn.Linear(dim, heads * dim_key, bias=False) for _ in range(2))
        self.to_v = nn.Linear(dim, heads * dim_value, bias=False)
        normed = self.qk_norm != "none"
        self.q_norm, self.k_norm = (HeadGain(heads, dim_key) if normed else None for _ in range(2))
        self.to_rate, self.to_momentum, decay = (nn.Linear(dim, heads) for _ in range(3))
        self.to_keep, self.to_forget = (decay, None) if outside else (None, decay)
        self.to_window = nn.Linear(dim, heads) if self.rule.window > 1 else None
        self.to_gate = nn.Linear(dim, heads, bias=False) if (not outside if gate is None else gate) else None
        self.to_out = nn.Linear(heads * dim_value, dim, bias=False)
        # at first thousands of tokens are kept: a memory of two layers that has faded learns no more
        nn.init.constant_(decay.bias, 8.0 if outside else -8.0)
        nn.init.zeros_(self.to_rate.bias)
        self.memory = nn.ParameterDict()
        if self.rule.hidden:
            for number, shape in enumerate(self.rule.matrices):
                bound = (6 / sum(shape)) ** 0.5  # Xavier's
                self.memory[str(number)] = nn.Parameter(torch.empty(heads, *shape).uniform_(-bound, bound))
            if self.rule.residual:
                self.memory["gamma"] = nn.Parameter(torch.zeros(heads, dim_value))
        self.state_shapes |= dict.fromkeys(("memory", "reference", "momentum"), (heads, self.rule.size))
        self.state_shapes["before"] = (1,)
        if self.rule.window > 1:
            self.state_shapes["recent"] = (heads, self.rule.window - 1, self.rule.gradient_size)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        written, read = self._normed(x)
        q, k = self._features(self.to_q(read), self.q_norm), self._features(self.to_k(written), self.k_norm)
        v = split_heads(self.to_v(written), self.heads)
        held = self._first(row.count(x)) if state is None else self._held(state, x)
        out, held = memorize(q, k, v, self._rates(written, row), held, row.live, self.rule, fresh=state is None)
        if self.to_gate is not None:
            out = out * self.to_gate(read).sigmoid().mT.unsqueeze(-1)
        # PyTorch 2.6 does not trace `_asdict`
        left = {name: getattr(held, name).contiguous() for name in self.state_shapes}
        return self.to_out(merge_heads(out).to(x.dtype)), left

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is written and what is read, `(b, n, D)`."""
        if self.norm_in is not None:
            own = self.norm_in(x).to(x.dtype)
            return own, own
        assert self.norm_write is not None
        assert self.norm_read is not None
        return self.norm_write(x).to(x.dtype), self.norm_read(x).to(x.dtype)

    def _features(self, t: Tensor, gain: HeadGain | None) -> Tensor:
        """Return queries or keys `(b, h, n, dk)`: `t + t^2 + ...`, after their norm."""
        t = at_least_float32(split_heads(t, self.heads))
        if gain is not None:
            t = gain(unit(t) if self.qk_norm == "unit" else rms(t, self.norm_eps))
        power = out = t
        for _ in range(self.feature_degree - 1):
            power = power * t
            out = out + power
        return out

    def _rates(self, x: Tensor, row: Row) -> Rates:
        """Return the numbers of each token; one that is dead neither writes nor fades."""
        decay = self.to_forget if self.to_keep is None else self.to_keep
        assert decay is not None
        own, momentum, keep = (at_least_float32(to(x)).mT for to in (self.to_rate, self.to_momentum, decay))
        rate = row.silence_heads(own.sigmoid())
        live = row.silence_heads(torch.ones_like(rate))
        window = live if self.to_window is None else at_least_float32(self.to_window(x)).mT.sigmoid()
        push, write = (live, -rate) if self.outside else (-rate, live)
        log_keep = F.logsigmoid(keep if self.outside else -keep)
        return Rates(push, write, row.silence_heads(F.logsigmoid(momentum)), row.silence_heads(log_keep), window)

    def _first(self, count: Tensor) -> Held:
        """Return the memory before the first token of rows with `(b, 1)` tokens."""
        b, size = count.shape[0], self.rule.size
        nothing = count.new_zeros(b, self.heads, size)
        if self.memory:
            parts = [self.memory[name].flatten(1) for name in self.memory]
            flat = at_least_float32(torch.cat(parts, dim=-1)).expand(b, -1, -1)
        else:
            flat = nothing
        recent = count.new_zeros(b, self.heads, self.rule.window - 1, self.rule.gradient_size)
        return Held(flat, flat, nothing, recent, torch.zeros_like(count))

    def _held(self, state: State, x: Tensor) -> Held:
        none = x.new_zeros(x.shape[0], self.heads, 0, self.rule.gradient_size)
        recent = state.get("recent", none)
        return Held(state["memory"], state["reference"], state["momentum"], recent, state["before"])

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return memory_cost(situation, tokens, self.heads, self.rule)


class HeadGain(MixerGain):
    """Gain of the features of each head, `(heads, dim)`.

    Args:
        heads: number of heads.
        dim: width of a head.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__(heads * dim)
        self.gamma = nn.Parameter(self.gamma.data.view(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `(b, h, n, dim)`."""
        gain = self.gamma.unsqueeze(1)
        return x * (1 + gain if self.unit_offset else gain)
