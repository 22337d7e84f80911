"""Let a fresh virtual environment see the packages of this one, all but rankbits itself.

Usage: .venv/bin/python .ci/borrow.py OTHER/bin/python
"""

import subprocess
import sys
import sysconfig
from pathlib import Path


def main(other_python: str) -> None:
    """Write a .pth file that puts this environment's site-packages behind those of the other one.

    A folder named in a .pth file is searched for modules, but .pth files in it are not executed. An editable rankbits
    therefore stays invisible, and only the installed wheel can be imported.
    """
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    other = subprocess.run([other_python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    Path(other, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
