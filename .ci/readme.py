"""Run what the README shows: make targets dry, cheap commands as they stand, training commands as a validation.

Usage: .venv/bin/python .ci/readme.py README.md
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "bash", "console")
# Verbs that need a finished run, and others too long to repeat here, are checked by their help text only.
TRAINING = ("train", "quickstart")
CHEAP = ("list", "validate", "estimate", "published", "--help", "--version")


def commands(text: str) -> list[str]:
    """The commands of all shell blocks, without prompts, comments and continuation lines."""
    blocks = [body for language, body in FENCE.findall(text) if language in SHELL]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def stand_in(command: str) -> list[str]:
    """What to run in place of `command`: as long as it proves that the command would be understood."""
    words = shlex.split(command.removeprefix(".venv/bin/"), comments=True)
    if words[0] == "make":
        return ["make", "-n", *words[1:]]
    if words[0] == "rankbits" and words[1] in CHEAP:
        return words
    if words[0] == "rankbits" and words[1] in TRAINING:
        recipe = words[2:] if words[1] == "train" else ["quickstart", *words[2:]]
        return ["rankbits", "validate", *recipe]
    if words[0] == "rankbits":
        return ["rankbits", words[1], "--help"]
    return []


def main(readme: str) -> int:
    """Return 0 if every command and every Python block of `readme` runs."""
    text = Path(readme).read_text(encoding="utf-8")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    failures = 0
    for command in commands(text):
        words = stand_in(command)
        if not words:
            print(f"not tried: {command}")
            continue
        print(f"{command}  ->  {shlex.join(words)}", flush=True)
        failures += subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=False).returncode != 0
    so_far = ""
    for language, body in FENCE.findall(text):
        if language == "python":
            # A reader goes on where the block before left off.
            so_far += body
            print(body.strip().splitlines()[0], "...", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                block = [sys.executable, "-c", so_far]
                failures += subprocess.run(block, env=environment, cwd=folder, check=False).returncode != 0
    print(f"{failures} of them failed" if failures else "README: every command works")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
