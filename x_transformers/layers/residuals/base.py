"""The contract of a residual connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.kinds import BranchKind
from x_transformers.modules.norms import Norm
from x_transformers.options.schema import Feature, Options, opt


@dataclass(frozen=True, kw_only=True)
class ResidualKeywordOptions:
    residual_fn_kwargs: dict[str, Any] = opt(
        {},
        "further arguments of the residual connection: `learned`, `init_alpha`, `init_beta`; `sinkhorn_iters`; "
        "`read_gate_rank`",
    )


@dataclass(frozen=True, kw_only=True)
class SublayerContext:
    """Where in a stack a part is built.

    Attributes:
        dim: width. index: of the sublayer in the built list. kind: of the sublayer. causal: of the stack.
        options: of the stack.
        first: no earlier sublayer is of this kind.
        views: how many inputs the residual connection makes: 3 for queries, keys and values apart.
        norm: makes the stack's norm, by width.
    """

    dim: int
    index: int
    kind: BranchKind
    causal: bool
    options: Options
    first: bool
    views: int
    norm: Callable[[int], Norm]


class StreamFrame(nn.Module):
    """What a connection with several streams does around the layers."""

    def expand(self, x: Tensor) -> Tensor:
        """The stack's input `(b, n, D)` to the streams `(b, n, s, D)`."""
        raise NotImplementedError

    def collapse(self, stream: Tensor, condition: Tensor | None = None) -> Tensor:
        """The streams behind the last layer to `(b, n, D)`, before the final norm."""
        raise NotImplementedError


class ResidualConnection(nn.Module):
    """Reads the stream for a sublayer, and writes the sublayer's output back.

    The stream is `(b, n, D)`, or `(b, n, s, D)` for connections that keep s streams.
    """

    running: tuple[str, ...] = ()
    """The running states that it keeps in causal passes."""

    def frame(self) -> StreamFrame | None:
        """What stands around the layers, for connections that keep several streams."""
        return None

    def read(self, stream: Tensor) -> tuple[Tensor, Any]:
        """The sublayer's input, and what `write` needs to know of the stream."""
        return stream, stream

    def write(self, out: Tensor, kept: Any, layer: LayerCall | None = None) -> Tensor:
        """The stream behind the sublayer."""
        raise NotImplementedError


class OneStream(ResidualConnection):
    """A connection over one stream, which is also used outside of a stack."""

    def prepare(self, residual: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The branch's input, and what `forward` is then given beside its output: the residual, and no keywords."""
        return residual, residual, {}

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The stream behind a branch that gave `x (b, n, D)`."""
        return self.write(x, residual)


def own_keywords(place: SublayerContext, known: Iterable[str]) -> dict[str, Any]:
    """The further arguments that a user gave for the residual connection.

    Raises:
        ConfigError: if one of them is not among those that the connection knows.
    """
    given = place.options["residual_keywords"].residual_fn_kwargs
    unknown = sorted(set(given) - set(known))
    if unknown:
        takes = ", ".join(f"`{name}`" for name in known) or "no arguments"
        raise ConfigError(
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
    summary="further arguments of the residual connection",
    examples=({"mv_split_residual": True, "residual_fn_kwargs": {"init_alpha": 0.2}},),
)
