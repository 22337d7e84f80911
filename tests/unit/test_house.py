"""The house rules that a machine can check: layout, sizes, contracts, what is packaged, what an import costs."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "rankbits"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "matplotlib", "sklearn", "scipy")
DISTRIBUTION_OF_MODULE = {"sklearn": "scikit-learn", "yaml": "pyyaml", "pydantic_core": "pydantic"}


def _label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def _argument_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Named parameters, without self and cls."""
    named = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return sum(argument.arg not in {"self", "cls"} for argument in named)


def _imported_modules(tree: ast.Module) -> set[str]:
    """Top-level names of all absolute imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has imported nothing yet, with this checkout's package."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("path", SOURCES, ids=_label)
def test_a_file_says_first_what_it_is_and_stays_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.startswith('"""'), "the first line must be a docstring"
    assert not FORBIDDEN_NAMES & set(path.relative_to(PACKAGE).with_suffix("").parts)
    assert len(text.splitlines()) <= 400
    too_long = [f"{f.name}: {_length(f)} lines" for f in _functions(tree) if _length(f) > 60]
    too_wide = [f"{f.name}: {_argument_count(f)} parameters" for f in _functions(tree) if _argument_count(f) > 7]
    assert not too_long + too_wide


def test_nearly_all_files_and_functions_are_short() -> None:
    files = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES)
    functions = sorted(_length(f) for path in SOURCES for f in _functions(ast.parse(path.read_text(encoding="utf-8"))))
    assert files[int(0.9 * len(files))] <= 300
    assert functions[int(0.9 * len(functions))] <= 30


def test_the_layer_contract_lists_every_room_and_no_other() -> None:
    contracts = _project()["tool"]["importlinter"]["contracts"]
    layers = next(contract for contract in contracts if contract["type"] == "layers")
    listed = {room.strip() for row in layers["layers"] for room in row.split("|")}
    existing = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert layers["exhaustive"] is True
    assert listed == existing - {"__init__"}


def test_gates_and_quantizers_meet_only_in_the_tuner() -> None:
    def rooms(path: Path) -> set[str]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        return {module.split(".")[1] for module in modules if module.startswith("rankbits.")}

    meeting = {path for path in SOURCES if {"gates", "quant"} <= rooms(path)}
    assert meeting
    assert {path.parent for path in meeting} == {PACKAGE / "tuners" / "bayesian_lora"}


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = _project()["project"]
    declared = {
        requirement.partition("[")[0].partition(">")[0].partition("=")[0].lower()
        for requirement in project["dependencies"] + project["optional-dependencies"]["report"]
    }
    modules = set().union(*(_imported_modules(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES))
    foreign = modules - set(sys.stdlib_module_names) - {"rankbits"}
    assert {DISTRIBUTION_OF_MODULE.get(name, name).lower() for name in foreign} <= declared


def test_pins_lie_inside_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    project = _project()["project"]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name != "rankbits":
            pin = pins[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(pin), f"{requirement} does not allow the pinned {pin}"


def test_the_conformance_suite_is_that_of_the_pinned_peft() -> None:
    archive = (ROOT / "requirements" / "peft-sdist.txt").read_text(encoding="utf-8").splitlines()[-1].split()[0]
    assert archive in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_recipes_templates_and_type_marker_are_in_the_wheel(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    packaged = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    data = {path for path in PACKAGE.rglob("*") if path.suffix in {".yaml", ".html", ".j2", ".css", ".json"}}
    assert any(path.suffix == ".yaml" for path in data)
    expected = {path.relative_to(PACKAGE.parent).as_posix() for path in data | {PACKAGE / "py.typed"}}
    assert expected <= packaged


def test_import_rankbits_loads_nothing_heavy() -> None:
    answer = _fresh(f"import sys, rankbits; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert answer.stdout == "[]\n", answer.stderr


@pytest.mark.parametrize(
    "order",
    [
        "import peft, rankbits",
        "import rankbits, importlib.util; importlib.util.find_spec('peft'); import peft",
    ],
    ids=["peft first", "rankbits first, then a look for peft as transformers does it"],
)
def test_the_tuners_are_registered_whatever_is_imported_first(order: str) -> None:
    answer = _fresh(f"{order}; print('BAYESIAN_LORA' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)")
    assert answer.stdout == "True\n", answer.stderr


def test_the_make_targets_that_the_documents_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("quickstart", "test", "lint", "types", "contracts", "conformance", "baseline", "format", "clean"):
        assert f"\n{target}: " in makefile
