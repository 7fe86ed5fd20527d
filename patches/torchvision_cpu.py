"""torchvision built for CUDA beside torch built for the CPU: `operator torchvision::nms does not exist`.

    python patches/torchvision_cpu.py check      exit 0 if torchvision imports, 1 if it fails by this cause or another
    python patches/torchvision_cpu.py install    fix it in the running virtual environment, if it needs it
    python patches/torchvision_cpu.py remove     take the two files away again

`make setup` runs `install`. The README beside this file says why it exists and when it can go.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from future_l1_plugin.compat import compare, pin_of
from future_l1_plugin.errors import EnvironmentMismatch, UserError

CAUSE = "operator torchvision::nms does not exist"
CHECKED = ">=0.28,<0.29"  # torchvision versions with which the fixed import was tried
MODULE = "_future_l1_torchvision_cpu"
SHIM = Path(__file__).with_name("torchvision_cpu_shim.py")

# Run with -S, so that no .pth is read: neither ours nor another's.
_PROBE = """
import json, sys
sys.path += json.loads(sys.argv[1])
import torch
import torchvision
"""


@dataclass(frozen=True)
class State:
    """What `inspect` found."""

    bare_error: str | None  # why torchvision does not import without the shim; None if it does
    error: str | None  # the same, as the environment stands
    installed: bool  # the shim's files are there and up to date

    @property
    def needed(self) -> bool:
        """Whether the import fails without the shim by the cause that the shim fixes."""
        return self.bare_error is not None and CAUSE in self.bare_error

    @property
    def ok(self) -> bool:
        """Whether torchvision imports."""
        return self.error is None

    def __str__(self) -> str:
        if self.ok and self.installed:
            return "installed"
        if self.ok:
            return "fixed by something else in this environment" if self.needed else "not needed"
        return "needed, not installed" if self.needed and not self.installed else f"torchvision fails: {self.error}"


def site_packages() -> Path:
    """The running interpreter's site-packages."""
    return Path(sysconfig.get_path("purelib"))


def import_error(shim: bool) -> str | None:
    """Import torchvision in a fresh interpreter; the last line of its error, None if it went well.

    Args:
        shim: False reads no `.pth` file, so that nothing this patch installed is at work.
    """
    if shim:
        command = [sys.executable, "-P", "-c", "import torchvision"]
    else:
        folders = list(dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))
        command = [sys.executable, "-I", "-S", "-c", _PROBE, json.dumps(folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode} without a message"


def files(site: Path) -> tuple[Path, Path]:
    """The module and the `.pth` file that `install` writes into the folder `site`."""
    return site / f"{MODULE}.py", site / f"{MODULE}.pth"


def is_installed(site: Path | None = None) -> bool:
    """Whether both files are there, the module as it is in this repository."""
    module, pth = files(site or site_packages())
    return pth.is_file() and module.is_file() and module.read_bytes() == SHIM.read_bytes()


def inspect() -> State:
    """Try the import without and, where that fails, with the environment's `.pth` files (a few seconds each)."""
    bare = import_error(shim=False)
    return State(bare, import_error(shim=True) if bare else None, is_installed())


def mismatched() -> bool:
    """Whether torch is a CPU build and torchvision a CUDA build, told without importing torchvision."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or torch.version.cuda is not None or torch.version.hip is not None:
        return False
    text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    return re.search(r"\+cu\d", text) is not None


def install(site: Path | None = None) -> str:
    """Write the two files where they are needed; returns what was done in one line.

    Args:
        site: folder to write into; the running virtual environment's site-packages if None.

    Raises:
        UserError: not in a virtual environment.
        EnvironmentMismatch: torchvision fails by another cause, its version was not checked, or the shim did not help.
    """
    if sys.prefix == sys.base_prefix:
        raise UserError(
            f"{sys.executable} is not of a virtual environment, and this patch changes nothing else. Run: make setup"
        )
    target = site or site_packages()
    state = inspect()
    if state.bare_error is None:
        return "torchvision imports as it is; " + ("shim removed" if remove(target) else "nothing to do")
    fix = f"Run: {sys.executable} -m pip install {pin_of('torch').exact} {pin_of('torchvision').exact}"
    if not state.needed:
        raise EnvironmentMismatch(f"torchvision does not import, and not for want of nms: {state.bare_error}\n{fix}")
    version = metadata.version("torchvision")
    if compare(version, CHECKED) != 0:
        raise EnvironmentMismatch(f"torchvision {version}: this patch was checked with {CHECKED} only.\n{fix}")
    module, pth = files(target)
    fresh = not is_installed(target)
    shutil.copyfile(SHIM, module)
    pth.write_text(f"import {MODULE}; {MODULE}.activate()\n", encoding="utf-8")
    error = import_error(shim=True) if site is None else None
    if error is not None:
        remove(target)
        raise EnvironmentMismatch(f"torchvision fails with the shim too, so it was removed again: {error}\n{fix}")
    return f"shim {'installed' if fresh else 'is in place'}: {module}"


def remove(site: Path | None = None) -> bool:
    """Delete the two files; whether there were any."""
    found = [file for file in files(site or site_packages()) if file.exists()]
    for file in found:
        file.unlink()
    return bool(found)


def main(arguments: list[str]) -> int:
    """The command line."""
    try:
        match arguments:
            case ["check"]:
                state = inspect()
                print(f"torchvision shim: {state}")
                return 0 if state.ok else 1
            case ["install"]:
                print(f"torchvision: {install()}")
            case ["remove"]:
                print("torchvision: " + ("shim removed" if remove() else "no shim was there"))
            case _:
                print("usage: torchvision_cpu.py check | install | remove", file=sys.stderr)
                return 2
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
