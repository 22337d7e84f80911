"""Tiny models of every architecture."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "tiny"))
