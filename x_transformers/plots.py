"""Pictures of what a pass records and of training: attention, norms of the residual stream, learning curves.

matplotlib is imported when the first picture is drawn (`pip install 'x-transformers[plots]'`). Every function returns a
figure, which notebooks show and `figure.savefig(path)` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.ops import at_least_float32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Colors of lines, also distinct for color-blind readers."""
DPI = 220
"""Dots per inch of the pictures of this library, twice those of a screen: `figure.savefig(path, dpi=DPI)`."""
STYLE: dict[str, Any] = {
    "axes.edgecolor": "#9aa0a6",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8.5,
    "figure.facecolor": "white",
    "font.size": 8.5,
    "legend.frameon": False,
}
"""Parameters of matplotlib for all pictures of this library."""


def attention(
    weights: LayerIntermediates | Sequence[Tensor],
    *,
    row: int = 0,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    mean_of_heads: bool = False,
) -> Figure:
    """Draw attention weights: a row of panels for each attention, a panel for each head; single maps fill rows.

    Args:
        weights: record of a pass (`return_intermediates`), or `(b, h, i, j)` weights of each attention (`return_attn`).
        row: row of the batch.
        queries: i labels of the vertical axis, such as the tokens.
        keys: j labels of the horizontal axis; default those of the queries, if there are as many keys.
        mean_of_heads: draw one panel for each attention, the mean over its heads.

    Raises:
        InputError: if there are no weights, or other numbers of labels than of queries and keys.
    """
    maps = [each[row].detach().float().cpu() for each in _weights(weights, row)]
    if mean_of_heads:
        maps = [each.mean(dim=0, keepdim=True) for each in maps]
    most = max(len(each) for each in maps)
    # single maps fill rows, several heads have a row for each attention
    columns, rows = (most, len(maps)) if most > 1 else (min(len(maps), 4), -(-len(maps) // 4))
    width, height = (max(1.9, 0.1 * size) for size in (maps[0].shape[-1], maps[0].shape[-2]))
    with _styled() as figure_of:
        figure = figure_of(width * columns + 0.4, (height + 0.25) * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for layer, heads in enumerate(maps):
            for head, each in enumerate(heads):
                axes = grid[layer][head] if most > 1 else grid[layer // columns][layer % columns]
                axes.axis("on")
                axes.imshow(each.numpy(), interpolation="nearest", cmap="Blues", vmin=0, vmax=1)
                axes.set_title(f"attention {layer + 1}" + (f", head {head + 1}" if most > 1 else ""))
                for spine in axes.spines.values():
                    spine.set_visible(True)
                _label(axes, each.shape, queries, keys)
        grid[-1 if most > 1 else 0][0].set(xlabel="keys", ylabel="queries")
    return figure


def residual_norms(
    records: LayerIntermediates | Mapping[str, LayerIntermediates], *, mask: Tensor | None = None
) -> Figure:
    """Draw the root mean square of the residual stream by depth: the mean over tokens, and the range of 80 % of them.

    Args:
        records: of a pass with `return_intermediates` (of a stack: `return_hiddens`), or several by their labels.
        mask: `(b, n)` bool, tokens that count; default all.

    Raises:
        InputError: if the pass did not record the inputs of its sublayers.
    """
    labeled = {"": records} if isinstance(records, LayerIntermediates) else records
    if not labeled:
        raise InputError("`records` is empty; pass the record of a pass, or several by their labels.")
    with _styled() as figure_of:
        figure = figure_of(6.4, 3.0)
        axes = figure.subplots()
        for number, (label, record) in enumerate(labeled.items()):
            norms = _norms(record, mask)
            depths, color = range(len(norms)), COLORS[number % len(COLORS)]
            axes.plot(
                depths, [float(each.mean()) for each in norms], color=color, marker="o", markersize=3, label=label
            )
            low, high = ([float(each.quantile(part)) for each in norms] for part in (0.1, 0.9))
            axes.fill_between(depths, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="sublayers so far", ylabel="root mean square of the stream", yscale="log")
        axes.grid(alpha=0.3)
        if any(labeled):
            axes.legend()
    return figure


def learning_curve(
    curves: Sequence[float] | Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float]]],
    *,
    x: str = "step",
    y: str = "loss",
    title: str = "",
) -> Figure:
    """Draw losses over steps.

    Args:
        curves: losses of steps 1, 2, ...; or several curves by their labels, each losses or a pair of steps and losses.
        x, y: labels of the axes.
        title: of the picture.

    Raises:
        InputError: if there is nothing to draw, or numbers of steps and losses differ.
    """
    labeled: Mapping[str, Any] = curves if isinstance(curves, Mapping) else {"": curves}
    lines = {label: _line(label, each) for label, each in labeled.items()}
    if not any(len(values) for _, values in lines.values()):
        raise InputError("`curves` has no losses; pass those of the steps, or several curves by their labels.")
    with _styled() as figure_of:
        figure = figure_of(6.4, 3.0)
        axes = figure.subplots()
        for number, (label, (steps, values)) in enumerate(lines.items()):
            marker = "o" if len(values) <= 50 else ""
            color = COLORS[number % len(COLORS)]
            axes.plot(steps, values, color=color, label=label, linewidth=1.4, marker=marker, markersize=3)
        axes.set(xlabel=x, ylabel=y, title=title)
        axes.grid(alpha=0.3)
        if any(labeled):
            axes.legend()
    return figure


@contextmanager
def _styled() -> Iterator[Any]:
    """Yield a function of a width and a height in inches that returns a figure in the style of this library."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: `pip install 'x-transformers[plots]'`.") from None
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        yield lambda width, height: Figure(figsize=(width, height), layout="constrained")


def _weights(given: LayerIntermediates | Sequence[Tensor], row: int) -> list[Tensor]:
    """Return the weights of each attention that recorded any."""
    if isinstance(given, LayerIntermediates):
        every = [record.post_softmax_attn for record in given.attn_intermediates or ()]
    else:
        every = list(given)
    weights = [each for each in every if each is not None]
    if not weights:
        raise InputError(
            "the pass recorded no attention weights, as one with a cache or a fused kernel does; pass `return_attn = "
            "True`, or the record of a pass without a cache."
        )
    for each in weights:
        if each.ndim != 4 or not -len(each) <= row < len(each):
            raise InputError(f"attention weights of shape {tuple(each.shape)} have no row {row}, (b, h, i, j).")
    return weights


def _label(axes: Any, shape: Sequence[int], queries: Sequence[str] | None, keys: Sequence[str] | None) -> None:
    """Write labels at the axes of a map `(i, j)`."""
    keys = queries if keys is None and queries is not None and len(queries) == shape[1] else keys
    axes.set(xticks=[], yticks=[])
    for labels, count, write, what in (
        (queries, shape[0], axes.set_yticks, "queries"),
        (keys, shape[1], axes.set_xticks, "keys"),
    ):
        if labels is None:
            continue
        if len(labels) != count:
            raise InputError(f"there are {len(labels)} labels of {what}, and {count} {what}; give one for each.")
        write(range(count), list(labels), fontsize=max(3.0, min(8.0, 110 / count)))


def _norms(record: LayerIntermediates, mask: Tensor | None) -> list[Tensor]:
    """Return the root mean square of each token that counts, `(tokens,)`, at the entry of each sublayer and the end."""
    if not record.layer_hiddens:
        raise InputError(
            "the record has no inputs of sublayers; run the pass with `return_intermediates = True` (a stack with "
            "`return_hiddens = True`), and without a `capture` that leaves them out."
        )
    norms = [at_least_float32(each.detach()).square().mean(dim=-1).sqrt() for each in record.layer_hiddens]
    if mask is None:
        return [each.flatten().cpu() for each in norms]
    counted = mask.bool()
    if any(each.shape != counted.shape for each in norms):
        raise InputError(f"`mask` has shape {tuple(mask.shape)}; the pass has {tuple(norms[0].shape)} tokens.")
    return [each[counted].cpu() for each in norms]


def _line(label: str, given: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Return the steps and the values of a curve."""
    pair = isinstance(given, tuple) and len(given) == 2 and not isinstance(given[0], int | float)
    steps, values = given if pair else (range(1, len(given) + 1), given)
    if len(steps) != len(values):
        raise InputError(f"the curve `{label}` has {len(steps)} steps and {len(values)} values; give one for each.")
    return steps, values
