"""Contract of the function of a branch, which a sublayer runs between reading and writing the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from x_transformers.cache.entries import Shape
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import BranchOutput, LayerCall
from x_transformers.modules.tied_linear import borrowed_elements


class BranchCost(NamedTuple):
    """Backend and cost of a branch function, for `explain()`.

    Attributes:
        backend: the kernel that runs, or "" if there is no choice.
        why: the reason for the choice.
        flops: floating-point operations per token of a forward pass, matrix products only.
        active: number of parameters that one token uses; None: all.
    """

    backend: str
    why: str
    flops: int
    active: int | None = None


class BranchFunction(nn.Module):
    """Abstract base class of attentions, feedforwards and other functions of a branch.

    A stack calls a branch function as a module, `fn(x, layer=layer)`, so that hooks, checkpoint wrappers and
    `fully_shard` act on it. `forward` then returns `run(x, layer)`. Without `layer`, `forward` is the public call of
    the module by itself.

    Attributes:
        state_names: names of the states of fixed size that the function keeps from pass to pass.
        features: names of the features that are on.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    features: tuple[str, ...] = ()

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        """Compute the output of the branch.

        Args:
            x: `(b, n, D)` normalized input.
            layer: the sublayer's call.

        Returns:
            the output `(b, n, D)`, its record, and what later layers read.
        """
        raise NotImplementedError

    def remember(self, x: Tensor, layer: LayerCall) -> Any:
        """Write what later tokens read of these into the entry of the cache, without an output.

        Args:
            x: `(b, n, D)` normalized input.
            layer: the sublayer's call, with an entry.

        Returns:
            the record of `run`, or None if the function has to run as usual.
        """
        return None

    def begin_at(self, number: int, count: int) -> None:
        """Set first values that depend on the place in a stack.

        Args:
            number: of the sublayer among those of its kind, from 0.
            count: number of sublayers of the kind.
        """

    def cache_streams(self, rotations: Sequence[Any] = ()) -> dict[str, Shape]:
        """Return the streams that grow with the sequence, as `{name: (heads, width)}`.

        Args:
            rotations: the stack's transforms of queries and keys, which may change the width of keys.
        """
        return {}

    @property
    def reach(self) -> int | None:
        """Number of earlier slots that the function reads at most; None if it may read all of them."""
        return None

    @property
    def requires_causal(self) -> list[str]:
        """The keywords of parts that only work in causal passes."""
        return []

    @property
    def has_aux_loss(self) -> bool:
        """True if the function has a loss of its own, which its records contain."""
        return False

    @property
    def mixes_rows(self) -> bool:
        """True if each token reads all tokens of its row, although the function is no attention and no token mixer."""
        return False

    @property
    def keeps_documents_apart(self) -> bool:
        """True if the function keeps the documents of packed rows apart."""
        return False

    def check_causality(self, causal: bool, cached: bool = False) -> None:
        """Check that the function supports this causality, and a cache.

        Args:
            causal: the pass is causal.
            cached: the pass uses a cache.

        Raises:
            InputError: if it does not.
        """
        if not causal and self.requires_causal:
            raise InputError(
                f"{self.requires_causal[0]} works in causal passes only; `causal = False` makes no sense with it."
            )

    def muon_parameters(self) -> list[Tensor]:
        """Return the matrices that Muon may orthogonalize (2502.16982)."""
        return []

    def explain(self, situation: Any, **surroundings: Any) -> BranchCost:
        """Return the backend that would run, the reason for it, and the cost per token.

        Args:
            situation: device, dtype and mode.
            surroundings: `causal`, `bias`, `training` and `seq_len`; see `Attention.explain`.
        """
        elements = sum(p.numel() for p in self.parameters() if p.ndim == 2) + borrowed_elements(self)
        return BranchCost("", "", 2 * elements)
