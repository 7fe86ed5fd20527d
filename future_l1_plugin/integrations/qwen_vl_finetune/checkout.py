"""A checkout of 2U1/Qwen-VL-Series-Finetune: which one it is, whether it has what we use, and its modules.

It is no package: its modules import each other by names (`src.params`, `train.train_utils`) that resolve when folders
of it are on the path. They are on it only while `modules` imports; nothing of the checkout is changed or copied.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from future_l1_plugin.errors import ConfigError, EnvironmentMismatch
from future_l1_plugin.integrations.sft.deepspeed import NAMES
from future_l1_plugin.patches.qwen_vl_finetune_functions import functions

URL = "https://github.com/2U1/Qwen-VL-Series-Finetune"
#: The oldest and the newest supported commit: id, date, committer time in seconds (git's %ct).
FIRST = ("304c153", "2025-10-16", 1760587029)
LAST = ("93fef86", "2025-10-22", 1761120802)
#: What we call of it, with the parameters.
CALLED = {
    "src/trainer/sft_trainer.py": {
        "QwenSFTTrainer.create_optimizer": ("self",),
        "QwenSFTTrainer._save_checkpoint": ("self", "model", "trial"),
    },
    "src/train/train_sft.py": {
        "rank0_print": (),
        "find_target_linear_names": ("model", "num_lora_modules", "lora_namespan_exclude", "verbose"),
        "set_requires_grad": ("parameters", "requires_grad"),
        "configure_vision_tower": ("model", "training_args", "compute_dtype", "device"),
        "configure_llm": ("model", "training_args"),
        "unfreeze_topk_layers": ("model", "k_llm", "k_vis"),
    },
}
#: The fields of `TrainingArguments` in src/params.py that we read.
READ = (
    "freeze_vision_tower freeze_llm freeze_merger unfreeze_topk_llm unfreeze_topk_vision vision_lr merger_lr "
    "lora_enable vision_lora lora_rank lora_alpha lora_dropout lora_bias lora_namespan_exclude num_lora_modules"
).split()
#: What the functions of train_sft.py are made with; local_rank None is that file's own first value.
_GLOBALS = {"local_rank": None}
DEEPSPEED = tuple(NAMES)


@dataclass(frozen=True)
class Modules:
    """What we use of the project, imported."""

    trainer: type  # QwenSFTTrainer
    arguments: type  # its TrainingArguments, a dataclass
    configure_llm: Callable[..., None]
    configure_vision_tower: Callable[..., None]
    unfreeze_topk_layers: Callable[..., None]
    find_target_linear_names: Callable[..., list[str]]


@dataclass(frozen=True)
class Checkout:
    """A folder that `open_checkout` found to be a supported checkout. `version` is for people."""

    path: Path
    version: str

    def modules(self) -> Modules:
        """Import the modules that we use. Raises EnvironmentMismatch if one of them needs a package that is missing."""
        import torch

        with _on_the_path(self.path, self.path / "src", self.path / "src" / "trainer"):
            params = self._import("src.params", "src/params.py")
            # As a module of its own: the package around it imports trainers that need more, see patches/README.md.
            trainer = self._import("sft_trainer", "src/trainer/sft_trainer.py")
        file = "src/train/train_sft.py"
        made = functions(self.path / file, tuple(CALLED[file]), {"torch": torch, **_GLOBALS})
        kept = {name: made[name] for name in Modules.__dataclass_fields__ if name in made}
        return Modules(trainer=trainer.QwenSFTTrainer, arguments=params.TrainingArguments, **kept)

    def _import(self, name: str, file: str) -> ModuleType:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise EnvironmentMismatch(
                f"{self.path / file} imports `{error.name}`, which is not installed.\n{self.pip(error.name)}"
            ) from error
        if Path(module.__file__).resolve() != (self.path / file).resolve():
            raise EnvironmentMismatch(
                f"expected the module `{name}` of {self.path}, found {module.__file__}, which comes first on Python's "
                "path or was imported before. Start in another folder or process."
            )
        return module

    def pip(self, package: str) -> str:
        """The command that installs a package as the checkout's requirements.txt pins it."""
        text = (self.path / "requirements.txt").read_text(encoding="utf-8")
        line = re.search(rf"^{re.escape(package).replace('_', '[-_]')}==\S+", text, re.MULTILINE | re.IGNORECASE)
        return f'Run: {sys.executable} -m pip install "{line[0] if line else package}"'

    def deepspeed(self, name: str) -> Path:
        """The DeepSpeed configuration of that name, or at that path.

        Raises:
            ConfigError: no such name and no such file.
        """
        file = self.path / "scripts" / f"{name}.json" if name in DEEPSPEED else Path(name)
        if not file.is_file():
            raise ConfigError(
                f"qwen_vl_finetune.deepspeed: expected one of {', '.join(DEEPSPEED)} or the path of a JSON, found "
                f"{name!r} ({file} is no file)"
            )
        return file


def open_checkout(path: str | Path) -> Checkout:
    """Check a folder before anything is imported from it.

    Raises:
        ConfigError: there is no such folder.
        EnvironmentMismatch: a commit outside of the supported range, or a name or signature that we use has changed.
    """
    path = Path(path).resolve()
    if not (path / "src").is_dir():
        where = shlex.quote(str(path))
        raise ConfigError(
            f"qwen_vl_finetune.path: expected a checkout of Qwen-VL-Series-Finetune, found no folder {path / 'src'}.\n"
            f"Run: git clone {URL} {where} && {_use_last(path)}\n"
            "or set qwen_vl_finetune.path=null to train on transformers.Trainer."
        )
    version = _commit(path) if (path / ".git").exists() else "without git, commit unknown"
    for file, names in CALLED.items():
        tree = _parsed(path, file)
        for name, expected in names.items():
            node = _find(tree, name)
            found = None if node is None else _parameters(node)
            if found != expected:
                _moved(path, file, f"{name}({', '.join(expected)})", found and f"{name}({', '.join(found)})")
    arguments = _find(_parsed(path, "src/params.py"), "TrainingArguments")
    for name in READ:
        if arguments is None or name not in _fields(arguments):
            _moved(path, "src/params.py", f"TrainingArguments.{name}", None)
    return Checkout(path, version)


def _use_last(path: Path) -> str:
    return f"git -C {shlex.quote(str(path))} checkout {LAST[0]}"


def _supported(path: Path) -> str:
    return f"Supported are the commits {FIRST[0]} ({FIRST[1]}) to {LAST[0]} ({LAST[1]}).\nRun: {_use_last(path)}"


def _commit(path: Path) -> str:
    """Id and date of the checkout's commit, and whether files of it were changed."""
    commit, date, seconds = _git(path, "log", "-1", "--format=%h %cs %ct").split()
    if not FIRST[2] <= int(seconds) <= LAST[2]:
        raise EnvironmentMismatch(f"{path} is at commit {commit} ({date}). {_supported(path)}")
    changed = _git(path, "status", "--porcelain", "--untracked-files=no", "--", "src", "scripts")
    return f"{commit} ({date}{', with local changes' if changed else ''})"


def _git(path: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(path), *command], capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentMismatch(f"{path}: git cannot tell its commit: {done.stderr.strip()}")
    return done.stdout.strip()


def _parsed(path: Path, file: str) -> ast.Module:
    if not (path / file).is_file():
        raise EnvironmentMismatch(f"{path}: expected the file {file}, found none. {_supported(path)}")
    return ast.parse((path / file).read_text(encoding="utf-8"), filename=file)


def _find(tree: ast.Module, name: str) -> Any:
    """The class, function or method (`Class.method`) of that name, None if there is none."""
    node: Any = tree
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == part), None)
        if node is None:
            return None
    return node


def _parameters(function: Any) -> tuple[str, ...]:
    arguments = function.args
    return tuple(argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))


def _fields(cls: ast.ClassDef) -> list[str]:
    return [node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)]


def _moved(path: Path, file: str, expected: str, found: str | None) -> NoReturn:
    raise EnvironmentMismatch(
        f"{path}: expected {expected} in {file}, found {found or 'nothing of this name'}. {_supported(path)}"
    )


@contextmanager
def _on_the_path(*folders: Path) -> Iterator[None]:
    """Last on the path: what is installed wins over a module of the same name, such as `utils`."""
    added = [str(folder) for folder in folders]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)
