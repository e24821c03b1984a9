"""The picture of a run."""

from pathlib import Path

from x_transformers.training.curve import draw_curve


def test_a_picture_has_both_curves_and_the_title(tmp_path: Path) -> None:
    training = [{"step": step, "bits_per_byte": 8.0 / step} for step in range(1, 30)]
    draw_curve([*training, {"step": 10, "held_out_bits_per_byte": 2.0}], "text, 3 parameters", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    draw_curve([], "nothing yet", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
