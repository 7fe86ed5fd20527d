"""Functions of a Python file, made without running its import lines. See README.md beside this file."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from future_l1_plugin.errors import EnvironmentMismatch


def functions(file: Path, names: Sequence[str], needs: dict[str, Any]) -> dict[str, Any]:
    """The named functions of a file, as they stand there.

    Args:
        file: a Python file; only read.
        names: functions at its top level, with all of its functions that they call.
        needs: the other global names that they use, such as {"torch": torch}.

    Raises:
        EnvironmentMismatch: a function is not there.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    if missing := set(names) - {node.name for node in kept}:
        raise EnvironmentMismatch(f"{file}: expected the functions {', '.join(names)}; {', '.join(missing)} is missing")
    space = {"__name__": file.stem, **needs}
    exec(compile(ast.Module(kept, []), str(file), "exec"), space)
    return {name: space[name] for name in names}
