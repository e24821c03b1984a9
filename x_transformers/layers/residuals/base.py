"""Interface of residual connections, and the context in which the parts of a sublayer are built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.errors import UnknownKeywordError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.kinds import BranchKind
from x_transformers.modules.norms import Norm
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.options.schema import Feature, Options, opt


@dataclass(frozen=True, kw_only=True)
class ResidualKeywordOptions:
    residual_fn_kwargs: dict[str, Any] = opt(
        {},
        "more arguments for the residual connection: `learned`, `init_alpha` and `init_beta` of MV-split; "
        "`sinkhorn_iters` of hyper-connections; `read_gate_rank` of gated streams",
    )


@dataclass(frozen=True, kw_only=True)
class SublayerContext:
    """Position of a sublayer in its stack, and the stack's settings, for functions that build its parts.

    Attributes:
        dim: model width D.
        index: index of the sublayer in the list of built sublayers.
        kind: kind of the sublayer.
        causal: True if the stack is causal.
        options: options of the stack.
        first: True if no earlier sublayer is of the same kind.
        views: number of inputs that the residual connection returns: 3 if queries, keys and values each read their
            own, else 1.
        norm: builds the stack's norm for a given width.
    """

    dim: int
    index: int
    kind: BranchKind
    causal: bool
    options: Options
    first: bool
    views: int
    norm: Callable[[int], Norm]


class StreamFrame(LoadsWhole):
    """Entry to and exit from several residual streams: expands before the first layer, collapses after the last."""

    def expand(self, x: Tensor) -> Tensor:
        """Expand the stack's input `(b, n, D)` to s streams `(b, n, s, D)`."""
        raise NotImplementedError

    def collapse(self, stream: Tensor, condition: Tensor | None = None) -> Tensor:
        """Collapse the streams `(b, n, s, D)` after the last layer to `(b, n, D)`, before the final norm."""
        raise NotImplementedError


class ResidualConnection(LoadsWhole):
    """Abstract base class of residual connections.

    `read` extracts a sublayer's input from the residual stream, `write` combines the sublayer's output with the stream.
    The stream is `(b, n, D)`, or `(b, n, s, D)` for connections with s streams.

    Attributes:
        running: names of the states of fixed size that the connection keeps from pass to pass in causal stacks.
        only_adds: `write` returns `out + kept` and nothing else.
        views: number of inputs that `read` returns: 3 if queries, keys and values each read their own mix, else 1.
    """

    running: tuple[str, ...] = ()
    only_adds = False
    views: int = 1

    def frame(self) -> StreamFrame | None:
        """Build the entry to and exit from the streams; None for connections with a single stream."""
        return None

    def read(self, stream: Tensor) -> tuple[Tensor, Any]:
        """Return the sublayer's input, and what `write` needs to know about the stream."""
        return stream, stream

    def write(self, out: Tensor, kept: Any, layer: LayerCall | None = None) -> Tensor:
        """Return the stream after the sublayer.

        Args:
            out: `(b, n, D)` output of the sublayer.
            kept: second result of `read`.
            layer: call of the sublayer; None outside of a stack.
        """
        raise NotImplementedError


class OneStream(ResidualConnection):
    """Residual connection with a single stream, which is also a module for use outside of a stack."""

    def prepare(self, residual: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the branch's input, and the residual and keyword arguments (none here) to call this module with."""
        return residual, residual, {}

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the stream `(b, n, D)` after a branch with the output `x (b, n, D)`."""
        return self.write(x, residual)


def own_keywords(sublayer: SublayerContext, known: Iterable[str]) -> dict[str, Any]:
    """Return the user's `residual_fn_kwargs`, after a check that the connection knows all of them.

    Raises:
        UnknownKeywordError: if one of them is not in `known`.
    """
    given = sublayer.options["residual_keywords"].residual_fn_kwargs
    unknown = sorted(set(given) - set(known))
    if unknown:
        takes = ", ".join(f"`{name}`" for name in known) or "no arguments"
        raise UnknownKeywordError(
            f"`residual_fn_kwargs` names {', '.join(f'`{name}`' for name in unknown)}, but the chosen residual "
            f"connection takes {takes}; drop them."
        )
    return dict(given)


KEYWORDS = Feature(
    name="residual_keywords",
    group="stack",
    slot="residual options",
    options=ResidualKeywordOptions,
    enabled=lambda options: bool(options.residual_fn_kwargs),
    summary="more arguments for the residual connection",
    examples=({"mv_split_residual": True, "residual_fn_kwargs": {"init_alpha": 0.2}},),
)
