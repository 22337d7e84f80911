"""Tests of accounting read the small configs of every architecture that tests/tiny holds."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tiny"))
