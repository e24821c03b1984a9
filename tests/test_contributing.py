"""The worked examples and the table of floors in CONTRIBUTING.md are those of the code."""

import re
from pathlib import Path

import pytest
from test_floors import HOUSE

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "path", "count"),
    [
        ("worked example", "attention/scores/alibi.py", 3),
        ("worked example: biases", "attention/projections.py", 3),
        ("worked example: kind", "layers/kinds.py", 2),
    ],
)
def test_worked_examples_are_the_code(name: str, path: str, count: int) -> None:
    example = TEXT.split(f"<!-- {name} -->")[1].split(f"<!-- end of the {name} -->")[0]
    source = (ROOT / "x_transformers" / path).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```", example, re.DOTALL)
    assert len(blocks) == count
    for block in blocks:
        for piece in re.split(r"\n\n\n|\n\n(?=    def )", block):
            assert piece in source, f"CONTRIBUTING.md shows code that is no longer there:\n{piece}"


def test_table_of_floors_is_that_of_the_test() -> None:
    table = TEXT.split("<!-- floors -->")[1].split("<!-- end of the floors -->")[0]
    rows = [line.split(" | ") for line in table.strip().splitlines()[2:]]
    floors = tuple((floor.lstrip("| "), re.findall(r"`([^`]+)`", rooms)) for floor, rooms, _ in rows)
    assert floors == tuple((floor, [name or '""' for name in names]) for floor, names in HOUSE)


def test_links_have_targets() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", TEXT):
        assert (ROOT / target).exists(), target
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
