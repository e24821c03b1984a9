"""The README does what it says: each Python block runs, in order, with one namespace for each `##` section.

`<!-- no-run: reason -->` on the line before a block keeps it from being run; it is still compiled.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?:<!-- no-run: (?P<reason>.+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    line: int
    code: str
    run: bool


def sections() -> dict[str, list[Block]]:
    """The Python blocks under each heading that has some."""
    found: dict[str, list[Block]] = {}
    for match in BLOCK.finditer(README):
        above = README[: match.start("code")]
        heading = re.findall(r"^## (.+)$", above, re.M)[-1]
        block = Block(above.count("\n"), match["code"], run=match["reason"] is None)
        found.setdefault(heading, []).append(block)
    return found


SECTIONS = sections()


def test_every_block_is_found() -> None:
    assert sum(map(len, SECTIONS.values())) == README.count("```python") > 0


@pytest.mark.parametrize("heading", SECTIONS)
def test_blocks_run(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in SECTIONS[heading]:
        # Blank lines in front, so that a traceback names the README's own line.
        code = compile("\n" * block.line + block.code, str(ROOT / "README.md"), "exec")
        if block.run:
            exec(code, namespace)


@pytest.mark.parametrize("name", ["train", "test"])
def test_command_is_one_line(name: str) -> None:
    commands = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.*?)^```$", README, re.M | re.S)
    assert len(commands) == 1
    assert commands[0].count("\n") == 1
    assert "-c constraints.txt" in commands[0]


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
