"""Run packages of other people on this library: a forward pass, a training step and sampling of each.

    python -m tests.downstream [NAME ...]

installs this checkout with its extra `downstream` into a virtual environment, and the packages into it without their
dependencies, so that no other distribution of `x_transformers` comes with them. Each package runs in a process of its
own, on a small model (`cases.py`). The result is a table; `--write` also writes it into the documentation.

It needs a package index and takes a few minutes, and is not part of the tests. `--environment FOLDER` keeps the
environment, and uses it as it is the next time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from .packages import ALSO_WITHOUT_DEPENDENCIES, PACKAGES, STAGES, VENDORED

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
BEGIN, END = "<!-- downstream: made by `python -m tests.downstream --write` -->", "<!-- end of downstream -->"
SECONDS = 600

PROVIDERS = """
import importlib.metadata, json
print(json.dumps([d.metadata["Name"] + " " + (d.read_text("direct_url.json") or "from an index")
    for d in importlib.metadata.distributions()
    if d.metadata["Name"].lower().replace("_", "-") == "x-transformers"
    or any(f.parts[0] == "x_transformers" for f in d.files or ())]))
"""


def make_environment(folder: Path) -> Path:
    """Return the interpreter of an environment with this checkout and the packages; make it if it does not exist.

    Raises:
        SystemExit: if anything but this checkout provides `x_transformers`.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-c", str(HERE / "constraints.txt"), "-e", f"{CHECKOUT}[downstream]"], check=True)
        pinned = [f"{distribution}=={version}" for distribution, version in PACKAGES.values()]
        subprocess.run([*pip, "--no-deps", *pinned, *ALSO_WITHOUT_DEPENDENCIES], check=True)
    for path in VENDORED:
        for copy in folder.rglob(path):
            copy.unlink()
            for compiled in copy.parent.glob(f"__pycache__/{copy.stem}.*"):
                compiled.unlink()
    refuse_other_providers(python)
    return python


def refuse_other_providers(python: Path) -> None:
    """Exit unless the one distribution that provides `x_transformers` is installed from this checkout."""
    found = subprocess.run([python, "-c", PROVIDERS], check=True, capture_output=True, text=True, cwd="/")
    providers = json.loads(found.stdout)
    if len(providers) != 1 or CHECKOUT.as_uri() not in providers[0]:
        sys.exit(f"`x_transformers` must come from {CHECKOUT}, and comes from: {providers}; delete the environment.")


def run_case(python: Path, name: str) -> dict[str, str]:
    """Run one package in a process of its own; return the result of each stage."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    variables.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(HERE / "cases.py"), name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, cwd=folder, env=variables, check=False
            )
        except subprocess.TimeoutExpired:
            return dict.fromkeys(STAGES, f"no result after {SECONDS} seconds")
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return dict.fromkeys(STAGES, f"the process ended with {done.returncode}: {last}")


def table(results: dict[str, dict[str, str]]) -> str:
    """Return the rows of the table in Markdown."""
    rows = [f"| package | version | {' | '.join(STAGES)} |", f"| --- | --- |{' --- |' * len(STAGES)}"]
    for name, stages in results.items():
        distribution, version = PACKAGES[name]
        marks = " | ".join("yes" if stages[stage] == "yes" else "no" for stage in STAGES)
        rows.append(f"| [{distribution}](https://pypi.org/project/{distribution}/) | {version} | {marks} |")
    return "\n".join(rows)


def write(rows: str) -> None:
    """Put the table between its marks in the documentation."""
    path = CHECKOUT / "docs" / "coming-from-x-transformers.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(PACKAGES)}")
    parser.add_argument("--environment", type=Path, metavar="FOLDER", help="default: a temporary one")
    parser.add_argument("--write", action="store_true", help="write the table into the documentation")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(PACKAGES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; these are known: {', '.join(PACKAGES)}")
    if options.write and options.names:
        parser.error("`--write` writes the whole table; drop the names")
    with tempfile.TemporaryDirectory() as temporary:
        python = make_environment(options.environment or Path(temporary) / "environment")
        results = {}
        for name in options.names or PACKAGES:
            results[name] = run_case(python, name)
            for stage, result in results[name].items():
                print(f"{name}: {stage}: {result}", flush=True)
    print(table(results))
    failed = any(result != "yes" for stages in results.values() for result in stages.values())
    if options.write:
        if failed:
            sys.exit("not written: the documentation lists packages that run")
        write(table(results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
