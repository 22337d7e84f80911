"""How verbs end: message, exit code, and which errors keep their traceback."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rankbits.cli.guard import guarded, storage_problem
from rankbits.errors import TaskError


def _run(verb: Callable[[], None]):
    app = typer.Typer()
    app.command()(guarded(verb))
    return CliRunner().invoke(app)


def _raiser(error: BaseException) -> Callable[[], None]:
    def verb() -> None:
        raise error

    return verb


def test_our_errors_are_one_message_on_stderr_and_exit_2():
    result = _run(_raiser(TaskError("no such task")))
    assert (result.exit_code, result.stderr, result.stdout) == (2, "error: no such task\n", "")


def test_ctrl_c_says_how_to_go_on_and_exits_130():
    result = _run(_raiser(KeyboardInterrupt("stopped; `rankbits train x` resumes")))
    assert (result.exit_code, result.stderr) == (130, "stopped; `rankbits train x` resumes\n")
    assert _run(_raiser(KeyboardInterrupt())).stderr == "stopped\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_storage_that_refuses_exits_2_and_names_the_file(number: int):
    result = _run(_raiser(OSError(number, os.strerror(number), "runs/x/record.json")))
    assert result.exit_code == 2
    assert result.stderr == f"error: runs/x/record.json: cannot be written or read ({os.strerror(number)})\n"


def test_a_full_disk_behind_another_error_is_found():
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.bin")
    except OSError as cause:
        error = ValueError("saving failed")
        error.__cause__ = cause
    assert storage_problem(error) == "model.bin: cannot be written or read (No space left on device)"


def test_a_full_disk_told_by_another_language_is_found():
    assert storage_problem(Exception("I/O error: No space left on device (os error 28)")) is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_torch_save_on_a_full_disk_is_found():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.save({"weight": torch.zeros(100_000)}, "/dev/full")
    assert "could not be written" in str(storage_problem(caught.value))


@pytest.mark.parametrize("error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "no file", "x")])
def test_anything_else_passes_through(error: Exception):
    result = _run(_raiser(error))
    assert result.exception is error
    assert result.exit_code == 1


def test_the_verb_keeps_its_arguments():
    app = typer.Typer()

    def verb(name: str, loud: bool = False) -> None:
        typer.echo(f"{name} {loud}")

    app.command()(guarded(verb))
    assert CliRunner().invoke(app, ["me", "--loud"]).stdout == "me True\n"
