"""Rotation of pairs of features by tables of cosines and sines, with a backward pass that rotates back.

A pair `(x, y)` becomes `(x cos - y sin, y cos + x sin)`. The pairs of the first r features are adjacent, `(2k, 2k + 1)`
(arXiv 2104.09864), or consist of one feature from each half, `(k, k + r/2)`, as in Llama.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.modules.hand_written import by_formula, is_exporting, needs_formula, needs_operations

HALF_PRECISION = (torch.float16, torch.bfloat16)


class RotationTable:
    """Cosines and sines for the tokens of one span, made once a pass.

    Args:
        cos: `(1|b, 1, n, r/2)`, in float32 or wider.
        sin: of the same shape.
        halves: pairs consist of one feature from each half of the first r, instead of two adjacent ones.
    """

    def __init__(self, cos: Tensor, sin: Tensor, halves: bool = False) -> None:
        self.cos, self.sin, self.halves = cos, sin, halves
        self._made: dict[tuple[str, int], Tensor] = {}

    @property
    def width(self) -> int:
        """Number r of features that rotate."""
        return 2 * self.cos.shape[-1]

    def pairs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return views `(..., r/2)` of the first and of the second features of the pairs of `t`."""
        r = self.width
        return (t[..., : r // 2], t[..., r // 2 : r]) if self.halves else (t[..., 0:r:2], t[..., 1:r:2])

    def cosines(self, width: int) -> Tensor:
        """Return the factors `(1|b, 1, n, width)` of each feature by itself; 1 for those that do not rotate."""
        made = self._made.get(("cosines", width))
        if made is None:
            made = torch.cat((self.cos, self.cos), dim=-1) if self.halves else self.cos.repeat_interleave(2, dim=-1)
            made = self._made["cosines", width] = F.pad(made, (0, width - self.width), value=1.0)
        return made

    def numbers(self, width: int, sign: int) -> Tensor:
        """Return the complex numbers `(1|b, 1, n, width/2)` that adjacent pairs are multiplied by, or to rotate back
        (sign -1), their conjugates.
        """
        made = self._made.get(("numbers", sign * width))
        if made is None:
            made = torch.complex(self.cos, self.sin if sign > 0 else -self.sin)
            made = self._made["numbers", sign * width] = F.pad(made, (0, (width - self.width) // 2), value=1.0)
        return made


def rotate(t: Tensor, table: RotationTable, sign: int = 1) -> Tensor:
    """Rotate the pairs of the first r features.

    Args:
        t: `(b, h, n, d)`.
        table: of the n tokens.
        sign: -1 rotates back.

    Returns:
        a tensor of the shape and dtype of `t`; computed in float32 or wider.
    """
    if torch.compiler.is_compiling():
        # Compiled for a CPU, the loop over adjacent pairs loads numbers one by one instead of as vectors, which takes
        # four times as long. Exported programs have to do without operators of this library.
        if t.device.type != "cpu" or t.shape[-2] == 1 or table.halves or t.shape[-1] % 2 or is_exporting():
            return _formula(t, table, sign)
        return rotate_uncompiled(t, table.cos, table.sin if sign > 0 else -table.sin)
    if table.cos.requires_grad or needs_operations():
        return _formula(t, table, sign)
    if not (torch.is_grad_enabled() and t.requires_grad):
        return _kernels(t, table, sign)
    out: Tensor = Rotation.apply(t, table, sign)
    return out


class Rotation(torch.autograd.Function):
    """Rotation as one step of autograd, whose backward pass is the rotation in the opposite direction.

    `apply` takes the tensor, its table and the sign. The table gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, table: RotationTable, sign: int) -> Tensor:
        ctx.table, ctx.sign, ctx.shape = table, sign, t.shape
        return _kernels(t, table, sign)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if not torch.is_grad_enabled() and needs_formula(gradient):
            like = torch.zeros(ctx.shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
            (found,) = by_formula(lambda t: _formula(t, ctx.table, ctx.sign), [like], [gradient])
            return found, None, None
        return rotate(gradient, ctx.table, -ctx.sign), None, None


def _kernels(t: Tensor, table: RotationTable, sign: int) -> Tensor:
    """Rotate in as few kernels as possible, which autograd does not see."""
    width = t.shape[-1]
    pointwise = t.dtype in HALF_PRECISION or table.halves or width % 2 or t.device.type not in ("cpu", "cuda")
    if not pointwise:
        pairs = t.unflatten(-1, (-1, 2))
        # `view_as_complex` needs the two numbers of a pair next to each other, and pairs at even addresses
        if pairs.stride(-1) != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
            pairs = pairs.clone(memory_format=torch.contiguous_format)
        turned = torch.view_as_complex(pairs) * table.numbers(width, sign)
        return torch.view_as_real(turned).flatten(-2).to(t.dtype)
    if t.dtype not in HALF_PRECISION:
        wide = out = t * table.cosines(width)
    else:
        # products with a table of float32 are computed and kept in float32, without a copy of `t`
        wide, out = t[..., : table.width] * table.cosines(table.width), torch.empty_like(t)
        if table.width < width:
            out[..., table.width :] = t[..., table.width :]
    (x, y), (x_cos, y_cos), (x_out, y_out) = table.pairs(t), table.pairs(wide), table.pairs(out)
    torch.addcmul(x_cos, y, table.sin, value=-sign, out=x_out)
    torch.addcmul(y_cos, x, table.sin, value=sign, out=y_out)
    return out


def _formula(t: Tensor, table: RotationTable, sign: int) -> Tensor:
    """Rotate by operations that a compiler fuses, and that have derivatives of all kinds."""
    (x, y), cos, sin = table.pairs(t), table.cos, table.sin if sign > 0 else -table.sin
    turned = (x * cos - y * sin, y * cos + x * sin)
    rotated = torch.cat(turned, dim=-1) if table.halves else torch.stack(turned, dim=-1).flatten(-2)
    rotated = rotated.to(t.dtype)
    return rotated if table.width == t.shape[-1] else torch.cat((rotated, t[..., table.width :]), dim=-1)


@torch.library.custom_op("x_transformers::rotate", mutates_args=())
def rotate_uncompiled(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs by one operation that a compiler does not look into; returns a contiguous tensor."""
    # the compiler plans with the strides that the fake version below promises
    return _kernels(t, RotationTable(cos, sin), 1).contiguous()


@rotate_uncompiled.register_fake
def _(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _save_tables(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _rotate_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    cos, sin = ctx.saved_tensors
    # the inverse of a rotation is its transpose: rotate by the opposite angle
    return rotate_uncompiled(gradient, cos, -sin), None, None


rotate_uncompiled.register_autograd(_rotate_gradient, setup_context=_save_tables)
