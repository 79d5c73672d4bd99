"""Everything that documents name exists, and they name all that is public: names, commands, extras, recorded files."""

import ast
import functools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

from tq_jax.commands import cli

ROOT = Path(__file__).parents[1]
README, BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
START, COMMANDS = ROOT / "docs" / "start.md", ROOT / "docs" / "commands.md"
DOCUMENTS = [README, BENCHMARKS, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def documents(function):
    return pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))(function)


def code(text):
    """Lines of shell blocks without comments, and the parts of prose between backticks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [line.split("  #")[0] for line in lines] + [
        part.replace("\n", " ") for part in re.findall(r"`([^`]+)`", prose)
    ]


def first_column(text):
    return [link for line in text.splitlines() if line.startswith("| [") for link in targets(line.split(" | ")[0])]


def targets(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_tables_name_every_recorded_file_and_every_script():
    named = first_column(BENCHMARKS.read_text("utf-8"))
    folder = BENCHMARKS.parent
    results = [f"results/{path.name}" for path in folder.glob("results/*")]
    scripts = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(results + scripts)


@documents
def test_links_and_pictures_exist(path):
    missing = [link for link in targets(path.read_text("utf-8")) if not re.match(r"https?://|#", link)]
    assert [link for link in missing if not (path.parent / link.split("#")[0]).exists()] == []


def test_every_picture_is_shown():
    shown = {(path.parent / link).resolve() for path in DOCUMENTS for link in targets(path.read_text("utf-8"))}
    assert [path.name for path in sorted((ROOT / "docs").glob("*.png")) if path not in shown] == []


@documents
def test_options_of_commands_exist(path):
    commands = [part for part in code(path.read_text("utf-8")) if "tq-jax " in part]
    for command in commands:
        name, *rest = shlex.split(command.split("tq-jax ", 1)[1])
        assert name in cli.commands(), command
        known = {option for parameter in parameters(name) for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, command


@functools.cache
def parameters(name):
    application = typer.main.get_command(cli.build([name]))
    return application.commands[name].params  # pyright: ignore[reportAttributeAccessIssue]


def test_options_of_scripts_exist():
    commands = [part for part in code(BENCHMARKS.read_text("utf-8")) if "benchmarks/" in part]
    assert commands
    shared = (ROOT / "benchmarks" / "jobs.py").read_text("utf-8")
    for command in commands:
        script, rest = re.search(r"(benchmarks/\w+\.py)(.*)", command).groups()  # pyright: ignore[reportOptionalMemberAccess]
        source = (ROOT / script).read_text("utf-8") + shared
        assert [word for word in re.findall(r"--[\w-]+", rest) if f'"{word}"' not in source] == [], command


@documents
def test_named_tests_exist(path):
    named = [word for part in code(path.read_text("utf-8")) for word in re.findall(r"\btests/[\w/.]+", part)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_named_markers_exist():
    known = {marker.split(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    commands = [part for path in DOCUMENTS for part in code(path.read_text("utf-8")) if "pytest" in part]
    named = {marker for command in commands for marker in re.findall(r"pytest(?: .*)? -m (\w+)", command)}
    assert named <= known


def public_names():
    """The dotted names in every `__all__`, without packages inside a package that lists the same names."""
    names = {}
    for package in ("tq_jax", "interop", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for node in ast.parse(path.read_text("utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    names[dotted] = set(ast.literal_eval(node.value))
    inner = [name for name, found in names.items() if found <= names.get(name.rpartition(".")[0], set())]
    return {f"{module}.{name}" for module, found in names.items() if module not in inner for name in found}


def test_the_reference_has_every_public_name():
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    # A function with the name of its module is asked for as module.name.name, and has the short name as its heading.
    headings = re.findall(r"^      heading: (\S+)$", pages, re.MULTILINE)
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(set(shown)) == len(shown)
    assert public_names() <= set(shown) | set(headings)
    assert {f"{name}.{name.rpartition('.')[2]}" for name in headings} <= set(shown)


def test_every_command_has_its_line():
    named = re.findall(r"tq-jax ([a-z-]+)", first_cells(COMMANDS.read_text("utf-8")))
    assert set(named) == set(cli.commands())


def test_installation_names_every_extra_and_the_tested_versions():
    text = START.read_text("utf-8")
    extras = first_cells(text.partition("| extra |")[2].partition("\n\n")[0])
    assert set(re.findall(r"`(\w+)`", extras)) == set(PYPROJECT["project"]["optional-dependencies"])
    makefile = (ROOT / "Makefile").read_text("utf-8")
    rows = {line.split(" | ")[0]: line for line in text.splitlines()}
    for name in ("torch", "transformers", "vLLM", "Tunix", "JAX", "triton, for `tq-jax gate`"):
        variable = name.split(",")[0].upper()
        version = re.search(rf"^{variable} \?= (\S+)$", makefile, re.MULTILINE)
        assert version is not None and version[1] in rows[f"| {name}"], name


def first_cells(text):
    return "\n".join(line.split(" | ")[0] for line in text.splitlines() if line.startswith("| "))


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150


@documents
def test_blocks_of_python_import_what_exists(path):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    for block in (block for block in blocks if ">>>" not in block):  # those with >>> are doctests
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("tq_jax", "interop")):
                home = ROOT.joinpath(*node.module.split("."))
                source = (home / "__init__.py" if home.is_dir() else home.with_suffix(".py")).read_text("utf-8")
                names = {alias.name for alias in node.names}
                assert [name for name in names if not re.search(rf"\b{name}\b", source)] == [], node.module
