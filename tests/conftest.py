"""Settings of every test: fixed seeds, one thread for each worker, uninitialised memory that fails a test."""

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # workers share the cores, and models this small lose time to more threads
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Deterministic mode also fills `torch.empty` with NaN, so that reading it before writing fails a test.
# On CUDA it would refuse the backward pass of fused kernels.
torch.use_deterministic_algorithms(not torch.cuda.is_available())

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="let the fuzz tests run for hours")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long"):
        os.environ["XT_FUZZ"] = "long"


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    # `torch.manual_seed` also notes for each device that was never used who called it, which takes milliseconds
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference data next to the checkout: goldens, recipes."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of reference data, ../shared, next to the checkout")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
