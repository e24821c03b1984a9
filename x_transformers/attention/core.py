"""The core: choose a backend for what the parts need, and weigh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from loguru import logger

from x_transformers.attention.backends.base import Backend, Request, Situation, Weighed
from x_transformers.attention.backends.explicit import Explicit
from x_transformers.attention.backends.flex import Flex
from x_transformers.attention.backends.sdpa import SDPA
from x_transformers.attention.backends.varlen import Varlen
from x_transformers.attention.base import Needs, Visibility
from x_transformers.attention.masks import spelled_out
from x_transformers.errors import ConfigError


class Core:
    """Weighs values by scores, with the fastest backend that can host what was asked.

    Args:
        because: what the parts of this attention need, whatever the call, and which keywords brought each need.
        scale: factor of `q k^T`.
        flash: None picks the fastest backend; True demands a fused one; False never fuses.
        kernels: which of PyTorch's kernels SDPA may use.
        packed: passes may keep the documents of packed rows apart.

    Raises:
        ConfigError: if a fused kernel is demanded and no fused backend, on any device, can host the parts.
    """

    def __init__(
        self,
        *,
        because: Mapping[Needs, list[str]],
        scale: float,
        flash: bool | None = None,
        kernels: dict[str, bool] | None = None,
        packed: bool = False,
    ) -> None:
        self.needs = self.quiet_needs = Needs.NOTHING
        for need in because:
            self.demand(need)
        self.scale, self.flash = scale, flash
        self.explicit = Explicit()
        self.fused: tuple[Backend, ...] = (SDPA(kernels), Flex())
        if packed and (kernels or {}).get("enable_flash", True):
            self.fused = (Varlen(), *self.fused)
        self._warned: set[str] = set()
        self._asked: Any = None
        self._answer: tuple[Backend, str] = (self.explicit, "")
        lacks = [backend.lacks(self.needs) for backend in self.fused]
        if flash and all(lacks):
            culprits = [
                name for need, names in because.items() if any(b.lacks(need) for b in self.fused) for name in names
            ]
            raise ConfigError(
                f"`flash = True` demands a fused kernel, but {'; '.join(str(lack) for lack in lacks)}. "
                f"Drop {' or '.join(culprits)}, or leave `flash` at None."
            )

    def demand(self, need: Needs) -> None:
        """Further needs, whatever the call; dropout is none in evaluation."""
        self.needs |= need
        self.quiet_needs = self.needs & ~Needs.DROPOUT

    def choose(self, situation: Situation, needs: Needs) -> tuple[Backend, str]:
        """The backend for this pass, and why it is the one."""
        if self.flash is False:
            return self.explicit, "`flash = False`"
        if Needs.SCORES in needs:
            return self.explicit, "the scores were asked for"
        reasons = []
        for backend in self.fused:
            reason = backend.lacks(needs) or backend.refuses(situation, needs)
            if reason is None and backend.name == "flex" and situation.device == "cpu" and not self.flash:
                reason = "flex is no faster than explicit on a CPU"
            if reason is None:
                return backend, "; ".join(reasons) or "fused, and hosts every part"
            reasons.append(reason)
        return self.explicit, "; ".join(reasons)

    def __call__(self, request: Request) -> Weighed:
        """Weigh as asked."""
        q = request.q
        needs = self.needs if request.dropout > 0 else self.quiet_needs
        if request.scores or request.rows or request.weights:
            for part in (*request.scores, *request.rows, *request.weights):
                needs |= part.needs
        if request.capture:
            needs |= Needs.SCORES
        grad = torch.is_grad_enabled() and (q.requires_grad or request.k.requires_grad or request.v.requires_grad)
        documents, width = request.visible.documents, 0
        if documents is not None:
            needs |= Needs.DOCUMENTS
            width = max(q.shape[-1], request.v.shape[-1])
        backend, why = self._choice(q.device, q.dtype, grad, needs, width)
        if documents is not None and not backend.reads_documents:
            request.visible = _spelled_out(request)
        if self.flash and not backend.fused and not request.capture:
            self._warn_once(f"`attn_flash = True`, but this call runs the explicit backend: {why}.")
        return backend.attend(request)

    def _choice(
        self, device: torch.device, dtype: torch.dtype, grad: bool, needs: Needs, width: int
    ) -> tuple[Backend, str]:
        """The same as `choose`; the last answer is remembered, since eager decoding asks for every layer and token."""
        if torch.compiler.is_compiling():
            return self.choose(Situation(device.type, dtype, grad, True, width), needs)
        asked = (device, dtype, grad, needs, width, self.flash)
        if asked != self._asked:
            self._asked, self._answer = asked, self.choose(Situation(device.type, dtype, grad, width=width), needs)
        return self._answer

    def _warn_once(self, message: str) -> None:
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _spelled_out(request: Request) -> Visibility:
    """The mask that keeps documents apart, made once a pass."""
    visible, shape = request.visible, (request.q.shape[-2], request.k.shape[-2])
    rule = ("documents", id(visible))
    if rule not in request.memo:
        # it stays in the memo, so that its id stays its own
        request.memo[rule] = spelled_out(visible, *shape), visible
    return request.memo[rule][0]
