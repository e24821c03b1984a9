"""The table of `explain()`: the features, backends, parameters and FLOPs of each sublayer."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import torch
from torch import nn

from x_transformers.attention.backends.base import Situation
from x_transformers.errors import InputError
from x_transformers.forward_pass.arguments import check_whole
from x_transformers.layers.stack import LayerStack


@dataclass(frozen=True)
class Row:
    """One sublayer.

    Attributes:
        name: its number and kind.
        features: the options that are on.
        backend: the backend of an attention, or "" for other sublayers.
        why: the reason for it.
        parameters: number of parameters.
        flops: floating-point operations of one token's forward pass, matrix products only, with `seq_len` keys.
        active: number of parameters that one token uses: fewer than there are if it uses some of many experts.
    """

    name: str
    features: tuple[str, ...]
    backend: str
    why: str
    parameters: int
    flops: int
    active: int


@dataclass(frozen=True)
class Explanation:
    """A table of sublayers. `print` shows it; `rows` contains it as data, and `notes` what slows the sublayers down."""

    title: str
    stack: tuple[str, ...]
    rows: tuple[Row, ...]
    parameters: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.title, f"stack: {', '.join(self.stack) or 'plain'}"]
        for row in self.rows:
            lines.append(
                f"  {row.name:<18} {row.parameters:>11,} parameters {row.flops:>13,} FLOPs/token  "
                + ("" if row.active == row.parameters else f"{row.active:,} active  ")
                + (f"{row.backend} ({row.why})  " if row.backend else "")
                + f"[{', '.join(row.features) or 'plain'}]"
            )
        total = sum(row.flops for row in self.rows)
        used = "" if self.active == self.parameters else f" ({self.active:,} active)"
        lines.append(f"in all {self.parameters:,} parameters{used}, {total:,} FLOPs/token in the layers")
        return "\n".join((*lines, *self.notes))

    __repr__ = __str__

    @property
    def active(self) -> int:
        """Number of parameters that one token uses."""
        return self.parameters - sum(row.parameters - row.active for row in self.rows)

    def _repr_html_(self) -> str:
        """Return the table as notebooks show it."""
        head = ("sublayer", "parameters", "FLOPs/token", "backend", "features")
        cells = [
            (
                row.name,
                _numbers(row.parameters, row.active),
                f"{row.flops:,}",
                f"{row.backend} ({row.why})" if row.backend else "",
                ", ".join(row.features) or "plain",
            )
            for row in self.rows
        ]
        total = ("in all", _numbers(self.parameters, self.active), f"{sum(row.flops for row in self.rows):,}", "", "")
        return (
            f"<p><b>{escape(self.title)}</b><br>stack: {escape(', '.join(self.stack) or 'plain')}</p><table><thead>"
            f"{_html_row('th', head)}</thead><tbody>{''.join(_html_row('td', row) for row in [*cells, total])}</tbody>"
            f"</table>{''.join(f'<p>{escape(note)}</p>' for note in self.notes)}"
        )


def _numbers(parameters: int, active: int) -> str:
    """Return the number of parameters, and that of active ones if these are fewer."""
    return f"{parameters:,}" if active == parameters else f"{parameters:,} ({active:,} active)"


def _html_row(kind: str, cells: tuple[str, ...]) -> str:
    """Return a row of a table; numbers, in the second and third column, end at one line."""
    styled = [
        f'<{kind} style="text-align: {"right" if number in (1, 2) else "left"}">{escape(cell)}</{kind}>'
        for number, cell in enumerate(cells)
    ]
    return f"<tr>{''.join(styled)}</tr>"


ALWAYS_ON = {"structure", "stack", "norm", "norm_placement", "heads", "backend", "attention_output", "feedforward"}
"""Features that every model has, and that the table leaves out."""


def explain_stack(
    stack: LayerStack,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    training: bool | None,
    seq_len: int,
) -> Explanation:
    """Return the table of a stack; see `AttentionLayers.explain`."""
    check_whole(seq_len=seq_len)
    training = stack.training if training is None else training
    situation = situation_of(stack, device, dtype, training)
    reach = next((each.reach for each in stack.rotations if each.decays), None)
    rows = []
    for number, branch in enumerate(stack.sublayers):
        kind, fn = branch.kind, branch.fn
        cost = fn.explain(
            situation,
            causal=stack.causal and kind.is_self_attention,
            bias=stack.rel_pos if kind.is_self_attention else None,
            training=training,
            seq_len=seq_len,
            reach=reach if kind.is_self_attention else None,
        )
        features = _noteworthy(fn.features)
        own = count(fn)
        active = own if cost.active is None else cost.active
        rows.append(Row(f"{number} {kind.label}", features, cost.backend, cost.why, own, cost.flops, active))
    mode = "training" if training else "evaluation"
    title = f"{type(stack).__name__}, {situation.device}, {situation.dtype}, {mode}, {seq_len} tokens"
    return Explanation(title, _noteworthy(stack.features), tuple(rows), count(stack), _slow_widths(stack, situation))


EVEN, NARROW = 8, 64
"""Numbers of half precision that matrix units read together; and the width below which matrices are cheap anyway."""


def _slow_widths(stack: LayerStack, situation: Situation) -> tuple[str, ...]:
    """Return a sentence for each kind of sublayer with matrices of a width that a GPU multiplies slowly."""
    if situation.device == "cpu" or situation.dtype not in (torch.bfloat16, torch.float16):
        return ()
    found: dict[str, set[int]] = {}
    for branch in stack.sublayers:
        sizes = (size for p in branch.fn.parameters() if p.ndim == 2 for size in p.shape)
        found.setdefault(branch.kind.label, set()).update(n for n in sizes if n > NARROW and n % EVEN)
    hint = " (the inner width is `int(dim * ff_mult)`; multiples of 256 are fastest)"
    return tuple(
        f"{kind}: matrices are {' and '.join(map(str, sorted(widths)))} wide, no multiple of {EVEN}, which a GPU "
        f"multiplies slowly in half precision{hint if kind == 'feedforward' else ''}"
        for kind, widths in found.items()
        if widths
    )


def _noteworthy(features: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(feature for feature in features if feature not in ALWAYS_ON)


def count(module: nn.Module) -> int:
    """Return the number of parameters of a module, with shared ones once."""
    return sum(p.numel() for p in module.parameters())


def situation_of(
    module: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None, training: bool | None
) -> Situation:
    """Return the situation to explain: that of the module, unless specified otherwise."""
    like = next(module.parameters())
    try:
        kind = like.device.type if device is None else torch.device(device).type
    except RuntimeError as error:
        raise InputError(f'`device` is {device!r}; it must be the name of a device, such as "cuda".') from error
    return Situation(
        device=kind,
        dtype=dtype or like.dtype,
        grad=module.training if training is None else training,
    )
