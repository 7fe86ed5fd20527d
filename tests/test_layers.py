"""Who may import whom: from the layers below, never in a circle. Imports within functions count, too."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import future_l1_plugin

PACKAGE = Path(future_l1_plugin.__file__).parent
#: From below to above; modules of one layer may import each other.
LAYERS = (
    {"__init__", "errors", "paths", "compat"},
    {"journal", "config", "values", "endpoint"},
    {"latent"},
    {"la_dapo", "rewards", "model"},
    {"data", "resume"},
    {"evaluation"},
    {"report"},
    {"integrations"},
    {"gpu_check", "cli", "doctor"},
)


def modules() -> dict[str, Path]:
    """Every module of the package, by its name below it: "data.frames"; a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports when it runs; those for type checkers only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("future_l1_plugin"):
            module = node.module.removeprefix("future_l1_plugin").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in known else module or "__init__"
        elif isinstance(node, ast.Import):
            yield from (n for a in node.names if (n := a.name.removeprefix("future_l1_plugin.")) in known)
        yield from imports(node, known)


def graph() -> dict[str, set[str]]:
    known = modules()
    found = {name: set(imports(ast.parse(path.read_text()), known)) - {name} for name, path in known.items()}
    return {name: {other for other in others if other in known} for name, others in found.items()}


def layer_of(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module.partition(".")[0] in layer)


def test_every_module_has_a_layer():
    assert {name.partition(".")[0] for name in modules()} == set().union(*LAYERS)


def test_imports_go_down():
    up = [f"{a} -> {b}" for a, others in graph().items() for b in others if layer_of(b) > layer_of(a)]
    assert not up, "\n".join(up)


def test_there_is_no_circle():
    inner = {name: {o for o in others if not name.startswith(f"{o}.")} for name, others in graph().items()}
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_below_the_integrations_nothing_knows_a_host():
    hosts = {"verl", "ray", "vllm", "lmms_eval", "trl"}
    for name, path in modules().items():
        if layer_of(name) < layer_of("integrations"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            assert not (found := hosts & {module.partition(".")[0] for module in names}), f"{name} imports {found}"
