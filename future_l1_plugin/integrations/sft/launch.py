"""Start the runs of an SFT recipe: scripts/sft.sh RECIPE [--dry-run [--gpu-memory GIB]] [key=value ..]

One run is one command, `python -m future_l1_plugin.integrations.sft.run`, under torchrun if there are several GPUs or
if DeepSpeed is asked for. A recipe with a `sweep` is several runs, one after the other; those that are done are passed
over, a broken-off one goes on where it was. On several machines the same is started on each; `output` must lie where
all of them see it.
"""

import argparse
import os
import subprocess
import sys

from future_l1_plugin.errors import ConfigError, UserError
from future_l1_plugin.integrations.sft.deepspeed import check_installed
from future_l1_plugin.integrations.sft.fit import device_for_dry_run
from future_l1_plugin.integrations.sft.jobs import ONE, Job, jobs
from future_l1_plugin.integrations.sft.nodes import Nodes
from future_l1_plugin.integrations.sft.plan import describe


def start(runs: list[Job], gpus: int | None, nodes: Nodes = ONE) -> int:
    """Start them, one after the other; returns the first exit code that is not 0. A single run takes this process."""
    if len(runs) == 1 and not runs[0].name:
        command = runs[0].command(gpus, nodes)
        sys.stdout.flush()
        os.execv(command[0], command)
    for i, job in enumerate(runs):
        print(f"== run {i + 1} of {len(runs)}: {job.name} -> {job.recipe.output}", flush=True)
        if code := subprocess.run(job.command(gpus, nodes)).returncode:
            print(f"error: the run {job.name} ended with code {code}; the rest was not started", file=sys.stderr)
            return code
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/sft.sh", description="Latent SFT from a recipe.")
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/sft_micro.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. train.max_steps=20")
    parser.add_argument("--gpus", type=int, help="processes on each machine, one a GPU; scripts/sft.sh passes GPUS on")
    parser.add_argument("--nnodes", type=int, help="machines (NNODES); the same command on each, but for its rank")
    parser.add_argument("--node-rank", type=int, help="which of them this is, from 0 (NODE_RANK)")
    parser.add_argument("--master-addr", help="where all reach node 0 (MASTER_ADDR)")
    parser.add_argument("--master-port", type=int, help="and at which port (MASTER_PORT); 29500 if left out")
    parser.add_argument("--gpu-memory", type=float, help="GiB of a GPU, for a dry run; else the one here")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and what it needs; load no weights")
    arguments = parser.parse_intermixed_args(argv)
    try:
        nodes = Nodes.of(arguments.nnodes, arguments.node_rank, arguments.master_addr, arguments.master_port)
        if arguments.gpus is not None and arguments.gpus < 1:
            raise ConfigError(f"--gpus (GPUS): expected at least 1, found {arguments.gpus}")
        runs = jobs(arguments.recipe, arguments.overrides)
        if not arguments.dry_run:
            if arguments.gpu_memory is not None:
                raise ConfigError("--gpu-memory belongs to --dry-run: a run asks the GPUs")
            if runs[0].recipe.deepspeed and not runs[0].recipe.qwen_vl_finetune.path:
                check_installed("hf_trainer.deepspeed")  # here, not in each of the processes
            for job in runs:
                job.recipe.accumulation((arguments.gpus or 1) * nodes.count)
            return start(runs, arguments.gpus, nodes)

        text, problem = describe(runs, arguments.gpus or 1, device_for_dry_run(arguments.gpu_memory), nodes)
        print(text, flush=True)
        if problem:
            raise ConfigError(problem)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
