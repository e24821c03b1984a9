"""Every file of `shared/golden-experts` is read by a test, or has no keyword, for a reason."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

READ = {
    "test_experts.py": (
        "deepseekv3-block",
        "emergent-moe-gate",
        "emergent-moe-inter-abs",
        "emergent-moe-order",
        "gptoss-block",
        "granitemoeshared-block",
        "mixtral-block",
        "mixtral-model",
        "olmoe-block",
        "qwen2moe-block",
        "qwen3moe-block",
        "sigma-moe",
        "switch-router",
    ),
    "test_exits.py": ("early-exit-llama", "layerskip-schedules"),
    "test_scores_and_weights.py": ("clipped-softmax", "gated-attention-clipped"),
}
"""Files by the test that reads them."""

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

PENDING = (
    "colt5-attention-heavy",
    "colt5-feedforward",
    "colt5-feedforward-soft",
    "colt5-router",
    "crms-norm",
    "deepseekv3-model",
    "gated-attention-all-features",
    "gin-attention-none",
    "gin-attention-relu",
    "gin-attention-sharp-softplus",
    "gin-attention-sigmoid-elementwise",
    "gin-attention-silu",
    "pattention-gelu-l2-norm",
    "pattention-grown",
    "pattention-l2-norm-gelu",
    "pattention-softmax",
    "pre-rmsnorm-models",
    "rational-gelu",
    "rational-swish",
    "soft-moe",
    "switchhead",
    "switchhead-all",
    "switchhead-shared-selection",
)
"""Files whose keywords are on their way."""

NAMES = [name for names in READ.values() for name in names]


def strings(source: str) -> Iterator[str]:
    """Yield a pattern for each string of a module: the string itself, with anything for the values of an f-string."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.escape(node.value)


def test_every_file_is_listed_once(shared: Path) -> None:
    listed = [*NAMES, *WITHOUT_KEYWORD, *PENDING]
    assert sorted(listed) == sorted(path.stem for path in (shared / "golden-experts").glob("*.safetensors"))


@pytest.mark.parametrize("test", READ)
def test_the_test_reads_them(test: str) -> None:
    known = [re.compile(rf"({each})(\.safetensors)?") for each in strings((TESTS / test).read_text(encoding="utf-8"))]
    assert [name for name in READ[test] if not any(each.fullmatch(name) for each in known)] == []


def test_copies_are_those_of_the_folder(shared: Path) -> None:
    """Tests that run without the folder have copies of its files, all of which are read."""
    copies = sorted((TESTS / "golden" / "experts").glob("*.safetensors"))
    assert copies
    for path in copies:
        assert path.stem in [*NAMES, *PENDING]
        assert path.read_bytes() == (shared / "golden-experts" / path.name).read_bytes(), path.name
