"""Contract of a token mixer, and the rows of tokens that it reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.forward_pass.call import BranchOutput, Call, LayerCall
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.forward_pass.names import check_names, takes_no_more
from x_transformers.modules.branch_function import BranchCost, BranchFunction
from x_transformers.modules.tied_linear import matrices_of
from x_transformers.options.configured import Configured
from x_transformers.options.values import shown

Built = TypeVar("Built")
State = dict[str, Tensor]
"""Running states by name, `(b, ...)`; None before the first token."""

Left = tuple[Tensor | None, ...]
"""Values of the first layer of a mixer for later ones, in each direction; empty if it leaves none."""


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens of a pass, those that others may see first in each row.

    Attributes:
        live: `(b, n)` bool, a prefix of ones in each row; None: all are live.
        causal: a token must not read later ones.
        keeps_state: the state after these tokens will be read. Where it is no by-product, it may be left out otherwise.
    """

    live: Tensor | None
    causal: bool
    keeps_state: bool = True

    def silence(self, t: Tensor) -> Tensor:
        """Set the features of dead tokens to zero.

        Args:
            t: `(b, n, d)`.
        """
        return t if self.live is None else t.masked_fill(~self.live.unsqueeze(-1), 0.0)

    def silence_heads(self, t: Tensor) -> Tensor:
        """Set the features of dead tokens to zero.

        Args:
            t: `(b, h, n)` or `(b, h, n, d)`.
        """
        if self.live is None:
            return t
        dead = ~self.live.unsqueeze(1)
        return t.masked_fill(dead if t.ndim == 3 else dead.unsqueeze(-1), 0.0)

    def close(self, log_input: Tensor) -> Tensor:
        """Set the logarithms of the input gates of dead tokens, `(b, n, d)`, to `-inf`."""
        return log_input if self.live is None else log_input.masked_fill(~self.live.unsqueeze(-1), -torch.inf)

    def close_heads(self, log_input: Tensor) -> Tensor:
        """Set the logarithms of the input gates of dead tokens, `(b, h, n)`, to `-inf`."""
        return log_input if self.live is None else log_input.masked_fill(~self.live.unsqueeze(1), -torch.inf)

    def count(self, t: Tensor) -> Tensor:
        """Return the number of live tokens, `(b, 1)`, of a tensor `(b, n, ...)`; of the dtype of states."""
        if self.live is None:
            return t.new_full((t.shape[0], 1), t.shape[1], dtype=state_dtype(t))
        return self.live.sum(dim=-1, keepdim=True).to(state_dtype(t))


def state_dtype(t: Tensor) -> torch.dtype:
    """Return the dtype of running states: float32, and float64 for models in float64."""
    return torch.float64 if t.dtype is torch.float64 else torch.float32


class Mixer(Configured, BranchFunction):
    """Abstract base class of token mixers: `mix(x, row, state) -> (y, state)`.

    Four promises hold for every mixer. It keeps nothing from pass to pass but the state that it returns. A row may be
    cut anywhere: to read its parts one after the other with the state equals to read it at once, up to rounding. Dead
    tokens change neither states nor outputs of live ones; outputs at dead tokens are finite. And rows do not depend
    on each other.

    Its constructor takes plain arguments. Those that are keywords of a stack (`mixer_...`) have the same names there.

    Attributes:
        has_causal_form: it can read from left to right, and keep a state.
        has_whole_form: it can read a whole row in both directions.
        has_gains: it may contain norms with gains, each a `MixerGain`.
        state_shapes: shapes of the running states without the batch. They are complete after any pass.
        backward: a second mixer of this class that reads from right to left (`mixer_bidirectional`), or None.
        dropout: probability of dropout on the output.
    """

    has_causal_form: ClassVar[bool] = True
    has_whole_form: ClassVar[bool] = False
    has_output_map: ClassVar[bool] = True
    has_gains: ClassVar[bool] = False
    mixes_tokens: ClassVar[bool] = True
    left_as: ClassVar[tuple[str, ...]] = ()
    """Names in `Carry.values` of what the first layer leaves for later ones, and of what its other direction does."""
    name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.state_shapes: dict[str, tuple[int, ...]] = {}
        self.backward: Mixer | None = None
        self.dropout = 0.0
        self.features = (self.name,)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        """Mix the tokens of each row.

        Args:
            x: `(b, n, D)`, with live tokens first in each row. Features of dead ones are finite.
            row: which are live.
            state: what earlier passes left; None before the first token, and in passes that are not causal.

        Returns:
            `(b, n, D)` and the new states. Those of passes that are not causal are ignored, and so are those that
            the row does not keep.
        """
        raise NotImplementedError

    def mix_after(
        self, x: Tensor, row: Row, state: State | None, first: Tensor | None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Mix the tokens of each row, with what the first layer of this mixer left for later ones in the same pass.

        Args:
            x, row, state: see `mix`.
            first: `(b, n, ...)` in the order of `x`; None in the first layer.

        Returns:
            the results of `mix`, and what the first layer leaves; None if layers of this mixer leave nothing.
        """
        return *self.mix(x, row, state), None

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        """Return the kernel that would run, the reason, and its FLOPs per token besides those of matrices.

        Args:
            situation: device and dtype.
            tokens: their number.
        """
        return "", "", 0

    # what a stack calls

    def begin_at(self, number: int, count: int) -> None:
        if self.backward is not None:
            self.backward.begin_at(number, count)

    def follow(self) -> None:
        """Become a later layer of a stack: an earlier one is of the same mixer, and leaves something for this one."""
        if self.backward is not None:
            self.backward.follow()

    @property
    def state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the running states."""
        return tuple(self.state_shapes)

    @takes_no_more
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: Mapping[str, Tensor] | None = None,
        *,
        causal: bool = True,
        layer: LayerCall | None = None,
        **unknown: Any,
    ) -> tuple[Tensor, State] | BranchOutput:
        """Mix tokens outside of a stack; inside of one, `layer` is the call of the sublayer.

        Args:
            x: `(b, n, D)`.
            mask: `(b, n)` bool, True for tokens that others may see.
            state: states that an earlier call returned, of the tokens before these.
            causal: False for the form that looks in both directions.
            layer: the call of a sublayer.

        Returns:
            `(b, n, D)`, zero at hidden tokens, and the states; with `layer`, a `BranchOutput`.

        Raises:
            InputError: if the mixer has no such form.
            ShapeError: if a state does not fit.
        """
        if unknown:
            check_names(self, Mixer.forward, unknown)
        if layer is not None:
            return self.run(x, layer)
        self.check_causality(causal)
        self._check_state(state, x)
        return self._mix_rows(x, mask, None if state is None else dict(state), causal, causal)[:2]

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        call, states, state = layer.call, layer.states, None
        if self.mixes_tokens and (call.attn_mask is not None or call.attn_bias is not None):
            self._refuse_pairs(call)
        if states is not None and call.causal:
            held = {name: states.get(name) for name in self.state_shapes}
            state = {name: t for name, t in held.items() if t is not None} or None
            self._check_state(state, x)
        keeps_state = states is not None and call.causal
        first = tuple(layer.carry.values.get(key) for key in self.left_as)
        out, state, left = self._mix_rows(x, call.token_mask, state, call.causal, keeps_state, first)
        if states is not None and keeps_state:
            for name, value in state.items():
                states.put(name, value)
        carry = layer.carry
        # PyTorch 2.6 does not trace `zip` over tuples of different lengths
        found = {key: left[at] for at, key in enumerate(self.left_as[: len(left)]) if left[at] is not None}
        return BranchOutput(out, None, replace(carry, values={**carry.values, **found}) if found else carry)

    def _mix_rows(
        self, x: Tensor, mask: Tensor | None, state: State | None, causal: bool, keeps_state: bool, first: Left = ()
    ) -> tuple[Tensor, State, Left]:
        """Move live tokens to the front of each row, mix, and move them back.

        What the first layer leaves stays in the order of the moved tokens, which is that of all mixers of a pass.
        """
        if mask is None or x.shape[1] == 1:
            row = Row(mask, causal, keeps_state)
            out, state, left = self._both_directions(x, row, state, first)
            out = row.silence(out)
        else:
            # a stable sort keeps the order of tokens
            order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
            index = order.unsqueeze(-1).expand_as(x)
            row = Row(mask.gather(1, order), causal, keeps_state)
            mixed, state, left = self._both_directions(x.gather(1, index), row, state, first)
            mixed = row.silence(mixed)
            out = torch.zeros_like(mixed).scatter(1, index, mixed)
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        return out, state, left

    def _both_directions(self, x: Tensor, row: Row, state: State | None, first: Left) -> tuple[Tensor, State, Left]:
        earlier, later = first or (None, None)
        forth, state, left = self.mix_after(x, row, state, earlier)
        if row.causal or self.backward is None:
            return forth, state, (left, None)
        turned, _, of_turned = self.backward.mix_after(turn_around(x, row), row, None, later)
        return forth + turn_around(turned, row), state, (left, of_turned)

    def check_causality(self, causal: bool, cached: bool = False) -> None:
        if causal and not self.has_causal_form:
            raise InputError(
                f"`{self.name}` reads the whole row at once, so that a token would see the future; drop `causal`."
            )
        if not causal and not self.has_whole_form and self.backward is None:
            raise InputError(f"`{self.name}` reads from left to right; drop `causal = False`.")

    def _refuse_pairs(self, call: Call) -> None:
        given = "attn_mask" if call.attn_mask is not None else "attn_bias"
        raise InputError(
            f"`{given}` hides single pairs of tokens, and `{self.name}` layers have no pairs; mask tokens by `mask`, "
            "or use attention."
        )

    def _check_state(self, state: Mapping[str, Tensor] | None, x: Tensor) -> None:
        if state is None:
            return
        for name, shape in self.state_shapes.items():
            own = state.get(name)
            if not isinstance(own, Tensor) or own.shape != (x.shape[0], *shape):
                what = f"has shape {tuple(own.shape)}" if isinstance(own, Tensor) else f"is {shown(own)}"
                raise ShapeError(
                    f"the state {name!r} of `{self.name}` {what}; it must be {(x.shape[0], *shape)}, as an earlier "
                    "pass of this model left it."
                )

    @property
    def keeps_documents_apart(self) -> bool:
        """False for all but those that do not mix tokens."""
        return not self.mixes_tokens

    def muon_parameters(self) -> list[Tensor]:
        """Return the weights of linear maps."""
        return matrices_of(self)

    def explain(self, situation: Any, **surroundings: Any) -> BranchCost:
        backend, why, flops = self.kernel(situation, surroundings.get("seq_len", 1))
        directions = 1 if self.backward is None else 2
        return BranchCost(backend, why, super().explain(situation).flops + directions * flops)


def turn_around(x: Tensor, row: Row) -> Tensor:
    """Reverse the live tokens of each row, `(b, n, d)`; dead ones stay after them."""
    if row.live is None:
        return x.flip(1)
    n = x.shape[1]
    place = torch.arange(n, device=x.device)
    count = row.live.sum(dim=-1, keepdim=True)
    index = torch.where(place < count, count - 1 - place, place)
    return x.gather(1, index.unsqueeze(-1).expand_as(x))


def arguments_of(mixer: type[Mixer]) -> list[str]:
    """Return the names of the arguments that are keywords: neither the width nor the causality of a stack."""
    names = list(inspect.signature(mixer.__init__).parameters)
    return [name for name in names if name not in ("self", "dim", "causal")]


def depends_on_causality(mixer: type[Mixer]) -> bool:
    """Return True if a mixer is made for one of the two forms."""
    return "causal" in inspect.signature(mixer.__init__).parameters


def shows_fields_of(options: type[Any]) -> Callable[[type[Built]], type[Built]]:
    """Return a decorator of mixers: names the fields of a dataclass that their constructors take by `**`."""

    def shown_by(mixer: type[Built]) -> type[Built]:
        first, *given = inspect.signature(mixer.__init__).parameters.values()
        own = [each for each in given if each.kind is not each.VAR_KEYWORD]
        own += inspect.signature(options).parameters.values()
        mixer.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        mixer.__init__.__signature__ = inspect.Signature([first, *own])  # type: ignore[attr-defined]
        return mixer

    return shown_by


def divided(width: int, parts: int, words: str) -> int:
    """Return `width // parts`.

    Raises:
        ConfigError: if there is a rest.
    """
    if parts < 1 or width < parts or width % parts:
        raise ConfigError(f"{words} is {width}, which {parts} does not divide; choose a multiple.")
    return width // parts
