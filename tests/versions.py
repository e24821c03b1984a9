"""Test other PyTorch versions, each in an environment of its own.

    python tests/versions.py            # the newest patch of every minor version from 2.6 on
    python tests/versions.py 2.6.0      # some of them
    python tests/versions.py --groups export goldens    # some of the columns; the others keep their results
    python tests/versions.py --all      # every test of the files of a column, not only those chosen here
    python tests/versions.py --write    # put each row into docs/first-steps.md as soon as it is there
    python tests/versions.py --keep --folder DIR        # leave the environments in a folder of your choice

An environment takes about 6 GB of disk; only one exists at a time. Installation and tests of a version take about ten
minutes on two cores.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first-steps.md"
OLDEST = Version("2.6")
GRAPHS, LENGTHS, BLOCKS = (
    f"tests/properties/test_{name}.py" for name in ("compile", "compiled_lengths", "compile_blocks")
)
COUNTED, EXPORTED, CACHED, RECOMPUTED = (
    f"tests/properties/test_{name}.py"
    for name in ("recompilations", "exported_programs", "cached_decoding", "recompute")
)
GENERATED, REFUSED = "tests/test_autoregressive.py", "tests/test_versions.py"
GROUPS: dict[str, tuple[str, ...]] = {
    "goldens": ("tests/test_goldens.py",),
    "recipes": ("tests/test_recipes.py",),
    "full graphs": (
        *(f"{GRAPHS}::test_every_feature_of_a_decoder[{part}]" for part in range(4)),
        f"{GRAPHS}::test_every_feature_of_an_encoder[0]",
        f"{GRAPHS}::test_every_feature_trains_towards_a_context[0]",
        f"{GRAPHS}::test_a_training_step_is_one_graph",
        f"{GRAPHS}::test_inductor_trains",
        f"{LENGTHS}::test_two_graphs_for_all_lengths[context]",
        f"{LENGTHS}::test_chunks_of_a_loss[options0]",
        f"{LENGTHS}::test_segments[True]",
    ),
    "compiled blocks": (BLOCKS,),
    "recompilations": (
        f"{COUNTED}::test_a_whole_model",
        f"{COUNTED}::test_compiled_blocks[rotary]",
        f"{COUNTED}::test_decoding",
    ),
    "export": (
        *(f"{EXPORTED}::test_any_batch_and_length[{stack}-0]" for stack in ("decoder", "encoder", "cross")),
        f"{EXPORTED}::test_every_model_and_part",
        f"{EXPORTED}::test_tracing",
    ),
    "decoding": (
        "tests/test_decoding.py",
        "tests/test_static_cache.py",
        f"{CACHED}::test_chunks_of_every_size",
        f"{CACHED}::test_the_cache_that_went_in_is_unchanged",
    ),
    "compiled decoding": (
        f"{GENERATED}::test_steps_compile_once[absolute-kwargs0]",
        f"{GENERATED}::test_steps_compile_once[memory tokens, rotary-kwargs2]",
        f"{GENERATED}::test_prompts_compile_once",
        f"{GENERATED}::test_compiled_steps_belong_to_a_model",
        f"{GENERATED}::test_the_record_of_compiled_steps_goes_on",
    ),
    "FlexAttention": ("tests/properties/test_flex.py", f"{REFUSED}::test_flex"),
    "checkpointing": (
        f"{RECOMPUTED}::test_what_layers_leave_for_each_other",
        f"{RECOMPUTED}::test_caches_and_memories",
        f"{RECOMPUTED}::test_z_loss_reaches_through",
        f"{RECOMPUTED}::test_every_second_block_runs_twice",
        f"{RECOMPUTED}::test_less_is_kept",
        f"{RECOMPUTED}::test_a_compiled_step_is_one_graph",
        f"{REFUSED}::test_checkpoints_in_graphs",
    ),
    "distributed": ("tests/test_training.py", f"{REFUSED}::test_sharding_on_a_cpu"),
}
"""Columns of the table, and the tests of each: those that say most about a version in the time that they take.

Chosen are tests of what differs between versions (what the compiler reads, how it guards, what `torch.export`, hooks of
autograd and process groups do), with few models that have all features between them. Left out are those that run the
same mechanism once more for each feature.
"""
PACKAGES = ("allpairspy", "hypothesis", "numpy", "pytest", "pytest-xdist", "tqdm")
"""Packages that these tests need besides the library."""
BEGIN, END = "<!-- table: versions -->", "<!-- end of table: versions -->"

Cell = dict[str, int]
"""How many tests passed, failed (errors included) and were skipped."""


def main() -> int:
    """Run the tests of some versions, print their table, and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="versions of PyTorch; default: every minor version's newest patch")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="columns; default: all")
    parser.add_argument("--all", action="store_true", help="run every test of their files")
    parser.add_argument("--keep", action="store_true", help="leave the environments in the folder")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="where they are (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/first-steps.md")
    parser.add_argument("--workers", default="2", help="processes of each test run (default: %(default)s)")
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True, parents=True)
    failed, ran = False, dict[str, dict[str, str]]()
    for version in given.versions or newest_patches(given.folder):
        environment = given.folder / version
        started = time.monotonic()
        try:
            python = install(version, environment)
        except subprocess.CalledProcessError:
            print(f"PyTorch {version} does not install here", flush=True)
            shutil.rmtree(environment)
            continue
        installed = time.monotonic()
        cells = run(python, given.groups, given.workers, every=given.all)
        print(
            f"PyTorch {version}: {installed - started:.0f} s to install, {time.monotonic() - installed:.0f} s of tests"
        )
        failed |= any(cell["failed"] for cell in cells.values())
        ran[version] = {name: shown(cell) for name, cell in cells.items()}
        if given.write:
            PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), {version: ran[version]}), encoding="utf-8")
        if not given.keep:
            shutil.rmtree(environment)
    print(table(ran))
    return int(failed)


# environments


def newest_patches(folder: Path) -> list[str]:
    """Return the newest patch of each minor version that the package index has, the oldest first."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "torch==0"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    found = re.search(r"from versions: ([^)]*)\)", listed)
    if found is None:
        raise SystemExit(f"the package index lists no versions of torch:\n{listed}")
    newest: dict[tuple[int, ...], str] = {}
    for version in sorted(map(Version, found[1].split(", "))):
        if version >= OLDEST and not version.is_prerelease:
            newest[version.release[:2]] = version.base_version
    return list(newest.values())


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
    # most modules of what comes with PyTorch are never imported
    command = [python, "-m", "pip", "install", "-q", "-q", "--no-compile", "--no-cache-dir", "-c", constraints]
    subprocess.run([*command, f"torch=={version}", "-e", ROOT, *PACKAGES], check=True)
    constraints.unlink()
    return python


# tests


def run(python: Path, names: Sequence[str], workers: str, *, every: bool) -> dict[str, Cell]:
    """Run the tests of some groups at once; return the results of each group."""
    chosen = [test for name in names for test in GROUPS[name]]
    if every:
        chosen = list(dict.fromkeys(test.split("::")[0] for test in chosen))
    report = python.parents[1] / "report.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal", "-p", "no:cacheprovider"]
    command += ["-W", "default", "-o", "junit_family=xunit1", f"--junit-xml={report}", *chosen]
    # kernels that another version wrote are not reused
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(python.parents[1] / "kernels"), "OMP_NUM_THREADS": "1"}
    log = report.with_suffix(".txt")
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode not in (0, 1) or not report.exists():
        raise SystemExit(log.read_text())
    cells: dict[str, Cell] = {name: {"passed": 0, "failed": 0, "skipped": 0} for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for case in ElementTree.parse(report).iter("testcase"):
        group = group_of(case.get("file", ""), case.get("name", ""), names)
        result = outcome(case)
        cells[group][result] += 1
        seconds[group] += float(case.get("time", 0))
        if result == "failed":
            print(f"    {case.get('file')}::{case.get('name')}", flush=True)
    for name in names:
        print(f"{name}: {cells[name]}, {seconds[name]:.0f} s", flush=True)
    return cells


def group_of(file: str, test: str, names: Sequence[str]) -> str:
    """Return the first of some groups that has a test, or, of a run of whole files, that has others of its file."""
    function = f"{file}::{test.split('[')[0]}"
    for name in names:
        if any(each == file or each.split("[")[0] == function for each in GROUPS[name]):
            return name
    return next((name for name in names if any(each.split("::")[0] == file for each in GROUPS[name])), names[0])


def outcome(case: ElementTree.Element) -> str:
    """Return what happened to a test: "passed", "failed" or "skipped"."""
    found = {child.tag for child in case}
    return "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"


def unknown_tests() -> Iterator[str]:
    """Yield the tests of groups that no file has."""
    for test in [test for tests in GROUPS.values() for test in tests]:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if name and name.split("[")[0] not in functions:
            yield test


# the table


def shown(cell: Cell) -> str:
    """Return the tests that passed of those that ran."""
    return f"{cell['passed']} of {cell['passed'] + cell['failed']}"


def table(rows: dict[str, dict[str, str]]) -> str:
    """Return the results as Markdown, by version and group; a dash where none ran."""
    lines = [f"| PyTorch | {' | '.join(GROUPS)} |", f"| --- |{' --- |' * len(GROUPS)}"]
    for version in sorted(rows, key=Version):
        lines.append(f"| {version} | {' | '.join(rows[version].get(name, '–') for name in GROUPS)} |")
    return "\n".join(lines)


def written_rows(page: str) -> dict[str, dict[str, str]]:
    """Return the results that a page has, by version and group; those of columns that there are no more are dropped."""
    lines = page.split(BEGIN)[1].split(END)[0].strip().splitlines()
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {cells[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in body}
    return {version: {name: row[name] for name in GROUPS if name in row} for version, row in rows.items()}


def with_rows(page: str, rows: dict[str, dict[str, str]]) -> str:
    """Return a page with more results; its other rows and columns stay."""
    for version, row in written_rows(page).items():
        rows = {**rows, version: {**row, **rows.get(version, {})}}
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    raise SystemExit(main())
