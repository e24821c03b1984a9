"""A run that is killed at random moments goes on to the same losses; `killed_runs.py` kills longer runs more often."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="runs are forked")
def test_killed_runs_go_on_to_the_same_bits() -> None:
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), "--kills", "4", "--steps", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 kills")
