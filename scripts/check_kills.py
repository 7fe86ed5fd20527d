#!/usr/bin/env python
"""Kill a training run again and again, start it by the same command, and see that it ends where an unbroken one does.

    python scripts/check_kills.py sft|rl OUT [--kills step save rollout worker] [--seed 0] [--steps N]

sft   latent SFT on two processes (gloo on a CPU), a tiny random model on the micro world
rl    LA-DAPO on verl: two ranks, a rollout engine each

Each word of --kills is one kill of the one run, in this order:
    step      every process of the run, at a random moment of the step after the newest that was logged
    save      every process, at a random moment while a checkpoint is written
    rollout   every process, in a rollout (RL only)
    worker    one process alone: a rank of SFT, or an agent loop of RL; the run itself has to end, and say why

Prints a line a kill (what was killed, after which step, what the next start went on from) and at the end the greatest
difference of any weight from the unbroken run's. Exit code 1 if that is above 1e-6, if a run that lost a worker does
not end within --patience seconds, or if a start fails. Moments are random but for --seed; what they hit is not.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-6
#: Seconds in which a moment is drawn after its sign was seen.
WITHIN = {"step": 1.0, "save": 0.3, "rollout": 1.0, "worker": 1.0}
RL_SMALL = (
    *("trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2", "actor_rollout_ref.rollout.n=4"),
    *("data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "data.max_response_length=40"),
    *("groups.low=0.0", "groups.high=1.0", "trainer.val_before_train=false", "trainer.test_freq=-1"),
    *("trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=2"),
)


@dataclass
class Host:
    """How a run is started, and what it leaves on the disk."""

    name: str
    command: Callable[[Path], list[str]]  # of a run that writes to this folder
    saves: str  # pattern of the folders of checkpoints, below the run's
    final: Callable[[Path], Path]  # folder of the weights it ends with
    workers: str  # a part of the command line of a process that may die alone
    resumed: str  # pattern of the line that says what a start went on from


def prepare(out: Path) -> None:
    """The worlds and a random model that opens spans. Kept if it is there."""
    from future_l1_plugin.data import make_world
    from future_l1_plugin.model import load, make_tiny, save

    make_world(out / "world", test=4, train=48, perception=0, seed=0)
    make_world(out / "rl_world", test=32, train=0, perception=0, seed=1)
    if not (out / "latent" / "final" / "config.json").exists():
        make_tiny(out / "tiny", seed=0)
        model, processor = load(out / "tiny", force_initial_latent_mode=True)
        save(model, processor, out / "latent" / "final")


def sft(out: Path, steps: int) -> Host:
    def command(run: Path) -> list[str]:
        data = [f"data.records={out}/world/sft.json", f"data.videos={out}/world/videos"]
        batch = ["train.batch_size=8", "train.micro_batch_size=4", "log.save_every=2", "log.keep=1", "log.every=1"]
        launch = [sys.executable, "-m", "future_l1_plugin.integrations.sft.launch", "--gpus", "2"]
        recipe = [str(REPOSITORY / "recipes/sft_micro.yaml"), f"model={out}/latent/final", f"output={run}"]
        return [*launch, *recipe, *data, *batch, f"train.max_steps={steps}", "log.tensorboard=false"]

    return Host(
        "sft",
        command,
        "checkpoints/checkpoint-*",
        lambda run: run / "final",
        "integrations.sft.run",
        r"resuming from .*",
    )


def rl(out: Path, steps: int) -> Host:
    def command(run: Path) -> list[str]:
        recipe = ["--config-dir", str(REPOSITORY / "recipes"), "--config-name", "la_dapo_micro", f"out={out}"]
        places = [f"hydra.run.dir={out}/hydra", f"trainer.project_name={run}", f"trainer.total_training_steps={steps}"]
        return [sys.executable, "-m", "verl.trainer.main_ppo", *recipe, *places, *RL_SMALL]

    final = lambda run: run / f"global_step_{steps}" / "actor" / "huggingface"  # noqa: E731
    return Host("rl", command, "global_step_*", final, "ray::LatentAgentLoopWorker", r"(?i)resum\w* from .*")


class Run:
    """A started run: its processes, its log, and the steps that it has logged."""

    def __init__(self, host: Host, folder: Path, number: int) -> None:
        self.host, self.folder = host, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{folder.name}.{number}.log"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                host.command(folder), env=environment, stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True
            )

    def step(self) -> int:
        """The newest step in the metrics; -1 for none."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        steps = [int(found[1]) for line in lines if (found := re.match(r'\{"step": ?(\d+)', line))]
        return max(steps, default=-1)

    def checkpoints(self) -> set[str]:
        return {folder.name for folder in self.folder.glob(self.host.saves)}

    def family(self) -> list[psutil.Process]:
        """Every process of the run, Ray's among them."""
        return [self.process_, *self.process_.children(recursive=True)]

    @property
    def process_(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def kill(self) -> None:
        family = self.family()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)
        self.process.wait()

    def kill_worker(self) -> str:
        """Kill one process that can die alone; returns what it was."""
        found = [p for p in self.family() if self.host.workers in " ".join(p.cmdline()) and p.pid != self.process.pid]
        if self.host.name == "sft":  # torchrun's own command line names the module, too
            found = [p for p in found if "torch.distributed.run" not in p.cmdline()]
        victim = found[-1]
        name = " ".join(victim.cmdline())[:60]
        victim.send_signal(signal.SIGKILL)
        return name

    def said(self) -> str:
        """What the start said it went on from."""
        lines = re.findall(rf"{self.host.resumed}", self.log.read_text(errors="replace"))
        return lines[0][:100] if lines else "nothing: a start from the beginning"


def wait_for(run: Run, sign: Callable[[], bool], patience: float) -> None:
    """Until `sign`. Raises SystemExit if the run ends before, or nothing happens."""
    end = time.monotonic() + patience
    while not sign():
        if run.process.poll() is not None:
            raise SystemExit(f"the run ended by itself (code {run.process.returncode}), see {run.log}")
        if time.monotonic() > end:
            run.kill()
            raise SystemExit(f"waited {patience:.0f} s in vain, see {run.log}")
        time.sleep(0.002)


def kill_once(run: Run, kind: str, chance: random.Random, patience: float) -> dict:
    """Wait for the moment, kill, and tell. Raises SystemExit as `wait_for`, or if a run outlives its worker."""
    before, seen = run.step(), run.checkpoints()
    if kind == "save":
        wait_for(run, lambda: bool(run.checkpoints() - seen), patience)
    else:
        wait_for(run, lambda: run.step() > before, patience)
    time.sleep(chance.uniform(0, WITHIN[kind]))
    told = {"kill": kind, "after_step": run.step(), "said_at_start": run.said()}
    if kind == "worker":
        told["victim"] = run.kill_worker()
        start = time.monotonic()
        try:
            told["exit_code"] = run.process.wait(patience)
        except subprocess.TimeoutExpired:
            run.kill()
            raise SystemExit(
                f"the run still waits {patience:.0f} s after it lost {told['victim']}, see {run.log}"
            ) from None
        told["ended_after_s"] = round(time.monotonic() - start, 1)
        if told["exit_code"] == 0:
            raise SystemExit(f"the run lost {told['victim']} and ended with code 0, see {run.log}")
    else:
        run.kill()
    return told


def finish(run: Run, patience: float) -> None:
    if run.process.wait(patience):
        raise SystemExit(f"the run ended with code {run.process.returncode}, see {run.log}")


def difference(a: Path, b: Path) -> float:
    """The greatest difference of a weight between two checkpoints, both whole."""
    from safetensors.torch import load_file

    one, other = ({k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (a, b))
    if not one or set(one) != set(other):
        raise SystemExit(f"{a} and {b} do not hold the same weights")
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=("sft", "rl"))
    parser.add_argument("out", type=Path, help="folder for worlds, runs and logs")
    parser.add_argument(
        "--kills", nargs="+", choices=tuple(WITHIN), help="default: step save worker step (rollout in RL)"
    )
    parser.add_argument(
        "--steps", type=int, help="of training (default: two more than there are kills, doubled in SFT)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for a step, a save or an end")
    arguments = parser.parse_args()
    kills = arguments.kills or ["step", "save", "worker", "rollout" if arguments.host == "rl" else "save"]
    out = arguments.out.resolve()
    prepare(out)
    steps = arguments.steps or (len(kills) + 2) * (2 if arguments.host == "sft" else 1)
    host = {"sft": sft, "rl": rl}[arguments.host](out, steps)
    chance = random.Random(arguments.seed)

    unbroken = out / f"{host.name}_unbroken"
    if not host.final(unbroken).exists():
        finish(Run(host, unbroken, 0), arguments.patience)
    broken = out / f"{host.name}_killed_{arguments.seed}"
    for number, kind in enumerate(kills):
        print(json.dumps(kill_once(Run(host, broken, number), kind, chance, arguments.patience)), flush=True)
    last = Run(host, broken, len(kills))
    finish(last, arguments.patience)
    gap = difference(host.final(unbroken), host.final(broken))
    print(json.dumps({"last_start": last.said(), "kills": len(kills), "greatest_difference": gap}), flush=True)
    return int(gap > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
