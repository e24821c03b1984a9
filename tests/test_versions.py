"""What a version of PyTorch cannot do is refused in words, and graphs contain nothing that an older compiler refuses."""

import ast
from pathlib import Path

import pytest
import torch
import versions
from checkout import ROOT  # noqa: F401
