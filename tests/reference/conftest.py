"""Reference tests build the small models of tests/tiny, and count what these run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tiny"))
