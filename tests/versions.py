"""Test other PyTorch versions, each in an environment of its own.

    python tests/versions.py            # the newest patch of every minor version from 2.6 on
    python tests/versions.py 2.6.0      # some of them
    python tests/versions.py --groups export goldens    # some of the tests; the others keep their results
    python tests/versions.py --keep     # leave the environments in `.versions/`
    python tests/versions.py --write    # put the table into docs/first-steps.md

Each environment takes about 5 GB of disk and two minutes of installation; only one exists at a time.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"
PAGE = ROOT / "docs" / "first-steps.md"
RESULTS = FOLDER / "results.json"
OLDEST = Version("2.6")
GROUPS = {
    "goldens": ("tests/test_goldens.py",),
    "recipes": ("tests/test_recipes.py",),
    "full graphs": ("tests/properties/test_compile.py", "tests/properties/test_compiled_lengths.py"),
    "compiled blocks": ("tests/properties/test_compile_blocks.py",),
    "recompilations": ("tests/properties/test_recompilations.py",),
    "export": ("tests/properties/test_exported_programs.py",),
    "decoding": ("tests/test_decoding.py", "tests/test_static_cache.py", "tests/properties/test_cached_decoding.py"),
    "FlexAttention": ("tests/properties/test_flex.py",),
    "checkpointing": ("tests/properties/test_recompute.py",),
    "distributed": ("tests/test_training.py",),
}
"""Columns of the table, and the tests of each."""
PACKAGES = ("allpairspy", "hypothesis", "numpy", "pytest", "pytest-xdist", "tqdm")
"""Packages that these tests need besides the library."""
BEGIN, END = "<!-- table: versions -->", "<!-- end of table: versions -->"


def main() -> int:
    """Run the tests of some versions, print their table, and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="versions of PyTorch; default: every minor version's newest patch")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="columns; default: all")
    parser.add_argument("--keep", action="store_true", help="leave the environments in `.versions/`")
    parser.add_argument("--write", action="store_true", help="put the table into docs/first-steps.md")
    parser.add_argument("--workers", default="2", help="processes of each test run (default: %(default)s)")
    given = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for version in given.versions or newest_patches():
        environment = FOLDER / version
        try:
            python = install(version, environment)
        except subprocess.CalledProcessError:
            print(f"PyTorch {version} does not install here", flush=True)
            shutil.rmtree(environment)
            continue
        for name in given.groups:
            result = run(python, GROUPS[name], given.workers)
            results = recorded()  # what others wrote meanwhile included
            results.setdefault(version, {})[name] = result
            RESULTS.write_text(json.dumps(results, indent=2))
        if not given.keep:
            shutil.rmtree(environment)
    results = recorded()
    text = table(results)
    print(text)
    if given.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    return int(any(cell["failed"] for row in results.values() for cell in row.values()))


def recorded() -> dict[str, dict[str, dict[str, int]]]:
    """Return the results so far, by version and group."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def newest_patches() -> list[str]:
    """Return the newest patch of each minor version that the package index has, the oldest first."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(FOLDER), "torch==0"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    found = re.search(r"from versions: ([^)]*)\)", listed)
    if found is None:
        raise SystemExit(f"the package index lists no versions of torch:\n{listed}")
    newest: dict[tuple[int, ...], Version] = {}
    for version in sorted(map(Version, found[1].split(", "))):
        if version >= OLDEST and not version.is_prerelease:
            newest[version.release[:2]] = version
    return [str(version) for version in newest.values()]


def install(version: str, environment: Path) -> Path:
    """Make an environment with this library and one version of PyTorch; return its Python."""
    python = environment / "bin" / "python"
    if python.exists():
        return python
    print(f"installing PyTorch {version}", flush=True)
    # what PyTorch pins itself must not be constrained to what another version of it pins
    free = re.compile(r"(torch|triton|nvidia.*|sympy|mpmath|networkx|filelock|fsspec|setuptools|numpy)==")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = environment.with_suffix(".txt")
    constraints.write_text("\n".join(line for line in lines if not free.match(line)))
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    command = [python, "-m", "pip", "install", "-q", "-c", constraints, f"torch=={version}", "-e", ROOT, *PACKAGES]
    subprocess.run(command, check=True)
    constraints.unlink()
    return python


def run(python: Path, files: tuple[str, ...], workers: str) -> dict[str, int]:
    """Run some tests; return how many passed, failed (errors included) and were skipped, and the seconds."""
    started = time.monotonic()
    command = [python, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", "-W", "default", *files]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if done.returncode != 0 and failed == 0:
        raise SystemExit(done.stdout)
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"    {line}", flush=True)
    result = {"passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0)}
    print(f"{' '.join(files)}: {result}", flush=True)
    return {**result, "seconds": round(time.monotonic() - started)}


def table(results: dict[str, dict[str, dict[str, int]]]) -> str:
    """Return the results as Markdown: tests that passed of those that ran; a dash where none ran."""
    rows = [f"| PyTorch | {' | '.join(GROUPS)} |", f"| --- |{' --- |' * len(GROUPS)}"]
    for version in sorted(results, key=Version):
        cells = [results[version].get(name) for name in GROUPS]
        shown = ["–" if cell is None else f"{cell['passed']} of {cell['passed'] + cell['failed']}" for cell in cells]
        rows.append(f"| {version} | {' | '.join(shown)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
