"""Runs the parts of the self-test, each in a process of its own with its own time limit. Imports no torch."""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from future_l1_plugin.gpu_check import PARTS, Part
from future_l1_plugin.gpu_check.environment import ROOT
from future_l1_plugin.gpu_check.results import FAILED, SKIPPED, PartResult, table
from future_l1_plugin.journal import atomic_write


def run_part(part: Part, small: bool, limit: float, folder: Path) -> PartResult:
    """Start the part, wait at most `limit` seconds, end it and whatever it started, and read what it has found."""
    out = folder / "part.json"
    out.unlink(missing_ok=True)
    size = "small" if small else "full"
    command = [sys.executable, "-u", "-m", "future_l1_plugin.gpu_check.child", part.module, part.title, size, str(out)]
    begin = time.monotonic()
    # In the folder that holds the package, so that it is found there without being installed.
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        ended, late = process.wait(limit), False
    except subprocess.TimeoutExpired:
        late = True
    finally:
        end_group(process)
    result = PartResult.from_json(json.loads(out.read_text())) if out.exists() else PartResult(part.title)
    if late:
        result.verdict, result.reason = FAILED, f"ended at its time limit of {limit:g} s"
    elif ended:
        how = f"signal {signal.Signals(-ended).name}" if ended < 0 else f"exit code {ended}"
        result.verdict, result.reason = FAILED, f"its process died: {how}"
    result.seconds, result.limit = round(time.monotonic() - begin, 1), limit
    return result


def end_group(process: subprocess.Popen) -> None:
    """Kill the process and its children, which have a group of their own."""
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself, and nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    parts: Mapping[str, Part],
    out: Path,
    environment: dict[str, Any],
    small: bool,
    limit: float | None = None,
    asked: bool = False,
) -> int:
    """Run the parts in turn, write `out` after each, and return the exit code: 1 if any failed.

    Args:
        parts: by letter.
        out: JSON; see scripts/gpu_results/README.md.
        environment: what `environment.describe` returns.
        small: tiny shapes.
        limit: seconds for each part, in place of its own.
        asked: also run the parts that something else covers on a CPU.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {**environment, "size": "small" if small else "full", "seconds": 0.0, "parts": {}}
    print(f"{found['device']}, commit {found['commit'][:10]}, {found['size']} size. Results: {out}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for letter, part in parts.items():
            seconds = limit or (part.small_limit if small else part.limit)
            print(f"\n{letter}. {part.title} (at most {seconds:g} s)", flush=True)
            if part.covered and not asked and not environment["cuda"]:
                result = PartResult(part.title, SKIPPED, f"needs a CUDA device; on a CPU {part.covered} covers it")
            else:
                result = run_part(part, small, seconds, Path(folder))
            found["parts"][letter] = asdict(result)
            found["seconds"] = round(time.monotonic() - begin, 1)
            write(out, found)
            print(f"   {result.verdict} in {result.seconds:.0f} s. {result.reason}".rstrip(), flush=True)
    failed = [letter for letter, part in found["parts"].items() if part["verdict"] == FAILED]
    print(f"\n{found['seconds']:.0f} s. {'Failed: ' + ', '.join(failed) if failed else 'No part failed.'}")
    return 1 if failed else 0


def write(out: Path, found: dict[str, Any]) -> None:
    with atomic_write(out) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())


def look_around() -> dict[str, Any]:
    """`environment.describe`, from a process of its own."""
    command = [sys.executable, "-m", "future_l1_plugin.gpu_check.environment"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def default_out(environment: dict[str, Any]) -> Path:
    """scripts/gpu_results/CARD_DATE.json, and a file that git ignores where there is no card."""
    if not environment["cuda"]:
        return ROOT / "outputs" / "check_gpu.json"
    card = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return ROOT / "scripts" / "gpu_results" / f"{card}_{environment['date'][:10]}.json"


def main(arguments: list[str] | None = None) -> int:
    """The command line of scripts/check_gpu.py; returns the exit code."""
    listed = "\n".join(f"  {letter}  {part.title}" for letter, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=f"The GPU self-test. Parts:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None, metavar="PART", help="default: all")
    parser.add_argument("--small", action="store_true", help="tiny shapes; always so without a CUDA device")
    parser.add_argument("--out", type=Path, help="JSON; default: scripts/gpu_results/, without a card outputs/")
    parser.add_argument("--limit", type=float, help="seconds for each part in place of its own, for slower cards")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the Markdown table of a file and do no more")
    args = parser.parse_args(arguments)
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: through the `finally` that ends a part
    environment = look_around()
    small = args.small or not environment["cuda"]
    parts = {letter: PARTS[letter] for letter in args.parts or PARTS}
    out = args.out.resolve() if args.out else default_out(environment)
    return run(parts, out, environment, small, args.limit, asked=args.parts is not None)
