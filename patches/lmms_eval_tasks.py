"""Let lmms-eval find our tasks without a flag. See README.md in this folder, entry `lmms_eval_tasks`.

lmms-eval has an entry point for models and none for tasks. This wraps `TaskManager.initialize_tasks` so that our task
folder is searched after lmms-eval's own and after every `--include_path`, which therefore win a collision of names.

Plain way, without the patch: FUTURE_L1_LMMS_TASKS=off lmms-eval --include_path FOLDER .., where FOLDER is what
`python -c "from future_l1_plugin.paths import lmms_tasks_dir as d; print(d())"` prints.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from future_l1_plugin.errors import EnvironmentMismatch
from future_l1_plugin.paths import lmms_tasks_dir

TARGET = "lmms_eval.tasks"
#: Versions whose TaskManager was read and run with this patch.
CHECKED = SpecifierSet(">=0.7.3,<0.7.4")
#: What `TaskManager.initialize_tasks` must take.
PARAMETERS = ["self", "include_path", "include_defaults"]
#: The user's off-switch: FUTURE_L1_LMMS_TASKS=off.
SWITCH = "FUTURE_L1_LMMS_TASKS"

_MARK = "_future_l1_tasks"


def apply() -> bool:
    """Patch lmms-eval's task manager, now if it is loaded, else as soon as it is. Idempotent.

    Importing `lmms_eval.tasks` here would pull torch and datasets into everything that merely lists models.

    Returns False if the user switched the patch off.

    Raises:
        EnvironmentMismatch: lmms-eval is outside the checked versions, or its task manager has changed.
    """
    if os.environ.get(SWITCH, "on").lower() in ("off", "0", "false"):
        return False
    version = importlib.metadata.version("lmms-eval")
    if version not in CHECKED:
        raise EnvironmentMismatch(
            f"lmms-eval {version}: our tasks are added to versions {CHECKED} only. Fix: pip install "
            f"'lmms-eval{CHECKED}', or name the tasks yourself: {_plain_way()}"
        )
    loaded = sys.modules.get(TARGET)
    if loaded is not None and hasattr(loaded, "TaskManager"):
        patch(loaded)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
    return True


def patch(module: ModuleType) -> None:
    """Wrap `module.TaskManager.initialize_tasks`; once. Raises EnvironmentMismatch if it is not what it was."""
    manager = getattr(module, "TaskManager", None)
    original = getattr(manager, "initialize_tasks", None)
    if original is None:
        raise _changed("it has no TaskManager.initialize_tasks")
    if getattr(original, _MARK, False):
        return
    found = list(inspect.signature(original).parameters)
    if found != PARAMETERS:
        raise _changed(f"TaskManager.initialize_tasks takes {found}, expected {PARAMETERS}")

    @functools.wraps(original)
    def initialize_tasks(
        self: Any, include_path: str | list[str] | None = None, include_defaults: bool = True
    ) -> dict[str, Any]:
        named = [include_path] if isinstance(include_path, str) else list(include_path or [])
        return original(self, include_path=[*named, str(lmms_tasks_dir())], include_defaults=include_defaults)

    setattr(initialize_tasks, _MARK, True)
    manager.initialize_tasks = initialize_tasks


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds `lmms_eval.tasks` as Python would and patches it right after it has run; then it is gone."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run(module)
            patch(module)

        spec.loader.exec_module = run_and_patch
        return spec


def _changed(what: str) -> EnvironmentMismatch:
    return EnvironmentMismatch(
        f"lmms-eval has changed where our tasks are added: {what}. Fix: pip install 'lmms-eval{CHECKED}', or name the "
        f"tasks yourself: {_plain_way()}"
    )


def _plain_way() -> str:
    return f"{SWITCH}=off lmms-eval --include_path {lmms_tasks_dir()} .."
