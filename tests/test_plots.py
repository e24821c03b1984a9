"""Pictures of attention, of norms by depth and of learning curves show what was recorded."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import decoder, features, ids, net
from matplotlib.figure import Figure
from PIL import Image

from x_transformers import plots
from x_transformers.errors import InputError


def record(**options: Any) -> Any:
    _, made = net(lambda: decoder(**options)).eval()(ids(), return_intermediates=True)
    return made


def drawn(figure: Figure) -> Image.Image:
    """The picture as it is saved, at twice the usual resolution."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=plots.DPI)
    picture = Image.open(file).convert("RGB")
    width, height = figure.get_size_inches()
    assert picture.size == (round(width * plots.DPI), round(height * plots.DPI))
    assert len(picture.getcolors(100_000) or ()) > 2
    return picture


def test_attention_maps() -> None:
    made = record()
    weights = made.attn_intermediates[0].post_softmax_attn
    figure = plots.attention(made, row=1, queries=list("abcdef"))
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["attention 1, head 1", "attention 1, head 2"]
    for head, axes in enumerate(panels):
        np.testing.assert_allclose(axes.images[0].get_array(), weights[1, head].detach().numpy())
        assert [label.get_text() for label in axes.get_xticklabels()] == list("abcdef")
    drawn(figure)
    (mean,) = plots.attention([weights], mean_of_heads=True).axes
    assert mean.get_title() == "attention 1"
    assert len([axes for axes in plots.attention([weights] * 5, mean_of_heads=True).axes if axes.images]) == 5
    np.testing.assert_allclose(mean.images[0].get_array(), weights[0].mean(dim=0).detach().numpy())


def test_attentions_of_other_sizes() -> None:
    maps = [torch.rand(1, 3, 4, 5), torch.rand(1, 2, 4, 6)]
    figure = plots.attention(maps, queries=list("abcd"))
    assert len([axes for axes in figure.axes if axes.images]) == 5
    assert not figure.axes[0].get_xticklabels()
    drawn(figure)


def test_norms_by_depth() -> None:
    made = record()
    (axes,) = plots.residual_norms(made).axes
    expected = [float(each.detach().square().mean(dim=-1).sqrt().mean()) for each in made.layer_hiddens]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), expected, rtol=1e-5)
    assert len(expected) == 3
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    figure = plots.residual_norms({"one": made, "two": record(sandwich_norm=True)}, mask=mask)
    line = figure.axes[0].lines[0].get_ydata()
    wanted = [float(each[mask].detach().square().mean(dim=-1).sqrt().mean()) for each in made.layer_hiddens]
    np.testing.assert_allclose(line, wanted, rtol=1e-5)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]
    drawn(figure)


def test_learning_curves() -> None:
    (axes,) = plots.learning_curve([3.0, 2.0, 1.5], title="a run").axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 3.0], [2, 2.0], [3, 1.5]])
    assert axes.get_title() == "a run"
    figure = plots.learning_curve({"training": [3.0, 2.0], "held out": ([10, 20], [2.5, 2.25])}, y="bits per byte")
    np.testing.assert_allclose(figure.axes[0].lines[1].get_xydata(), [[10, 2.5], [20, 2.25]])
    assert figure.axes[0].get_ylabel() == "bits per byte"
    drawn(figure)


BAD: dict[str, tuple[Any, str]] = {
    "no weights": (lambda: plots.attention([]), "recorded no attention weights"),
    "row": (lambda: plots.attention([torch.rand(1, 2, 3, 3)], row=1), "have no row 1"),
    "rank": (lambda: plots.attention([torch.rand(2, 3, 3)]), "have no row 0, (b, h, i, j)"),
    "labels": (lambda: plots.attention([torch.rand(1, 2, 3, 3)], queries=["a"]), "1 labels of queries, and 3 queries"),
    "keys": (lambda: plots.attention([torch.rand(1, 2, 3, 3)], keys=["a"]), "1 labels of keys, and 3 keys"),
    "no records": (lambda: plots.residual_norms({}), "`records` is empty"),
    "no hiddens": (
        lambda: plots.residual_norms(plots.LayerIntermediates()),
        "the record has no inputs of sublayers; run the pass with `return_intermediates = True`",
    ),
    "mask": (lambda: plots.residual_norms(record(), mask=torch.ones(2, 5)), "`mask` has shape (2, 5); the pass has"),
    "no losses": (lambda: plots.learning_curve([]), "`curves` has no losses"),
    "steps": (lambda: plots.learning_curve({"a": ([1], [1.0, 2.0])}), "the curve `a` has 1 steps and 2 values"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_drawn(case: str) -> None:
    draw, words = BAD[case]
    with pytest.raises(InputError, match=re.escape(words)):
        draw()


def test_a_cached_pass_has_no_weights() -> None:
    model = net().eval()
    _, first = model(ids()[:, :4], return_intermediates=True)
    _, second = model(
        ids()[:, 4:], cache=first, input_not_include_cache=True, return_intermediates=True, return_embeddings=True
    )
    with pytest.raises(InputError, match="recorded no attention weights"):
        plots.attention(second)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"`pip install 'x-transformers\[plots\]'`"):
        plots.learning_curve([1.0])


def test_several_streams_and_low_precision() -> None:
    made = decoder(num_residual_streams=2).bfloat16()(features(2, 6, 16).bfloat16(), return_hiddens=True)[1]
    drawn(plots.residual_norms(made))
    drawn(plots.attention(made))
