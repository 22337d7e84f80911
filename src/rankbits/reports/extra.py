"""The optional packages a page needs, and the error that says how to get them."""

from __future__ import annotations

from importlib import import_module

from rankbits.errors import RankbitsError

PACKAGES = ("matplotlib", "jinja2")


def require_report_extra() -> None:
    """Raise RankbitsError, naming what is missing and the command that installs it, unless a page can be made."""
    missing = [name for name in PACKAGES if not _importable(name)]
    if missing:
        raise RankbitsError(
            f"a report needs {' and '.join(missing)}, not installed here; "
            "the record is complete without it. Run: pip install 'rankbits[report]'"
        )


def _importable(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True
