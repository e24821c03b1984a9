"""The core: choose a backend for what the parts need, and weigh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger

from x_transformers.attention.backends.base import AttentionOutput, Backend, Request, Situation
from x_transformers.attention.backends.blocked import Blocked
from x_transformers.attention.backends.explicit import Explicit
from x_transformers.attention.backends.flex import Flex
from x_transformers.attention.backends.sdpa import SDPA
from x_transformers.attention.backends.varlen import Varlen
from x_transformers.attention.base import Needs, Visibility
from x_transformers.errors import ConfigError, InputError
from x_transformers.masks.builder import spelled_out


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
        self.fused: tuple[Backend, ...] = (SDPA(kernels), Blocked(), Flex())
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
        reasons = {each.name: each.lacks(needs) or each.refuses(situation, needs) for each in self.fused}
        able = [each for each in self.fused if reasons[each.name] is None]
        for backend in able:
            reasons[backend.name] = slower(backend, able, situation, needs)
            if reasons[backend.name] is None:
                passed = self.fused[: self.fused.index(backend)]
                return backend, "; ".join(str(reasons[each.name]) for each in passed) or "fused, and hosts every part"
        if self.flash and able:
            return able[0], "`flash = True`"
        return self.explicit, "; ".join(str(reason) for reason in reasons.values())

    def __call__(self, request: Request) -> AttentionOutput:
        """Weigh as asked."""
        needs = self._needs(request)
        backend, why = self._choice(request, needs, _learns(request))
        if self.flash and not backend.fused and not request.capture:
            self._warn_once(f"`attn_flash = True`, but this call runs the explicit backend: {why}.")
        return _attend(backend, request)

    def fused_alone(self, request: Request) -> AttentionOutput:
        """Weigh by a fused kernel, whatever `flash` says.

        Raises:
            InputError: if none hosts the request.
        """
        needs, q = self._needs(request), request.q
        width = max(q.shape[-1], request.v.shape[-1])
        situation = Situation(q.device.type, q.dtype, _learns(request), width=width)
        reasons = [backend.lacks(needs) or backend.refuses(situation, needs) for backend in self.fused]
        for backend, reason in zip(self.fused, reasons, strict=True):
            if reason is None:
                return _attend(backend, request)
        raise InputError(f"no fused kernel hosts this call: {'; '.join(str(reason) for reason in reasons)}.")

    def _needs(self, request: Request) -> Needs:
        needs = self.needs if request.dropout > 0 else self.quiet_needs
        if request.scores or request.rows or request.weights:
            for part in (*request.scores, *request.rows, *request.weights):
                needs |= part.needs
        if request.capture:
            needs |= Needs.SCORES
        if request.visible.masks:
            needs |= Needs.MASK
        if request.visible.documents is not None:
            needs |= Needs.DOCUMENTS
        return needs

    def _choice(self, request: Request, needs: Needs, grad: bool) -> tuple[Backend, str]:
        """The same as `choose`; the last answer is remembered, since eager decoding asks for every layer and token."""
        q, visible = request.q, request.visible
        width = max(q.shape[-1], request.v.shape[-1])
        if torch.compiler.is_compiling():
            # lengths of a graph may be symbols, which nothing should be decided by; a length of 1 never is one
            queries = 1 if q.shape[-2] == 1 else MANY
            layer = request.layer
            keeps = layer is not None and (layer.entry is not None or layer.states is not None)
            situation = Situation(q.device.type, q.dtype, grad, True, width, queries, visible.skips, keeps)
            return self.choose(situation, needs)
        asked = (q.device, q.dtype, grad, width, q.shape[-2], visible.skips, needs, self.flash)
        if asked != self._asked:
            situation = Situation(q.device.type, q.dtype, grad, False, width, q.shape[-2], visible.skips)
            self._asked, self._answer = asked, self.choose(situation, needs)
        return self._answer

    def _warn_once(self, message: str) -> None:
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


MANY = 2**31 - 1
"""Queries of a graph, whose number may change from run to run."""

FULL, HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A finding: one backend is the slower one where another can do the work as well.

    Attributes:
        slow, fast: their names.
        needs: any of these is there. skips: only where whole stretches of keys are hidden.
        least, most: queries.
        dtypes: in which it holds.
        device: on which. graph: only inside of a compiled graph.
        expected: nothing was measured yet; it follows from what the kernels are documented to do.
    """

    slow: str
    fast: str
    needs: Needs
    skips: bool = False
    least: int = 0
    most: float = math.inf
    dtypes: tuple[torch.dtype, ...] = (*FULL, *HALF)
    device: str = "cpu"
    graph: bool = False
    expected: bool = False

    def holds(self, situation: Situation, needs: Needs) -> bool:
        """Whether it is about such a pass."""
        if self.device != situation.device or situation.dtype not in self.dtypes:
            return False
        if self.graph and not situation.compiling:
            return False
        if not (needs & self.needs) or (self.skips and not situation.skips):
            return False
        return self.least <= situation.queries <= self.most

    def __str__(self) -> str:
        holds = "is expected to be" if self.expected else "is"
        where = " in a compiled graph" if self.graph else ""
        least = f" from {self.least} tokens on" if self.least > 1 else ""
        most = "" if math.isinf(self.most) else f" up to {int(self.most)} token{'s' * (self.most > 1)}"
        return f"{self.slow} {holds} slower than {self.fast} on {DEVICES[self.device]}{where}{least}{most}"


VISIBLE = Needs.MASK | Needs.BIAS | Needs.DOCUMENTS
MEASURED = (
    Measured(slow="sdpa", fast="explicit", needs=~Needs.NOTHING, least=1, most=1, dtypes=FULL, graph=True),
    Measured(slow="sdpa", fast="blocked", needs=Needs.BIAS, least=512, dtypes=FULL),
    Measured(slow="sdpa", fast="blocked", needs=Needs.MASK, skips=True, least=512, dtypes=FULL),
    Measured(slow="sdpa", fast="blocked", needs=Needs.BIAS, least=2048),
    Measured(slow="sdpa", fast="blocked", needs=Needs.MASK, skips=True, least=2048),
    Measured(slow="blocked", fast="explicit", needs=Needs.POINTWISE | Needs.SINK, most=255),
    Measured(slow="flex", fast="explicit", needs=~Needs.NOTHING),
    Measured(slow="sdpa", fast="flex", needs=VISIBLE, least=128, dtypes=HALF, device="cuda", expected=True),
    Measured(slow="sdpa", fast="flex", needs=VISIBLE, least=2048, dtypes=FULL, device="cuda", expected=True),
    Measured(slow="flex", fast="explicit", needs=~Needs.NOTHING, most=127, device="cuda", expected=True),
)
"""On a CPU found with 6 heads of 64 features on two threads, training and evaluation alike. A graph makes one loop of
what the explicit backend does for one query. Biases and masks at length are about memory too: what sdpa adds to the
scores has a number for every pair of tokens.

On a GPU expected until measured. With a mask or a bias, sdpa leaves its fastest kernel and reads a number for every
pair of tokens; flex computes both where it needs them, and skips what nobody sees, in blocks of 128. In full precision
its matrix products lose that advantage, which leaves memory. The scores of fewer queries than a block has are few, and
soon written out."""


def slower(backend: Backend, able: Iterable[Backend], situation: Situation, needs: Needs) -> str | None:
    """Why to pass over a backend in favour of another able one, or of the explicit one; None if it is the one."""
    others = {each.name for each in able} | {Explicit.name}
    found = (each for each in MEASURED if each.slow == backend.name and each.fast in others)
    return next((str(each) for each in found if each.holds(situation, needs)), None)


def _learns(request: Request) -> bool:
    """Whether something is to have a gradient."""
    return torch.is_grad_enabled() and (request.q.requires_grad or request.k.requires_grad or request.v.requires_grad)


def _attend(backend: Backend, request: Request) -> AttentionOutput:
    if request.visible.documents is not None and not backend.reads_documents:
        request.visible = _spelled_out(request)
    return backend.attend(request)


def _spelled_out(request: Request) -> Visibility:
    """The mask that keeps documents apart, made once a pass."""
    visible = request.visible
    i, j = request.q.shape[-2], request.k.shape[-2]
    return request.memo.once(lambda: spelled_out(visible, i, j), "documents", visible)
