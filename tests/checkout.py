"""Import the package from this checkout: a script has its own folder first on the path, and not the one above it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
