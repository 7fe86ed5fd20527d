"""Part f. Two steps of `recipes/la_dapo_micro` on unmodified verl: rollout, reference, actor, reward, weight sync.

A tiny random model that opens spans, on a micro world, float32, sdpa (no flash-attn), decoding by transformers. Rules:
the run ends; rollout and actor agree to 1e-3 nats on tokens and on latents in both steps, that is before and after a
weight sync; so do the actor's own two passes before its first update.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from future_l1_plugin.gpu_check.results import Recorder, Skip
from future_l1_plugin.paths import recipes_dir

STEPS = 2
AGREE = 1e-3
OVERRIDES = (
    "data.train_batch_size=2",
    "data.max_response_length=40",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=4",
    "groups.low=0.0",  # a random model is never right
    "groups.high=1.0",
    f"trainer.total_training_steps={STEPS}",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.val_before_train=False",
    "trainer.project_name=${out}/run",
)
#: What must agree, by the names of the metrics.
GAPS = ("rollout_gap/text_max", "rollout_gap/latent_max")
OWN = ("actor/text/ratio_gap_first_max", "actor/latent/ratio_gap_first_max")


def run(results: Recorder, setting) -> None:
    """Make model and data, run the command that a user types, read its metrics."""
    missing = [name for name in ("verl", "ray", "av") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"needs {', '.join(missing)}, not installed: pip install 'future_l1_plugin[verl]'")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prepare(out)
        command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(recipes_dir())]
        command += ["--config-name", "la_dapo_micro", f"out={out}", f"hydra.run.dir={out}/hydra", *OVERRIDES]
        if setting.cuda:
            command += ["trainer.device=cuda"]
        log = out / "log"
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            print(log.read_text()[-6000:], flush=True)
            raise RuntimeError(f"verl ended with exit code {code}; the end of its log is above")
        lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    steps = {row["step"]: row["data"] for row in map(json.loads, lines)}
    judge(results, steps)


def prepare(out: Path) -> None:
    """A micro world and a checkpoint whose responses open with a span."""
    from future_l1_plugin.data import make_world
    from future_l1_plugin.model import load, make_tiny, save

    make_world(out / "rl_world", test=16, train=0, perception=0, seed=1, progress=False)
    make_world(out / "world", test=4, train=0, perception=0, seed=0, progress=False)
    make_tiny(out / "tiny", seed=0)
    save(*load(out / "tiny", force_initial_latent_mode=True), out / "latent" / "final")


def judge(results: Recorder, steps: dict[int, dict[str, float]]) -> None:
    """The gaps of each step, and what a step took."""
    for step in range(1, STEPS + 1):
        found = {name.split("/")[1].removesuffix("_max"): steps[step][name] for name in GAPS}
        results.number(f"step {step}: |rollout - actor|, largest", found, "nats", AGREE)
        own = {name.split("/")[1]: steps[step][name] for name in OWN}
        results.number(f"step {step}: |actor's ratio - 1| before an update, largest", own, "", AGREE)
    results.check("latents were rolled out", steps[STEPS]["latent/responses_with_span"] > 0)
    results.number("a step, the second", steps[STEPS]["timing_s/step"], "s")
