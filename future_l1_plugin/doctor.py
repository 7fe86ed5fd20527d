"""`future-l1 doctor`: what this environment has, what the table of versions wants, and the commands that fix it.

`checks()` gathers facts, one `Check` a line; `report()` prints them. A wrong or missing package that the project itself
needs is a problem; a missing extra is not.
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from future_l1_plugin.compat import CORE, PINS, PYTHON, Pin, compare, easyr1_pins, installed, pip_command, verl_flavour
from future_l1_plugin.errors import EnvironmentMismatch

OK, NOTE, PROBLEM = "ok", "note", "problem"
LOW_DISK_GIB = 5
#: Come along with verl or vLLM; where their libraries do not load, packages that look for them break.
FRAGILE = ("torchcodec", "torchaudio")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    group: str  # "core", "extra" or "machine"
    name: str
    wanted: str
    found: str
    verdict: str = OK  # ok | note (nothing is broken by it) | problem
    fix: str = ""  # shell command


def check_pin(pin: Pin) -> Check:
    """Compare one row of the table with what is installed."""
    needed = CORE in pin.extras
    group = CORE if needed else "extra"
    label = ", ".join(f"[{e}]" for e in pin.extras) or "by hand"
    wanted = pin.supported if needed else f"{pin.supported}  {label}"
    found = installed(pin.name)
    if found is None:
        verdict = PROBLEM if needed else OK
        return Check(group, pin.name, wanted, "-", verdict, pip_command(pin) if needed else "")
    distribution, version = found
    if distribution != pin.name:
        return Check(group, pin.name, wanted, f"- ({distribution} in its place)")
    order = compare(version, pin.supported)
    if order == 0:
        return Check(group, pin.name, wanted, version)
    verdict = PROBLEM if needed else NOTE
    return Check(group, pin.name, wanted, f"{version}, too {'old' if order < 0 else 'new'}", verdict, pip_command(pin))


def _packages() -> Iterator[Check]:
    try:
        flavour = verl_flavour()
    except EnvironmentMismatch as error:
        flavour = "unknown"
        yield Check("extra", "verl", "upstream verl or EasyR1", str(error).splitlines()[0], NOTE)
    if flavour == "easyr1":
        yield Check("extra", "verl", "upstream verl or EasyR1", "EasyR1")
    for pin in easyr1_pins() if flavour == "easyr1" else PINS:
        if pin.name == "verl" and flavour == "unknown":
            continue
        check = check_pin(pin)
        if pin.name == "verl" and flavour == "verl":
            check = replace(check, found=f"{check.found} (upstream)")
        yield check


def _python() -> Check:
    version = platform.python_version()
    fine = compare(version, PYTHON) == 0
    where = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    fix = "" if fine else "make setup PYTHON=/usr/bin/python3.11"
    return Check("machine", "python", PYTHON, f"{version}, {where}", OK if fine else PROBLEM, fix)


def _device() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        fix = pip_command(*(p for p in PINS if p.name == "torch"))
        return Check("machine", "device", "torch imports", str(error), PROBLEM, fix)
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {gib:.0f} GiB, {bf16}"
    else:
        found = f"cpu, {torch.get_num_threads()} threads (torch {torch.__version__})"
    return Check("machine", "device", "", found)


def _torchvision() -> Check:
    from future_l1_plugin.patches import torchvision_cpu

    state = torchvision_cpu.inspect()
    fix = ""
    if not state.ok:
        script = Path(torchvision_cpu.__file__)
        fix = (
            f"{sys.executable} {script} install"
            if state.needed
            else pip_command(*(p for p in PINS if p.name in ("torch", "torchvision")))
        )
    verdict = OK if state.ok else PROBLEM
    return Check("machine", "torchvision shim", "torchvision imports", str(state), verdict, fix)


def _h264() -> Check:
    wanted = "FFmpeg with libx264 (through av)"
    fix = pip_command(*(p for p in PINS if p.name == "av")).replace("install", "install --force-reinstall --no-deps")
    try:
        import av
    except (ImportError, OSError) as error:
        return Check("machine", "video", wanted, str(error), PROBLEM, fix)
    release = ".".join(map(str, av.library_versions["libavcodec"]))
    if "libx264" not in av.codecs_available:
        return Check("machine", "video", wanted, f"libavcodec {release} without libx264", PROBLEM, fix)
    return Check("machine", "video", wanted, f"libavcodec {release}, libx264")


def _fragile() -> Iterator[Check]:
    for name in FRAGILE:
        found = installed(name)
        if found is None:
            continue
        # In a process of its own: a library that half loads would stay loaded in this one.
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False)
        if done.returncode == 0:
            yield Check("machine", name, "imports, or is absent", found[1])
        else:
            fix = f"{sys.executable} -m pip uninstall --yes {name}"
            yield Check("machine", name, "imports, or is absent", f"{found[1]}, does not import", PROBLEM, fix)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    verdict = OK if free >= LOW_DISK_GIB else NOTE
    return Check("machine", "disk", f"{LOW_DISK_GIB} GiB free in this folder", f"{free:.0f} GiB free", verdict)


def checks() -> Iterator[Check]:
    """Every check, in the order of the report. Takes some seconds: torch and torchvision are imported."""
    yield _python()
    yield _device()
    yield _torchvision()
    yield _h264()
    yield from _fragile()
    yield _disk()
    yield from _packages()


def report(found: list[Check]) -> int:
    """Print the table and the fixing commands; the exit code: 1 if there is a problem."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    marks = {OK: "[green]ok[/]", NOTE: "[yellow]note[/]", PROBLEM: "[red]wrong[/]"}
    titles = {"machine": "Machine", CORE: "Needed packages", "extra": "Optional packages"}
    for group, title in titles.items():
        table = Table(title=title, title_justify="left", expand=False)
        for column in ("", "wanted", "found", "ok?"):
            table.add_column(column, overflow="fold")
        for check in found:
            if check.group == group:
                absent = group == "extra" and check.found == "-"
                mark = "[dim]absent[/]" if absent else marks[check.verdict]
                table.add_row(check.name, escape(check.wanted), escape(check.found), mark)
        console.print(table)
    for verdict, heading in ((PROBLEM, "To fix:"), (NOTE, "If you use these:")):
        commands = [check.fix for check in found if check.verdict == verdict and check.fix]
        if commands:
            console.print(heading)
            for command in commands:
                console.print("  " + command, markup=False, highlight=False, soft_wrap=True)
    return 1 if any(check.verdict == PROBLEM for check in found) else 0
