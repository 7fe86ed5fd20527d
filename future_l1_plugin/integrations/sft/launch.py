"""Start the runs of an SFT recipe: scripts/sft.sh RECIPE [--dry-run [--gpu-memory GIB]] [key=value ..]

One run is one command, `python -m future_l1_plugin.integrations.sft.run`, under torchrun if there are several GPUs or
if DeepSpeed is asked for. A recipe with a `sweep` is several runs, one after the other; those that are done are passed
over, a broken-off one goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from future_l1_plugin.config import load_recipe
from future_l1_plugin.errors import ConfigError, UserError
from future_l1_plugin.integrations.sft.deepspeed import check_installed
from future_l1_plugin.integrations.sft.recipe import SftRecipe

RUN = "future_l1_plugin.integrations.sft.run"


@dataclass(frozen=True)
class Job:
    """One run: its resolved recipe, and what says so on a command line."""

    recipe: SftRecipe
    file: str
    overrides: tuple[str, ...]
    name: str  # KEY=VALUE in a sweep, else empty

    def command(self, gpus: int | None) -> list[str]:
        """The command of this run. gpus None: one process, on whatever device there is."""
        if gpus is None and not self.recipe.deepspeed:
            return [sys.executable, "-m", RUN, self.file, *self.overrides]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus or 1)]
        return [sys.executable, *torchrun, "-m", RUN, self.file, *self.overrides]


def jobs(file: str, overrides: Sequence[str] = ()) -> list[Job]:
    """The runs of a recipe, each checked whole.

    Raises:
        ConfigError: as `load_recipe`, for the recipe or for one of its sweep's values; `sweep.only` names none of them.
    """
    base = load_recipe(file, SftRecipe, overrides)
    sweep = base.sweep
    if sweep.key is None:
        return [Job(base, file, tuple(overrides), "")]
    wanted = sweep.values
    if sweep.only is not None:
        wanted = sweep.only if isinstance(sweep.only, list) else [sweep.only]
        if unknown := [value for value in wanted if value not in sweep.values]:
            raise ConfigError(f"{file}: sweep.only: expected one or more of {sweep.values}, found {unknown}")
    found = []
    for value in wanted:
        name = f"{sweep.key}={value}"
        point = [
            *overrides,
            f"{sweep.key}={json.dumps(value)}",
            f"output={base.output}/{name}",
            "sweep.key=null",
            "sweep.values=[]",
            "sweep.only=null",
        ]
        found.append(Job(load_recipe(file, SftRecipe, point), file, tuple(point), name))
    return found


def start(runs: list[Job], gpus: int | None) -> int:
    """Start them, one after the other; returns the first exit code that is not 0. A single run takes this process."""
    if len(runs) == 1 and not runs[0].name:
        command = runs[0].command(gpus)
        sys.stdout.flush()
        os.execv(command[0], command)
    for i, job in enumerate(runs):
        print(f"== run {i + 1} of {len(runs)}: {job.name} -> {job.recipe.output}", flush=True)
        if code := subprocess.run(job.command(gpus)).returncode:
            print(f"error: the run {job.name} ended with code {code}; the rest was not started", file=sys.stderr)
            return code
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/sft.sh", description="Latent SFT from a recipe.")
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/sft_micro.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. train.max_steps=20")
    parser.add_argument("--gpus", type=int, help="processes, one a GPU; scripts/sft.sh passes GPUS on")
    parser.add_argument("--gpu-memory", type=float, help="GiB of a GPU, for a dry run; else the one here")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and what it needs; load no weights")
    arguments = parser.parse_intermixed_args(argv)
    try:
        runs = jobs(arguments.recipe, arguments.overrides)
        if not arguments.dry_run:
            if arguments.gpu_memory is not None:
                raise ConfigError("--gpu-memory belongs to --dry-run: a run asks the GPUs")
            if runs[0].recipe.deepspeed and not runs[0].recipe.qwen_vl_finetune.path:
                check_installed("hf_trainer.deepspeed")  # here, not in each of the processes
            return start(runs, arguments.gpus)
        from future_l1_plugin.integrations.sft.fit import device_for_dry_run
        from future_l1_plugin.integrations.sft.plan import describe

        text, problem = describe(runs, arguments.gpus or 1, device_for_dry_run(arguments.gpu_memory))
        print(text, flush=True)
        if problem:
            raise ConfigError(problem)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
