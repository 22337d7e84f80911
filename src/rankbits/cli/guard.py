"""How a verb ends: one clear message and an exit code for what can be expected, a traceback for what cannot."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator

import typer

from rankbits.errors import RankbitsError

BAD_INPUT = 2
INTERRUPTED = 130

_STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})
_FULL = os.strerror(errno.ENOSPC)
# The C++ writer behind torch.save reports a full disk as a failed self-check of its own file.
_TORCH_WRITER = "inline_container.cc"


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with its expected failures turned into a message on stderr.

    RankbitsError and storage that is full or not writable exit with 2, Ctrl-C with 130. Anything else is a defect of
    rankbits and passes through.
    """

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        try:
            verb(*args, **kwargs)
        except RankbitsError as error:
            raise _exit(f"error: {error}", BAD_INPUT) from error
        except KeyboardInterrupt as stop:
            raise _exit(str(stop) or "stopped", INTERRUPTED) from stop
        except Exception as error:
            problem = storage_problem(error)
            if problem is None:
                raise
            raise _exit(f"error: {problem}", BAD_INPUT) from error

    return run


def storage_problem(error: BaseException) -> str | None:
    """What the storage refused, if that is what this error or one that led to it says, else None."""
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in _STORAGE:
            return f"{one.filename or 'a file'}: cannot be written or read ({one.strerror})"
        if _FULL in str(one):
            return str(one)
        if isinstance(one, RuntimeError) and _TORCH_WRITER in str(one):
            return f"a checkpoint could not be written, most likely for want of space ({str(one).strip()})"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _exit(message: str, code: int) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(code)
