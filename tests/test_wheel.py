"""The built wheel contains the whole package and nothing else, and works without the sources."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Isolated mode knows neither the working directory nor PYTHONPATH. A checkout that is installed for editing
# comes after the wheel on the path, and the last line proves that nothing was taken from it.
SCRIPT = """
import importlib, pkgutil, sys
installed = sys.argv[1]
sys.path.insert(0, installed)

import torch
import x_transformers
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

for module in pkgutil.walk_packages(x_transformers.__path__, "x_transformers."):
    importlib.import_module(module.name)

model = TransformerWrapper(num_tokens=16, max_seq_len=16, attn_layers=Decoder(dim=16, depth=1, heads=2))
tokens = torch.randint(0, 16, (2, 8))
assert model(tokens).shape == (2, 8, 16)
assert AutoregressiveWrapper(model).generate(tokens, 4).shape == (2, 4)

ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "x_transformers"]
assert all(module.__file__.startswith(installed) for module in ours), [m.__file__ for m in ours]
"""


def run(*command: str | Path, cwd: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    text = (ROOT / "x_transformers" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{wheel.name.split("-")[1]}"' in text


def test_wheel_contains_the_package_only(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "x_transformers").rglob("*.py")}
    assert names == sources | {"x_transformers/py.typed"}


def test_wheel_works_without_the_sources(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    run("-m", "pip", "install", *flags, "--target", installed, wheel, cwd=tmp_path)
    run("-I", "-c", SCRIPT, installed, cwd=tmp_path)
