"""Every file of `shared/golden-experts` is read by a test, or has no keyword, for a reason."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_experts import BLOCKS, ELSEWHERE

ROOT = Path(__file__).resolve().parents[1]

ANYTHING = ".+"

OWN = """
    emergent-moe-gate emergent-moe-inter-abs emergent-moe-order mixtral-model sigma-moe switch-router
"""
READ = {
    **dict.fromkeys([*BLOCKS, *OWN.split()], "tests/test_experts.py"),
    **ELSEWHERE,
    "clipped-softmax": "tests/test_scores_and_weights.py",
}
"""Files, and the test that reads each."""

WITHOUT_KEYWORD = {
    "eventful-full": "a state machine over frames of the same tokens, which is no option of a stack",
    "eventful-tokenwise": "a state machine over frames of the same tokens, which is no option of a stack",
    "gated-attention-mlp": "the gate reads the slice of a head; `attn_gate_value_heads` reads the whole input",
    "gated-attention-per-token": "the gate reads the slice of a head; `attn_gate_value_heads` reads the whole input",
    "llama4-block": "the score multiplies the input of an expert; here it multiplies the output",
    "memory-layer": "tables that are read by the signs of features are no feedforward of this library",
    "soft-moe-dynamic": "slots made of tokens, whose number depends on the length of a row",
}
"""Files that no keyword computes, and why."""


def strings(source: str) -> Iterator[str]:
    """Yield a pattern for each string of a module: the string itself, with anything for the values of an f-string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ANYTHING for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.escape(node.value)


def test_every_file_is_listed(shared: Path) -> None:
    files = {path.stem for path in (shared / "golden-experts").glob("*.safetensors")}
    assert files == set(READ) | set(WITHOUT_KEYWORD)
    assert not set(READ) & set(WITHOUT_KEYWORD)


@pytest.mark.parametrize("test", sorted(set(READ.values())))
def test_the_test_reads_them(test: str) -> None:
    names = [name for name, file in READ.items() if file == test]
    source = (ROOT / test).read_text(encoding="utf-8")
    patterns = {each.rpartition("/")[2].removesuffix(r"\.safetensors") for each in strings(source)}
    known = [re.compile(each) for each in patterns if not each.startswith(ANYTHING)]
    assert [name for name in names if not any(each.fullmatch(name) for each in known)] == []


def test_copies_are_those_of_the_folder(shared: Path) -> None:
    """Tests that run without the folder have copies of its files, all of which are read."""
    copies = sorted((ROOT / "tests" / "golden" / "experts").glob("*.safetensors"))
    assert copies
    for path in copies:
        assert path.stem in READ
        assert path.read_bytes() == (shared / "golden-experts" / path.name).read_bytes(), path.name
