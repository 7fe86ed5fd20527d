"""Whole runs: real verl on Ray with FSDP2 workers, on video prompts, with the micro recipe and a random tiny model.

Each run is a command as a user types it, and takes about a minute; the tests share what they can.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("verl")

REPOSITORY = Path(__file__).resolve().parents[2]
#: Small enough for a minute, large enough for two groups per step and a padded batch.
SMALL = [
    "data.train_batch_size=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=4",
    "data.val_max_samples=4",
    "data.max_response_length=40",
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "trainer.save_freq=2",
    "groups.low=0.0",  # a random model is never right
    "groups.high=1.0",
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with two worlds and latent checkpoints that open spans, one of them with a latent head."""
    from future_l1_plugin.data import make_world
    from future_l1_plugin.model import LatentConfig, load, make_tiny, save
    from future_l1_plugin.model.checkpoint import attach_head

    out = tmp_path_factory.mktemp("runs")
    make_world(out / "rl_world", test=32, train=0, perception=0, seed=1)
    make_world(out / "world", test=4, train=0, perception=0, seed=0)
    make_tiny(out / "tiny", seed=0)
    model, processor = load(out / "tiny", force_initial_latent_mode=True)  # a random model hardly ever opens a span
    save(model, processor, out / "latent" / "final")
    latent = LatentConfig.from_hf(model.config)
    latent.use_projection_head, latent.projection_head_type = True, "lvr"
    latent.to_hf(model.config)
    torch.manual_seed(1)
    attach_head(model, latent)
    save(model, processor, out / "with_head" / "final")
    return out


def command(out, *overrides, name="la_dapo_micro"):
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(REPOSITORY / "recipes")),
        *("--config-name", name, f"out={out}", f"hydra.run.dir={out}/hydra", *SMALL, *overrides),
    ]


def train(out, *overrides, fails=False, path=""):
    """Run to the end; the log. Raises AssertionError with the log's end if it fails (or does not, with `fails`).

    path: where Python finds modules of the user's, in this process and in Ray's.
    """
    env = environment() | {"PYTHONPATH": str(path)}
    done = subprocess.run(command(out, *overrides), env=env, capture_output=True, text=True, timeout=900)
    log = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, log[-6000:]
    return log


def environment():
    return os.environ | {"HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}


def metrics(out, run):
    """{step: metrics}; of a step that a resumed run repeats, the last."""
    lines = (out / run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["data"] for row in map(json.loads, lines)}


def comparable(step):
    """What must not change from run to run: everything but times, memory and speed."""
    timed = ("timing", "perf", "actor/perf", "throughput")
    return {key: value for key, value in step.items() if not key.startswith(timed) and "mfu" not in key}


@pytest.fixture(scope="module")
def first(out):
    """The run that others are compared with: 4 steps with vMF latents, two updates a step, a checkpoint at 2."""
    dumps = ["trainer.rollout_data_dir=${out}/first/rollouts", "trainer.validation_data_dir=${out}/first/validation"]
    train(out, *LONG, "trainer.project_name=${out}/first", *dumps)
    return metrics(out, "first")


LONG = ["trainer.total_training_steps=4", "actor_rollout_ref.actor.ppo_mini_batch_size=1", "trainer.save_freq=2"]


def test_rollout_and_actor_agree(first):
    for step in (1, 2, 3, 4):
        data = first[step]
        assert data["rollout_gap/text_max"] <= 1e-3
        assert data["rollout_gap/latent_max"] <= 1e-3
        assert data["actor/text/ratio_gap_first_max"] <= 1e-3
        assert data["actor/latent/ratio_gap_first_max"] <= 1e-3


def test_each_step_reports_what_a_user_looks_for(first):
    for name in (
        *("reward", "reward/accuracy", "reward/format", "reward/r_ctr", "reward/r_div"),
        *("latent/spans_per_response", "latent/latents_per_span", "latent/responses_with_span"),
        *("rollout_gap/text_mean", "rollout_gap/latent_mean", "actor/text/ratio", "actor/latent/ratio"),
        *("actor/text/clip_high", "actor/latent/clip_high", "actor/latent/clip_low", "actor/text/kl_ref"),
        *("actor/latent/kl_ref", "groups/filtered", "groups/accuracy", "groups/rounds", "actor/grad_norm"),
    ):
        assert isinstance(first[1][name], float | int), name
    assert first[1]["latent/responses_with_span"] > 0
    assert first[1]["pixels/prompts"] == 2, "the step's own; those of the validation before it are gone"
    assert any(key.startswith("val-core/futurebench/hop1/acc") for key in first[0])
    assert any(key.startswith("val-core/futurebench/hop1/acc") for key in first[2])


def test_rollouts_are_written_down_with_their_spans(out, first):
    for folder, count in (("rollouts", 8), ("validation", 4)):
        lines = [json.loads(line) for line in (out / "first" / folder / "2.jsonl").read_text().splitlines()]
        assert len(lines) == count
        for line in lines:
            assert line["output"].count("<|latent|>") == line["response_latents"]
            assert line["output"].count("<|latent_start|>") == line["response_spans"]
            assert line["response_latents"] < line["response_tokens"] <= 40
        assert sum(line["response_latents"] for line in lines) > 0


def test_the_latents_reference_moves_away_from_zero(first):
    assert first[1]["actor/latent/kl_ref"] == pytest.approx(0.0, abs=1e-4)
    assert first[3]["actor/latent/kl_ref"] > 0


def test_weights_are_saved_as_an_ordinary_latent_checkpoint(out, first):
    from future_l1_plugin.model import load

    start, _ = load(out / "latent" / "final", dtype=torch.float32)
    trained, processor = load(out / "first" / "global_step_4" / "actor" / "huggingface", dtype=torch.float32)
    assert "default_system" in processor.chat_template
    changed = [n for n, p in trained.named_parameters() if not torch.equal(p, start.get_parameter(n))]
    assert any("language_model.layers" in name for name in changed)
    assert not any("visual" in name for name in changed), "the vision tower is frozen"


def test_the_same_seed_gives_the_same_run_and_a_killed_one_goes_on(out, first):
    run = "trainer.project_name=${out}/second"
    log = out / "second.log"
    with log.open("w") as file:
        process = subprocess.Popen(command(out, *LONG, run), env=environment(), stdout=file, stderr=file)
    mark = out / "second" / "latest_checkpointed_iteration.txt"
    wait_for(lambda: mark.exists() and 3 in metrics(out, "second"), process)  # step 3 is lost with the process
    # As Ray's memory monitor does it, in the rollout of step 4, which begins with the log of step 3.
    workers = psutil.Process(process.pid).children(recursive=True)
    next(one for one in workers if "AgentLoopWorker" in " ".join(one.cmdline())).kill()
    assert process.wait(timeout=120) != 0
    said = r"RolloutError: (agent-loop worker 0 died: .*prompts are waited for: |an agent-loop worker died before its)"
    assert re.search(said, log.read_text())
    train(out, *LONG, run, "trainer.val_before_train=False")
    kept = [path.name for path in (out / "second").glob("global_step_*")]
    assert kept == ["global_step_4"], "max_actor_ckpt_to_keep is 1, over the resumption too"
    again = metrics(out, "second")
    assert set(again) == set(first) == {0, 1, 2, 3, 4}
    for step, data in again.items():
        assert comparable(data) == pytest.approx(comparable(first[step]), rel=1e-5, abs=1e-7, nan_ok=True), step


def wait_for(condition, process):
    for _ in range(1800):
        assert process.poll() is None, "the run ended by itself"
        try:
            if condition():
                return
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        time.sleep(0.2)
    raise AssertionError("waited in vain")


def test_two_ranks_lora_and_packing(out, tmp_path):
    """2 FSDP2 ranks over gloo, a rollout server each, LoRA, a batch that must be padded: 3 groups of 3 for 2 ranks."""
    from future_l1_plugin.model import load

    (tmp_path / "my_rewards.py").write_text("def odd(sample):\n    return float(sample.response_ids.sum() % 2)\n")
    rewards = "rewards=[{term: accuracy, weight: 0},{import_path: 'my_rewards:odd', weight: 1}]"
    train(
        out,
        *("trainer.project_name=${out}/two", "trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2"),
        *("data.train_batch_size=3", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=3"),
        *("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=True"),
        "actor_rollout_ref.model.path=${out}/with_head/final",
        # A reward that differs within a group and a large step: what the rollout's weights lack shows in its next gap.
        rewards,
        "actor_rollout_ref.actor.optim.lr=1e-3",
        path=tmp_path,
    )
    for step in (1, 2):
        data = metrics(out, "two")[step]
        assert data["actor/grad_norm"] > 0
        assert data["rollout_gap/latent_max"] <= 1e-4
        assert data["rollout_gap/text_max"] <= 1e-4
        assert data["actor/text/ratio_gap_first_max"] <= 1e-4
        assert data["actor/latent/ratio_gap_first_max"] <= 1e-4
    start, _ = load(out / "with_head" / "final", dtype=torch.float32)
    trained, _ = load(out / "two" / "global_step_2" / "actor" / "huggingface", dtype=torch.float32)
    changed = {n for n, p in trained.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    linear = r"projection_head\.mlp\..*weight|.*language_model\.layers\..*_proj\.weight|.*\.embed_tokens\.weight"
    assert changed == {n for n, _ in trained.named_parameters() if re.fullmatch(linear, n)}


def test_two_engines_two_ranks_and_prompts_that_fail(out, tmp_path):
    """Groups stay whole, on an engine each and on a rank each; pixels are put once a group and gone after the step.

    Four prompts fail and are replaced and named: a clip that does not decode, a prompt that is too long, and a request
    of each engine that it gives up. With the off-policy correction on, which has nothing to correct: both compute in
    float32. A gradient that is not finite, on one rank in the fifth step, stops both before the step is saved.
    """
    world = tmp_path / "world"
    shutil.copytree(out / "rl_world", world)
    questions = world / "futurebench.json"
    items = json.loads(questions.read_text())
    broken = world / "videos" / items[3]["video_path"].split("video_dataset/")[-1]
    damage(broken)
    items[6]["qa"]["Question"] += " Think of it once more." * 60
    questions.write_text(json.dumps(items))
    for file in ("verl_faults.py", "verl_faults_server.py"):
        shutil.copy(Path(__file__).with_name(file), tmp_path)
    log = train(
        out,
        *LONG,
        "algorithm.rollout_correction={rollout_is: token}",
        *("trainer.project_name=${out}/engines", "trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2"),
        *("data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=2"),
        *("trainer.val_before_train=False", "trainer.test_freq=-1"),
        *("trainer.total_training_steps=5", "trainer.save_freq=4"),
        *("data.shuffle=false", f"data.train_files=[{questions}]"),
        "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=verl_faults",
        path=tmp_path,
        fails=True,
    )
    assert re.search(r"NotFinite: step 5: .*actor/grad_norm nan.*Its prompts: \S", log)
    assert sorted(metrics(out, "engines")) == [1, 2, 3, 4]
    assert [path.name for path in (out / "engines").glob("global_step_*")] == ["global_step_4"]
    steps = [metrics(out, "engines")[step] for step in (1, 2, 3, 4)]
    for data in steps:
        assert data["rollout_gap/text_max"] <= 1e-4
        assert data["rollout_gap/latent_max"] <= 1e-4
        assert data["actor/text/ratio_gap_first_max"] <= 1e-4
        assert data["rollout/engines_per_group"] == 1
        assert data["actor/ranks_per_group"] == 1
        for name in ("text", "latent"):
            assert data[f"rollout_correction/{name}_mean"] == pytest.approx(1, abs=1e-4)
            assert data[f"rollout_correction/{name}_truncated"] == 0
    assert sum(data["groups/failed"] for data in steps) == 4
    for what in ("generation was aborted", broken.name, r"tokens, data.max_prompt_length is 256"):
        assert re.search(rf"prompt \S+ was dropped: .*{re.escape(what)}", log), what
    undisturbed = [data for data in steps if data["groups/rounds"] == 1]
    assert len(undisturbed) >= 2
    for data in undisturbed:
        assert data["pixels/prompts"] == 4
        assert data["rollout/busiest_engine"] == 0.5


def damage(clip):
    """Zeros in the second half of the frames; the header and the first frames stay sound."""
    data = bytearray(clip.read_bytes())
    box = data.index(b"mdat")
    size = int.from_bytes(data[box - 4 : box], "big") - 8
    data[box + 4 + size // 2 : box + 4 + size] = bytes(size - size // 2)
    clip.write_bytes(data)


def test_an_ablation_with_latents_in_the_loss(out):
    """`dapo_ctr`, in place of `dapo_div`. That all ablations are what they say is in test_verl_recipes."""
    train(out, "+ablations=dapo_ctr", "trainer.save_freq=-1", "trainer.val_before_train=False")
    data = metrics(out, "dapo_ctr")[2]
    assert data["rollout_gap/text_max"] <= 1e-3
    assert "reward/r_ctr" in data
    assert "reward/r_div" not in data


def test_an_ablation_without_latents_in_the_loss_and_a_reward_that_is_not_a_number(out, tmp_path):
    """`grpo`, in place of `text_only`; the demo runs `dapo`. In its second step a reward stops the run."""
    late = [item["id"] for item in json.loads((out / "rl_world" / "futurebench.json").read_text())[2:4]]
    code = f"def broken(sample):\n    return float('nan' if sample.sample_id in {late!r} else 0)\n"
    (tmp_path / "my_rewards.py").write_text(code)
    log = train(
        out,
        *("+ablations=grpo", "trainer.save_freq=-1", "trainer.val_before_train=False", "data.shuffle=false"),
        "rewards=[{term: accuracy, weight: 1},{import_path: 'my_rewards:broken', weight: 1}]",
        fails=True,
        path=tmp_path,
    )
    assert set(metrics(out, "grpo")) == {1}
    assert metrics(out, "grpo")[1]["rollout_gap/text_max"] <= 1e-3
    assert "RolloutError" in log
    assert "reward term 'broken'" in log
    assert "expected a finite number, found nan" in log
