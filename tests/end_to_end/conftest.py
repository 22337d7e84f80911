"""Tests of whole models use the small ones that tests/tiny holds."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tiny"))
