"""The worked example of CONTRIBUTING.md is the code itself."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_worked_example_is_the_code() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = text.split("<!-- worked example -->")[1].split("<!-- end of the worked example -->")[0]
    source = (ROOT / "x_transformers/attention/scores/alibi.py").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```", example, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        for piece in re.split(r"\n\n\n|\n\n(?=    def )", block):
            assert piece in source, f"CONTRIBUTING.md shows code that is no longer there:\n{piece}"
