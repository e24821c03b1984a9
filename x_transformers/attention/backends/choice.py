"""Choice of a backend: which one can host a request, and which of those is the fastest by measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from x_transformers.attention.backends.base import Backend, Request, Situation
from x_transformers.attention.backends.blocked import Blocked
from x_transformers.attention.backends.explicit import Explicit
from x_transformers.attention.backends.flex import Flex
from x_transformers.attention.backends.sdpa import SDPA
from x_transformers.attention.backends.varlen import Varlen
from x_transformers.attention.base import Needs
from x_transformers.errors import ConfigError, InputError
from x_transformers.notices import warn

MANY = 2**31 - 1
"""Number of queries in a graph where it may change from run to run."""


class BackendChoice:
    """Chooses the fastest backend that can host a request.

    Args:
        flash: None chooses the fastest backend; True demands a fused one; False never uses one.
        kernels: which of PyTorch's kernels SDPA may use.
        packed: passes may keep the documents of packed rows apart.

    Attributes:
        fused: the fused backends, in the order of preference.
    """

    def __init__(self, *, flash: bool | None, kernels: dict[str, bool] | None, packed: bool) -> None:
        self.flash = flash
        self.explicit = Explicit()
        self.fused: tuple[Backend, ...] = (SDPA(kernels), Blocked(), Flex())
        if packed and (kernels or {}).get("enable_flash", True):
            self.fused = (Varlen(), *self.fused)
        self._warned: set[str] = set()

    def check(self, needs: int, needed_by: Mapping[int, list[str]]) -> None:
        """Check that the needs can be met.

        Args:
            needs: of the parts, at every call.
            needed_by: the keywords that each need comes from.

        Raises:
            ConfigError: if a fused kernel is demanded and no fused backend, on any device, can host the parts.
        """
        lacks = [backend.lacks(needs) for backend in self.fused]
        if self.flash and all(lacks):
            culprits = [
                name for need, names in needed_by.items() if any(b.lacks(need) for b in self.fused) for name in names
            ]
            raise ConfigError(
                f"`flash = True` demands a fused kernel, but {'; '.join(str(lack) for lack in lacks)}. "
                f"Drop {' or '.join(culprits)}, or leave `flash` at None."
            )

    def choose(self, situation: Situation, needs: int) -> tuple[Backend, str]:
        """Return the backend for these needs, and the reason."""
        backend, reasons = self._decide(situation, needs)
        return backend, "; ".join(str(reason) for reason in reasons) or "fused, and hosts every part"

    def _decide(self, situation: Situation, needs: int) -> tuple[Backend, list[str | Measurement | None]]:
        """Return the backend, and why not those before it; words are joined elsewhere, since graphs cannot."""
        if self.flash is False:
            return self.explicit, ["`flash = False`"]
        if needs & Needs.SCORES:
            return self.explicit, ["the scores were requested"]
        if situation.transformed:
            return self.explicit, ["fused kernels have no derivatives in forward mode and under `torch.func`"]
        reasons: dict[str, str | Measurement | None] = {
            each.name: each.lacks(needs) or each.refuses(situation, needs) for each in self.fused
        }
        able = [each for each in self.fused if reasons[each.name] is None]
        for backend in able:
            reasons[backend.name] = slower(backend, able, situation, needs)
            if reasons[backend.name] is None:
                return backend, [reasons[each.name] for each in self.fused[: self.fused.index(backend)]]
        if self.flash and able:
            return able[0], ["`flash = True`"]
        return self.explicit, list(reasons.values())

    def for_request(self, request: Request, needs: int) -> Backend:
        """Return the backend for a request, and warn once if a fused kernel is demanded and none can run."""
        q, k, v, hiding = request.q, request.k, request.v, request.visible.hiding
        grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        width, queries, compiling, keeps = max(q.shape[-1], v.shape[-1]), q.shape[-2], False, False
        skips = hiding is not None and (hiding.order is not None or hiding.slots is not None)
        if torch.compiler.is_compiling():
            # A length in a graph may be a symbol, and a decision that reads it would tie the graph to its value. A
            # length of 1 is never a symbol.
            compiling, queries, layer = True, 1 if queries == 1 else MANY, request.layer
            keeps = layer is not None and (layer.entry is not None or layer.states is not None)
        transformed = not compiling and is_transformed()
        situation = Situation(q.device.type, q.dtype, grad, compiling, width, queries, skips, keeps, transformed)
        backend, reasons = self._decide(situation, needs)
        if self.flash and not backend.fused and not request.capture and not torch.compiler.is_compiling():
            why = "; ".join(str(reason) for reason in reasons)
            self._warn_once(f"`attn_flash = True`, but this call runs the explicit backend: {why}.")
        return backend

    def only_fused(self, request: Request, needs: int) -> Backend:
        """Return the first fused backend that can host a request, whatever `flash` is.

        Raises:
            InputError: if there is none.
        """
        q, k, v = request.q, request.k, request.v
        grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        situation = Situation(q.device.type, q.dtype, grad, width=max(q.shape[-1], v.shape[-1]))
        reasons = [backend.lacks(needs) or backend.refuses(situation, needs) for backend in self.fused]
        for backend, reason in zip(self.fused, reasons, strict=True):
            if reason is None:
                return backend
        raise InputError(f"no fused kernel hosts this call: {'; '.join(str(reason) for reason in reasons)}.")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)


def is_transformed() -> bool:
    """Return True within a function that `torch.func` transforms, or where derivatives are taken in forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


FULL, HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A finding: one backend is slower than another that can do the same work.

    Attributes:
        slow, fast: their names.
        needs: it is about passes with any of these needs.
        skips: only where whole ranges of keys are hidden.
        least, most: bounds of the number of queries.
        dtypes: of the queries.
        device: type of the device.
        graph: only within a compiled graph.
        expected: not measured yet; it follows from the documentation of the kernels.
    """

    slow: str
    fast: str
    needs: int
    skips: bool = False
    least: int = 0
    most: float = math.inf
    dtypes: tuple[torch.dtype, ...] = (*FULL, *HALF)
    device: str = "cpu"
    graph: bool = False
    expected: bool = False

    def holds(self, situation: Situation, needs: int) -> bool:
        """Return True if the finding is about such a pass."""
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
MEASUREMENTS = (
    Measurement(slow="sdpa", fast="explicit", needs=Needs.ALL, least=1, most=1, dtypes=FULL, graph=True),
    Measurement(slow="sdpa", fast="blocked", needs=Needs.BIAS, least=512, dtypes=FULL),
    Measurement(slow="sdpa", fast="blocked", needs=Needs.MASK, skips=True, least=512, dtypes=FULL),
    Measurement(slow="sdpa", fast="blocked", needs=Needs.BIAS, least=2048),
    Measurement(slow="sdpa", fast="blocked", needs=Needs.MASK, skips=True, least=2048),
    Measurement(slow="blocked", fast="explicit", needs=Needs.POINTWISE | Needs.SINK, most=255),
    Measurement(slow="flex", fast="explicit", needs=Needs.ALL),
    Measurement(slow="sdpa", fast="flex", needs=VISIBLE, least=128, dtypes=HALF, device="cuda", expected=True),
    Measurement(slow="sdpa", fast="flex", needs=VISIBLE, least=2048, dtypes=FULL, device="cuda", expected=True),
    Measurement(slow="flex", fast="explicit", needs=Needs.ALL, most=127, device="cuda", expected=True),
)
"""Measured on a CPU with 6 heads of 64 features on two threads, with equal results in training and evaluation. The
compiler fuses the steps of the explicit backend for one query into one loop. For long sequences, biases and masks also
cost memory: SDPA reads a number for every pair of tokens.

Expected on a GPU, until it is measured: with a mask or a bias, SDPA cannot use its fastest kernel and reads a number
for every pair of tokens; FlexAttention computes both where it needs them, and skips what no query sees, in blocks of
128. In full precision its matrix products are no faster, which leaves the memory. With fewer queries than a block has,
there are few scores, and to write them out is fast."""


def slower(backend: Backend, able: Iterable[Backend], situation: Situation, needs: int) -> Measurement | None:
    """Return the finding that another able backend, or the explicit one, is faster than this one; None if none is."""
    others = {each.name for each in able} | {Explicit.name}
    # a loop, since older versions of the compiler cannot trace a default of `next`
    for each in MEASUREMENTS:
        if each.slow == backend.name and each.fast in others and each.holds(situation, needs):
            return each
    return None
