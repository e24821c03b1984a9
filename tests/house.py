"""Measure how much of the library a forward pass goes through, and how long its classes and parameter lists are.

    python tests/house.py [--trace]

Calls are counted with `sys.setprofile`, inside the package only, for a decoder of one block that has run before.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import checkout  # noqa: F401
import torch

import x_transformers
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

PACKAGE = Path(x_transformers.__file__).resolve().parent


@dataclass(frozen=True)
class Trace:
    """Python calls of one run: for each, the file, the function and the depth of the call stack."""

    calls: list[tuple[str, str, int]]

    @property
    def files(self) -> int:
        """Number of files entered."""
        return len({file for file, _, _ in self.calls})

    @property
    def changes(self) -> int:
        """Number of times that the next call is in another file."""
        files = [file for file, _, _ in self.calls]
        return sum(a != b for a, b in itertools.pairwise(files))

    @property
    def depth(self) -> int:
        """Greatest number of frames of the package on the call stack."""
        return max(depth for _, _, depth in self.calls)


def trace(run: Callable[[], Any]) -> Trace:
    """Record every call of a Python function of the package while `run` runs."""
    calls: list[tuple[str, str, int]] = []
    prefix = str(PACKAGE)
    depth = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        # not by the file's name: `__init__` of a dataclass has none
        if not str(frame.f_globals.get("__name__")).startswith("x_transformers"):
            return
        if event == "call":
            depth += 1
            file = frame.f_globals["__file__"][len(prefix) + 1 :]
            calls.append((file, frame.f_code.co_qualname, depth))
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return Trace(calls)


def small_model() -> TransformerWrapper:
    """A decoder of one block, in evaluation."""
    torch.manual_seed(0)
    stack = Decoder(dim=32, depth=1, heads=2, verbose=False)
    return TransformerWrapper(num_tokens=50, max_seq_len=256, attn_layers=stack).eval()


@torch.no_grad()
def trace_forward() -> Trace:
    """One forward pass from token ids to logits."""
    model, ids = small_model(), torch.randint(0, 50, (1, 8))
    model(ids)
    return trace(lambda: model(ids))


def calls_of_a_token() -> float:
    """Python calls that generate one more token, with a static cache and without compilation."""
    model, prompt = AutoregressiveWrapper(small_model()), torch.randint(0, 50, (1, 8))

    def calls(tokens: int) -> int:
        def run() -> Any:
            return model.generate(prompt, tokens, cache="static")

        run()
        return len(trace(run).calls)

    return (calls(40) - calls(20)) / 20


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package, by its path."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def classes() -> list[tuple[int, str]]:
    """Lines of every class, longest first."""
    found = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.append(((node.end_lineno or 0) - node.lineno + 1, f"{path}: {node.name}"))
    return sorted(found, reverse=True)


def parameter_lists() -> list[tuple[int, str]]:
    """Number of parameters of every function, longest first."""
    found = []
    for path, tree in modules():
        for owner in ast.walk(tree):
            for node in ast.iter_child_nodes(owner):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    a = node.args
                    count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
                    name = f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name
                    found.append((count, f"{path}: {name}"))
    return sorted(found, reverse=True)


def main() -> None:
    """Print the table."""
    forward = trace_forward()
    print(f"Python calls, token ids to logits      {len(forward.calls)}")
    print(f"files entered / changes of file        {forward.files} / {forward.changes}")
    print(f"depth of the call stack                {forward.depth}")
    print(f"calls for one generated token          {calls_of_a_token():.0f}")
    print(f"modules in the package root            {len(list(PACKAGE.glob('*.py')))}")
    for title, found in (("longest classes", classes()), ("longest parameter lists", parameter_lists())):
        print(f"{title}:")
        for count, name in found[:12]:
            print(f"  {count:>4}  {name}")
    if "--trace" in sys.argv[1:]:
        for file, name, depth in forward.calls:
            print(f"{'  ' * depth}{name}  ({file})")


if __name__ == "__main__":
    main()
