"""The documentation's pictures are those that `images/draw` draws, and show what the library computes; the examples'
pictures are shown next to them.
"""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURE = re.compile(r"^!\[[^\]]+\]\((?:\.\./)?images/(\w+)\.png\)$", re.M)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = sorted({name for path in PAGES for name in PICTURE.findall(path.read_text(encoding="utf-8"))})
OF_EXAMPLES = PICTURE.findall((ROOT / "examples" / "README.md").read_text(encoding="utf-8"))
MOST = 60_000  # bytes


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the folder, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    names = ("__main__", "biases", "masks", "repetition", "residuals", "rotary", "weightings")
    return {name: importlib.import_module(f"images.draw.{name}") for name in names}


def test_pictures_shown_drawn_and_stored_are_the_same(draw: dict[str, ModuleType]) -> None:
    stored = sorted(path.stem for path in (ROOT / "images").glob("*.png"))
    assert sorted(draw["__main__"].PICTURES) == SHOWN
    assert sorted([*SHOWN, *OF_EXAMPLES]) == stored


@pytest.mark.parametrize("name", SHOWN)
def test_a_picture_is_drawn(name: str, tmp_path: Path, draw: dict[str, ModuleType]) -> None:
    drawn = draw["__main__"].draw(name, tmp_path, quick=True)
    assert drawn == tmp_path / f"{name}.png"
    for path in (drawn, ROOT / "images" / f"{name}.png"):
        assert path.stat().st_size < MOST
        with Image.open(path) as picture:
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
            assert len(picture.getcolors() or ()) > 2
            size = picture.size
    with Image.open(drawn) as picture:
        assert picture.size == size


def test_drawing_is_reproducible(tmp_path: Path, draw: dict[str, ModuleType]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw["__main__"].draw("biases", tmp_path / folder, quick=True)
    assert (tmp_path / "a/biases.png").read_bytes() == (tmp_path / "b/biases.png").read_bytes()


def test_masks_are_those_of_the_options(draw: dict[str, ModuleType]) -> None:
    masks = draw["masks"]
    place = torch.arange(masks.TOKENS)
    distance = place[:, None] - place
    windowed = masks.seen(masks.model(masks.Decoder(**masks.SIZE, attn_max_attend_past=3)))
    assert torch.equal(windowed, ((distance >= 0) & (distance <= 3)).float())
    prefix = masks.seen(masks.model(masks.PrefixDecoder(**masks.SIZE)), prefix_attn_len=5)
    assert torch.equal(prefix, ((distance >= 0) | (place < 5)).float())
    shades = masks.memory_tokens()
    assert shades.shape == (18, 18)
    assert shades[-1].unique().tolist() == pytest.approx([0.45, 1.0])


def test_biases_are_logits_minus_scores(draw: dict[str, ModuleType]) -> None:
    biases = draw["biases"]
    stack = biases.Decoder(dim=32, depth=1, heads=biases.HEADS, alibi_pos_bias=True)
    place = torch.arange(biases.TOKENS)
    distance = (place[:, None] - place).float()
    drawn = biases.bias(stack, torch.randn(1, biases.TOKENS, 32))
    assert torch.equal(drawn.isnan(), distance < 0)
    past = distance >= 0
    torch.testing.assert_close(drawn[past], -distance[past] / 16, atol=1e-4, rtol=0)


def test_rotary_scores_are_those_of_the_stack(draw: dict[str, ModuleType]) -> None:
    rotary = draw["rotary"]
    plain = rotary.scores(rotary.embedding(rotary_pos_emb=True))
    frequencies = 10000 ** (-torch.arange(0, rotary.FEATURES, 2) / rotary.FEATURES)
    distance = torch.arange(rotary.POSITIONS)[:, None]
    torch.testing.assert_close(plain, (distance * frequencies).cos().mean(dim=-1), atol=1e-4, rtol=0)
    decayed = rotary.scores(rotary.embedding(rotary_xpos=True, rotary_xpos_scale_base=128))
    zeta = (torch.arange(0, rotary.FEATURES, 2) + 0.4 * rotary.FEATURES) / (1.4 * rotary.FEATURES)
    expected = ((distance * frequencies).cos() * zeta ** (distance / 128)).mean(dim=-1)
    torch.testing.assert_close(decayed, expected, atol=1e-4, rtol=0)


def test_weightings_share_their_parameters(draw: dict[str, ModuleType]) -> None:
    weightings = draw["weightings"]
    state = weightings.Attention(weightings.DIM, heads=4, dim_head=16, causal=True).state_dict()
    x = torch.randn(1, weightings.TOKENS, weightings.DIM)
    soft, hard = (weightings.weights(options, state, x) for options in ({}, {"hard": True}))
    assert torch.equal(soft.argmax(dim=-1), hard.argmax(dim=-1))


def test_placements_of_norms(draw: dict[str, ModuleType]) -> None:
    stream, gradients = draw["residuals"].measure({"pre_norm": False}, depth=2)
    torch.testing.assert_close(stream[1:], torch.ones(4), atol=1e-2, rtol=0)  # a norm stands behind each sublayer
    assert gradients.shape == (2,)
    assert gradients.gt(0).all()


def test_repetition_is_learned(draw: dict[str, ModuleType]) -> None:
    repetition = draw["repetition"]
    tokens, periods = repetition.repeated(5, torch.Generator().manual_seed(0))
    for row, period in zip(tokens, periods.tolist(), strict=True):
        assert torch.equal(row[:-period], row[period:])
        assert len(row.unique()) == period
    _, losses = repetition.train({"rotary_pos_emb": True, "rotary_emb_dim": 16, "shift_tokens": 1}, 12)
    assert len(losses) == 12
    assert losses[-1] < losses[0]
