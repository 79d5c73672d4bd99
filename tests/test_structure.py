"""The shape of the source: imports point one way and close no circle, files and functions are short, and every import
path that users rely on works."""

import ast
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "tq_jax", "interop")
"""From the lowest to the highest: a package imports only itself and those before it."""

GROUND = tuple(
    f"pallas_kernels.{name}"
    for name in ("format", "packing", "pages", "lookup", "numerics", "pytree", "dispatch", "tiles", "compat")
)
OPERATIONS = tuple(f"pallas_kernels.{name}" for name in ("attention", "append", "encode", "decode", "prefill"))
COMMANDS = "tq_jax.commands"
COMMAND_LINE = ("tq_jax.__main__",)
"""`python -m tq_jax` is the command line, so it starts it."""

ENTRY_POINT_GROUP = "tq_jax.commands"
"""A name in pyproject.toml by which other packages add commands; it happens to be that of a module."""

FILE_LINES, FUNCTION_LINES = 400, 60
DOTTED = re.compile(rf"(?:{'|'.join(PACKAGES)})\.[\w.]*(?::\w+)?")
PLACEHOLDER = re.compile(r"(?:^|:\s+)(?:As there|Likewise|See there)\.$")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}


def assert_none(offenders: list[str]) -> None:
    """Names every offender on a line of its own."""
    assert not offenders, "\n" + "\n".join(offenders)


def inside(name: str, *packages: str) -> bool:
    """Whether a module is one of the packages or in one of them."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def longest_module(dotted: str) -> str:
    """The module of a string such as package.module:function or package.module.Class."""
    name = dotted.split(":")[0].rstrip(".")  # the beginning of an f-string ends with a dot
    return name if name in FILES else longest_module(name.rpartition(".")[0])


def strings_of_docs(tree: ast.AST) -> list[ast.Constant]:
    """Docstrings, those behind assignments included."""
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return [value for value in found if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def dotted_strings(tree: ast.AST) -> list[ast.Constant]:
    """Strings with the dotted name of something of ours."""
    docs = {id(value) for value in strings_of_docs(tree)}
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [
        node
        for node in strings
        if id(node) not in docs and node.value != ENTRY_POINT_GROUP and DOTTED.fullmatch(str(node.value))
    ]


def named_modules(name: str) -> Iterator[tuple[int, str]]:
    """Line and name of every module of ours that a module imports, at any level, or names in a string."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{FILES[name]}:{node.lineno}: a relative import"
            for alias in node.names:
                found = f"{node.module}.{alias.name}"
                found = found if found in FILES else node.module
                if found in FILES:
                    yield node.lineno, found
    for node in dotted_strings(TREES[name]):
        yield node.lineno, longest_module(str(node.value))


ARROWS = [(name, line, to) for name in FILES for line, to in named_modules(name) if to != name]
"""Module, line, and the module that it names there."""


def offending(arrows: list[tuple[str, int, str]]) -> list[str]:
    return [f"{FILES[name].relative_to(ROOT)}:{line} imports {to}" for name, line, to in arrows]


def test_packages_import_downward():
    rank = {package: i for i, package in enumerate(PACKAGES)}
    upward = [arrow for arrow in ARROWS if rank[arrow[0].split(".")[0]] < rank[arrow[2].split(".")[0]]]
    assert_none(offending(upward))


def test_the_ground_of_the_kernels_uses_no_operation():
    assert_none(offending([a for a in ARROWS if inside(a[0], *GROUND) and inside(a[2], *OPERATIONS)]))


def test_the_core_does_not_use_its_commands():
    core = [a for a in ARROWS if inside(a[0], "tq_jax") and not inside(a[0], COMMANDS, *COMMAND_LINE)]
    assert_none(offending([arrow for arrow in core if inside(arrow[2], COMMANDS)]))


def started(name: str, to: str) -> set[str]:
    """Modules that run when a module imports another one: its packages, unless they are running already, and itself."""
    parts = to.split(".")
    parents = {".".join(parts[:i]) for i in range(1, len(parts))}
    return {to} | {parent for parent in parents if not inside(name, parent)}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that reach each other, a line for each such set, with a shortest way around.

    Example:
        >>> circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
        ['a -> b -> c -> a']
    """
    seen: set[str] = set()
    found = []
    for start in sorted(graph):
        way: dict[str, str] = {}  # each module, and from where it was reached first
        queue = [start]
        for name in queue:
            for to in sorted(graph[name] - way.keys()):
                way[to] = name
                queue.append(to)
        if start not in way or start in seen:
            continue
        path = [start, way[start]]
        while path[-1] != start:
            path.append(way[path[-1]])
        seen |= set(path)
        found.append(" -> ".join(reversed(path)))
    return found


def test_modules_import_in_no_circle():
    graph: dict[str, set[str]] = {name: set() for name in FILES}
    for name, _, to in ARROWS:
        graph[name] |= started(name, to) & FILES.keys()
    assert_none(circles(graph))


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b -> c -> a"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert started("x.a", "x.y.b") == {"x.y", "x.y.b"}


def test_files_are_short():
    lines = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in FILES.values()}
    assert_none([f"{path}: {count} lines" for path, count in lines.items() if count > FILE_LINES])


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, for public ones say what every argument is."""
    first = function.body[0]
    docs = ast.get_docstring(function, clean=False) is not None
    spans = [function, first] if docs else [function]
    whole, *documented = ((node.end_lineno or 0) - node.lineno + 1 for node in spans)
    return whole - sum(documented)


def test_functions_are_short():
    functions = [
        (f"{FILES[name].relative_to(ROOT)}:{node.lineno} {node.name}", code_lines(node))
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert_none([f"{place}: {count} lines" for place, count in functions if count > FUNCTION_LINES])


def documented_lines() -> Iterator[tuple[str, str]]:
    """Place and text of every line of a docstring in the repository."""
    folders = (*PACKAGES, "tests", "benchmarks", "notebooks")
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for value in strings_of_docs(ast.parse(path.read_text("utf-8"))):
            for i, line in enumerate(str(value.value).splitlines()):
                yield f"{path.relative_to(ROOT)}:{value.lineno + i}", line.strip()


def test_docstrings_say_something():
    assert_none([f"{place} {line}" for place, line in documented_lines() if PLACEHOLDER.search(line)])


def test_docstrings_have_single_backticks():
    assert_none([f"{place} {line}" for place, line in documented_lines() if "``" in line])


PATHS = {
    "tq_jax": ("CacheSpec", "QuantizerSpec", "append", "attend", "init_cache", "make_quantizer"),
    "tq_jax.search": ("build",),
    "tq_jax.models": ("generate", "load_model"),
    "tq_jax.nnx": ("CompressedAttention",),
    "tq_jax.commands": (),
    "pallas_kernels.decode": ("LogitOptions", "decode_attention"),
    "pallas_kernels.prefill": ("prefill_attention",),
    "pallas_kernels.encode": ("encode", "encode_pages"),
    "interop.hf": ("ATTENTION", "CACHE_ARGUMENT", "TurboQuantCache"),
    "interop.hf_graph": ("decoding_graphs",),
    "interop.dlpack": ("to_jax", "to_torch"),
    "interop.torch_cache": ("TorchCache",),
    "interop.capture": ("Capture", "capture"),
    "interop.calibrate": ("calibrate", "main"),
}
"""Import paths that users rely on, and names that they find there."""

NEEDS = {"interop.hf": "transformers", "interop.capture": "transformers", "interop.calibrate": "transformers"}
"""Packages that a module of `interop` needs beside torch."""


def require_frameworks(module: str) -> None:
    """Skips a test if a module of `interop` cannot be imported here."""
    if inside(module, "interop") and not inside(module, "interop.vllm"):
        pytest.importorskip("torch")
        for name, package in NEEDS.items():
            if module.startswith(name):
                pytest.importorskip(package)


@pytest.mark.parametrize("path", PATHS)
def test_import_paths_work(path):
    require_frameworks(path)
    module = importlib.import_module(path)
    assert [name for name in PATHS[path] if not hasattr(module, name)] == []


def entry_points() -> dict[str, str]:
    """Every `module:function` of pyproject.toml, by its group and name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {"scripts": project["scripts"], **project["entry-points"]}
    return {f"{group}.{name}": target for group, found in groups.items() for name, target in found.items()}


@pytest.mark.parametrize("target", entry_points().values(), ids=entry_points())
def test_entry_points_work(target):
    module, function = target.split(":")
    require_frameworks(module)
    assert callable(getattr(importlib.import_module(module), function))
