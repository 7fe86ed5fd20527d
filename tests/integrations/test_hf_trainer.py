"""SFT on transformers.Trainer, through the command: what it writes, that it repeats itself, and what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from future_l1_plugin.data import make_world
from future_l1_plugin.integrations.hf_trainer import host as host_module
from future_l1_plugin.integrations.sft.run import main
from future_l1_plugin.model import LatentConfig, load

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=0, train=32, seed=0, progress=False)


def write_recipe(path: Path, model, world, **sections) -> Path:
    """4 steps over 32 records, 8 a step in two passes of 4."""
    recipe = {
        "model": str(model),
        "output": str(path.parent / path.stem),
        "data": {
            "records": str(world.sft),
            "videos": str(world.videos),
            "question_media": "video",
            "max_length": 512,
            "workers": 0,
        },
        "train": {
            "max_steps": 4,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "seed": 3,
        },
        "eval": {"prompts": 0},
        "log": {"every": 1, "save_every": 2, "tensorboard": False},
    }
    for section, values in sections.items():
        recipe[section] = recipe.get(section, {}) | values if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(path: Path, model, world, *overrides: str, **sections) -> Path:
    """Run the command in this process; returns the output folder."""
    recipe = write_recipe(path, model, world, **sections)
    assert main([str(recipe), *overrides]) == 0
    return path.parent / path.stem


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> dict[int, tuple[float, float]]:
    """{step: (ce_loss, latent_loss)}; each step must be there once."""
    steps = [row for row in rows(output) if "loss" in row]
    assert len({row["step"] for row in steps}) == len(steps)
    return {row["step"]: (row["ce_loss"], row["latent_loss"]) for row in steps}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], rtol=0, atol=TOLERANCE) for name in first)


def assert_same_losses(one, other) -> None:
    assert one.keys() == other.keys()
    for step, values in one.items():
        assert values == pytest.approx(other[step], abs=TOLERANCE), f"step {step}"


@pytest.fixture(scope="module")
def unbroken(tiny_path, world, tmp_path_factory):
    """The run that others are compared with, started as a user starts it."""
    recipe = write_recipe(tmp_path_factory.mktemp("unbroken") / "run.yaml", tiny_path, world, log={"tensorboard": True})
    script = Path(__file__).resolve().parents[2] / "scripts" / "sft.sh"
    environment = os.environ | {"VENV": sys.prefix, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([script, str(recipe)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "run"


# ---- what a run writes ----------------------------------------------------------------------------------------------


def test_both_losses_are_logged_at_each_step(unbroken):
    found = losses(unbroken)
    assert sorted(found) == [1, 2, 3, 4]
    assert all(math.isfinite(value) and value > 0 for pair in found.values() for value in pair)
    assert found[4][0] < found[1][0]
    for row in rows(unbroken):
        if "loss" in row:  # 0.1 is the checkpoint's lambda
            assert row["loss"] == pytest.approx(row["ce_loss"] + 0.1 * row["latent_loss"], abs=2e-4)
            assert {"learning_rate", "grad_norm", "epoch"} <= row.keys()
    assert rows(unbroken)[-1]["train_runtime"] > 0


def test_the_final_checkpoint_loads(unbroken, tiny_path):
    model, processor = load(unbroken / "final")
    assert LatentConfig.from_hf(model.config).max_latent_token == 4
    assert processor.tokenizer.padding_side == "left"
    assert not same_weights(unbroken / "final", tiny_path)
    assert sorted(file.name for file in (unbroken / "final").iterdir()) == sorted(
        file.name for file in tiny_path.iterdir()
    )


def test_the_vision_tower_does_not_change(unbroken, tiny_path):
    before, after = weights(tiny_path), weights(unbroken / "final")
    vision = [name for name in before if ".visual." in name]
    assert len(vision) > 20
    assert all(torch.equal(before[name], after[name]) for name in vision)
    changed = [name for name in before if ".visual." not in name and not torch.equal(before[name], after[name])]
    assert len(changed) == len(before) - len(vision)


def test_tensorboard_files_and_the_resolved_recipe(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(unbroken / "tensorboard"))
    events.Reload()
    assert {"train/ce_loss", "train/latent_loss", "train/loss"} <= set(events.Tags()["scalars"])
    logged = {event.step: event.value for event in events.Scalars("train/ce_loss")}
    assert logged == pytest.approx({step: pair[0] for step, pair in losses(unbroken).items()})
    saved = yaml.safe_load((unbroken / "recipe.yaml").read_text())
    assert saved["train"]["seed"] == 3
    assert saved["train"]["warmup_ratio"] == 0.1
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_warmup_is_a_share_of_the_steps(tiny_path, world, tmp_path):
    keys = ("train.warmup_ratio=0.5", "train.schedule=constant_with_warmup", "train.batch_size=4", "log.save_every=0")
    output = train(tmp_path / "run.yaml", tiny_path, world, *keys)
    rates = [row["learning_rate"] for row in rows(output) if "loss" in row]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3])  # two of four steps
    assert not (output / "checkpoints").exists() or not list((output / "checkpoints").iterdir())


# ---- it learns, and repeats itself ----------------------------------------------------------------------------------


def test_both_losses_fall_on_one_batch(tiny_path, world, tmp_path):
    records = json.loads(world.sft.read_text())[:4]
    (tmp_path / "four.json").write_text(json.dumps(records))
    output = train(
        tmp_path / "run.yaml",
        tiny_path,
        world,
        data={"records": str(tmp_path / "four.json"), "cache_mb": 8},
        latent={"weight": 1.0},
        train={"max_steps": 30, "batch_size": 4, "learning_rate": 3e-3},
        log={"save_every": 0},
    )
    found = losses(output)
    assert found[30][0] < 0.3 * found[1][0]
    assert found[30][1] < 0.6 * found[1][1]


def test_the_same_seed_gives_the_same_run(tiny_path, world, unbroken, tmp_path):
    output = train(tmp_path / "run.yaml", tiny_path, world)
    assert_same_losses(losses(output), losses(unbroken))
    assert same_weights(output / "final", unbroken / "final")
    other = train(tmp_path / "other.yaml", tiny_path, world, "train.seed=4", "train.max_steps=1")
    assert losses(other)[1] != pytest.approx(losses(unbroken)[1], abs=1e-3)


KILLED = """
import os, signal, sys
from future_l1_plugin.integrations.sft import run, trainer

def kill(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.JsonlLog.on_step_begin = kill  # at the fourth step: the third is in the log, the second in a checkpoint
run.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(tiny_path, world, unbroken, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "run.yaml", tiny_path, world)
    output = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert sorted(losses(output)) == [1, 2, 3]
    assert [folder.name for folder in (output / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (output / "final").exists()
    marked = "".join(json.dumps(row | {"first run": True}) + "\n" for row in rows(output))
    (output / "metrics.jsonl").write_text(marked + '{"step": 4, "lo')  # half a line, as a kill may leave
    assert main([str(recipe)]) == 0
    assert "resuming from" in capsys.readouterr().out
    assert_same_losses(losses(output), losses(unbroken))
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 4]  # the summary is the last
    assert [row["step"] for row in rows(output) if "first run" in row] == [1, 2]  # and these were not run again
    assert same_weights(output / "final", unbroken / "final")


def test_gradient_checkpointing_changes_no_loss(tiny_path, world, unbroken, tmp_path):
    output = train(tmp_path / "run.yaml", tiny_path, world, "train.gradient_checkpointing=true")
    assert_same_losses(losses(output), losses(unbroken))


def test_packing_changes_no_loss(tiny_path, world, unbroken, tmp_path):
    """Passes of four samples without padding: the same run up to rounding."""
    output = train(tmp_path / "run.yaml", tiny_path, world, "train.packing=true", "log.save_every=0")
    assert losses(output).keys() == losses(unbroken).keys()
    for step, values in losses(output).items():
        assert values == pytest.approx(losses(unbroken)[step], abs=1e-4), f"step {step}"


def test_accumulating_equals_one_large_batch(tiny_path, world, unbroken, tmp_path):
    """2 x 4 against 1 x 8 in the same order. Each pass is a mean over its own tokens, so the two agree only as far as
    the passes have equally many; a loss that was not divided by the passes would be twice as large."""
    output = train(tmp_path / "run.yaml", tiny_path, world, "train.micro_batch_size=8", "train.max_steps=1")
    assert losses(output)[1] == pytest.approx(losses(unbroken)[1], rel=0.02)
    gradient = [next(row for row in rows(folder) if "loss" in row)["grad_norm"] for folder in (output, unbroken)]
    assert gradient[0] == pytest.approx(gradient[1], rel=0.1)


# ---- variants -------------------------------------------------------------------------------------------------------


def test_lora_trains_lora_only_and_is_merged(tiny_path, world, tmp_path, monkeypatch):
    trained = {}
    original = host_module.with_lora

    def with_lora(model, *how):
        wrapped = original(model, *how)
        trained.update({name: p.requires_grad for name, p in wrapped.named_parameters()})
        return wrapped

    monkeypatch.setattr(host_module, "with_lora", with_lora)
    output = train(tmp_path / "run.yaml", tiny_path, world, "train.lora.rank=4", "train.max_steps=3")
    learning = {name for name, learns in trained.items() if learns}
    assert learning == {name for name in trained if "lora_" in name or "trainable_tokens_delta" in name}
    assert len(learning) == 2 * 7 * 4 + 1  # A and B of seven projections in four layers; the rows of three tokens
    before, after = weights(tiny_path), weights(output / "final")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 7 * 4 + 1
    (embedding,) = (name for name in changed if "_proj" not in name)
    ids = LatentConfig.from_hf(load(output / "final")[0].config).tokens.ids
    assert (before[embedding] != after[embedding]).any(1).nonzero()[:, 0].tolist() == list(ids)


def test_a_lora_run_resumes(tiny_path, world, tmp_path):
    whole = train(tmp_path / "whole.yaml", tiny_path, world, "train.lora.rank=4")
    parted = train(tmp_path / "parted.yaml", tiny_path, world, "train.lora.rank=4")
    shutil.rmtree(parted / "final")
    shutil.rmtree(parted / "checkpoints" / "checkpoint-4")
    assert main([str(tmp_path / "parted.yaml"), "train.lora.rank=4"]) == 0
    assert_same_losses(losses(parted), losses(whole))
    assert same_weights(parted / "final", whole / "final")


def test_text_only(tiny_path, world, tmp_path):
    output = train(tmp_path / "run.yaml", tiny_path, world, "data.spans=false", "train.max_steps=2")
    found = losses(output)
    assert [pair[1] for pair in found.values()] == [0.0, 0.0]
    assert found[2][0] > 0


def test_latent_keys_of_the_recipe_reach_loss_and_checkpoint(tiny_path, world, tmp_path):
    output = train(
        tmp_path / "run.yaml",
        tiny_path,
        world,
        "latent.loss=cosine",
        "latent.weight=0.5",
        "latent.train_fixed_latent_budget=2",
        "latent.max_latent_token=16",
        "train.max_steps=1",
        "data.question_media=images",
    )
    (row,) = [row for row in rows(output) if "loss" in row]
    assert 0 < row["latent_loss"] < 2
    assert row["loss"] == pytest.approx(row["ce_loss"] + 0.5 * row["latent_loss"], abs=2e-4)
    config = json.loads((output / "final" / "config.json").read_text())
    kept = {
        key: config[key] for key in ("latent_loss", "latent_lambda", "train_fixed_latent_budget", "max_latent_token")
    }
    assert list(kept.values()) == ["cosine", 0.5, 2, 16]


def test_own_latents(tiny_path, world, unbroken, tmp_path):
    """Other losses than under teacher forcing, the same again with the same seed, also when a run goes on half-way."""
    keys = ("latent.own_share=0.5", "latent.own_passes=2", "latent.own_mean_cosine=0.9")
    whole = train(tmp_path / "whole.yaml", tiny_path, world, *keys)
    assert losses(whole)[1] != pytest.approx(losses(unbroken)[1], abs=1e-4)
    parted = train(tmp_path / "parted.yaml", tiny_path, world, *keys)
    assert_same_losses(losses(parted), losses(whole))
    shutil.rmtree(parted / "final")
    shutil.rmtree(parted / "checkpoints" / "checkpoint-4")
    assert main([str(tmp_path / "parted.yaml"), *keys]) == 0
    assert_same_losses(losses(parted), losses(whole))
    assert same_weights(parted / "final", whole / "final")
    other = train(tmp_path / "other.yaml", tiny_path, world, *keys[:2], "latent.own_mean_cosine=0.5")
    assert losses(other)[1] != pytest.approx(losses(whole)[1], abs=1e-5)


def test_each_pass_draws_its_own_rows(tiny_path, world, tmp_path, monkeypatch):
    """Two passes a step, four steps: eight draws that differ, and none that repeats another seed's."""
    from future_l1_plugin.integrations.sft import trainer

    drawn = []

    def losses_of(model, config, batch, own, generator, *more):
        drawn.append(float(torch.rand((), generator=torch.Generator().set_state(generator.get_state()))))
        return sft_losses(model, config, batch, own, generator, *more)

    sft_losses = trainer.sft_losses
    monkeypatch.setattr(trainer, "sft_losses", losses_of)
    train(tmp_path / "one.yaml", tiny_path, world, "latent.own_share=0.5", "latent.own_passes=1")
    train(tmp_path / "two.yaml", tiny_path, world, "latent.own_share=0.5", "latent.own_passes=1", "train.seed=4")
    assert len(drawn) == len(set(drawn)) == 16


@pytest.mark.parametrize("keys", [("train.lora.rank=4",), ("train.gradient_checkpointing=true",)])
def test_own_latents_under_lora_and_checkpointing(tiny_path, world, tmp_path, keys):
    own = ("latent.own_share=1.0", "latent.own_passes=2", "train.max_steps=1", "log.save_every=0")
    plain = train(tmp_path / "plain.yaml", tiny_path, world, *own)
    output = train(tmp_path / "run.yaml", tiny_path, world, *own, *keys)  # LoRA starts at the base's function
    assert_same_losses(losses(output), losses(plain))


def test_own_latents_in_bf16(tiny_path, world, tmp_path):
    """A pass without gradient must leave no weights behind, cast without gradient, that the pass with it would use."""
    keys = ("latent.own_share=1.0", "latent.own_passes=2", "train.max_steps=1", "log.save_every=0")
    full = train(tmp_path / "full.yaml", tiny_path, world, *keys)
    half = train(tmp_path / "half.yaml", tiny_path, world, *keys, "train.precision=bf16")
    assert losses(half)[1] == pytest.approx(losses(full)[1], rel=0.02)
    norms = [next(row["grad_norm"] for row in rows(folder) if "loss" in row) for folder in (half, full)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_text_only_makes_no_passes_for_latents(tiny_path, world, tmp_path, monkeypatch):
    def no_passes(*args):
        raise AssertionError("own latents of a text-only run")

    monkeypatch.setattr("future_l1_plugin.model.objective.own_latents", no_passes)
    train(tmp_path / "run.yaml", tiny_path, world, "data.spans=false", "latent.own_share=1.0", "train.max_steps=1")


def test_bf16(tiny_path, world, unbroken, tmp_path):
    output = train(tmp_path / "run.yaml", tiny_path, world, "train.precision=bf16", "train.max_steps=2")
    first = losses(output)[1]
    assert first == pytest.approx(losses(unbroken)[1], rel=0.02)
    assert first != losses(unbroken)[1]
    assert {tensor.dtype for tensor in weights(output / "final").values()} == {torch.float32}


# ---- two processes --------------------------------------------------------------------------------------------------


def start_two(path: Path, model, world, *overrides: str, **sections) -> Path:
    """A run in two processes over gloo, started as a user starts it on two GPUs; returns the output folder."""
    recipe = write_recipe(path, model, world, **sections)
    command = [sys.executable, "-m", "future_l1_plugin.integrations.sft.launch", str(recipe), "--gpus", "2", *overrides]
    said = path.with_suffix(".log")
    with said.open("w") as file:
        run = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, start_new_session=True
        )
    try:
        code = run.wait(timeout=300)
    finally:
        if run.poll() is None:  # ranks that wait for each other
            os.killpg(run.pid, signal.SIGKILL)
    assert code == 0, said.read_text()[-3000:]
    return path.parent / path.stem


@pytest.fixture(scope="module")
def unlike(world, tmp_path_factory) -> Path:
    """Records of which every second one shows nothing, neither in its question nor as a future."""
    records = json.loads(world.sft.read_text())
    for record in records[::2]:
        record["image"], record["reasoning_image"] = [], []
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "")
    file = tmp_path_factory.mktemp("unlike") / "unlike.json"
    file.write_text(json.dumps(records))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("how", ["zero3", "zero2", "lora"])
def test_two_processes_give_the_run_of_one(world, unlike, tmp_path, how):
    """Same losses and weights, with a latent head, own latents and records that differ. Without DeepSpeed: see
    test_sft_two_processes.py."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    from future_l1_plugin.model import convert, make_tiny

    base = make_tiny(tmp_path / "base", latent=False)
    model = convert(base, tmp_path / "model", use_projection_head=True, projection_head_type="lvr")
    data = {"records": str(unlike), "question_media": "images"}
    keys = ["train.micro_batch_size=1", "train.max_grad_norm=0.5", "latent.own_share=1.0", "latent.own_passes=2"]
    keys += ["train.max_steps=3", "train.lora.rank=4"] if how == "lora" else ["train.max_steps=3"]
    plain = train(tmp_path / "plain.yaml", model, world, *keys, data=data)
    stage = {"lora": "zero3"}.get(how, how)
    output = start_two(tmp_path / "run.yaml", model, world, *keys, f"hf_trainer.deepspeed={stage}", data=data)
    if how == "zero3":  # and it goes on from a checkpoint of two parts
        shutil.rmtree(output / "final")
        shutil.rmtree(output / "checkpoints" / "checkpoint-3", ignore_errors=True)
        start_two(tmp_path / "run.yaml", model, world, *keys, f"hf_trainer.deepspeed={stage}", data=data)
        assert "resuming from" in (tmp_path / "run.log").read_text()
    for step, pair in losses(plain).items():
        assert losses(output)[step] == pytest.approx(pair, abs=1e-4), f"step {step}"
    first, second = weights(plain / "final"), weights(output / "final")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-4) for name in first)
    load(output / "final")


# ---- runs that are there already ------------------------------------------------------------------------------------


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of the unbroken run and its recipe."""
    shutil.copytree(unbroken, tmp_path / "run")
    recipe = yaml.safe_load((unbroken / "recipe.yaml").read_text()) | {"output": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "run.yaml"


def test_a_finished_run_is_kept(finished, capsys):
    output = finished.with_suffix("")
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    assert main([str(finished), "log.every=2", "data.workers=1"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*")} == before


@pytest.mark.parametrize("stage", ["finished", "begun"])
def test_another_recipe_is_not_taken_for_the_finished_run(finished, capsys, stage):
    if stage == "begun":
        shutil.rmtree(finished.with_suffix("") / "final")
    assert main([str(finished), "train.learning_rate=0.5", "data.spans=false"]) == 2
    message = capsys.readouterr().err
    assert "holds a run with other settings" in message
    assert "data.spans: True -> False" in message
    assert "train.learning_rate: 0.001 -> 0.5" in message
    assert "log.resume=false" in message


def test_training_anew_replaces_the_run(finished):
    output = finished.with_suffix("")
    assert main([str(finished), "log.resume=false", "train.max_steps=1", "train.learning_rate=0.002"]) == 0
    assert sorted(losses(output)) == [1]
    assert [folder.name for folder in (output / "checkpoints").iterdir()] == ["checkpoint-1"]
    load(output / "final")


# ---- what is refused, before anything is loaded ---------------------------------------------------------------------


@pytest.fixture
def refused(tiny_path, world, tmp_path, monkeypatch, capsys):
    """Runs a recipe that must end with code 2 before the model is loaded; returns the message."""

    def no_load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("future_l1_plugin.model.load", no_load)

    def run(*overrides, **sections):
        recipe = write_recipe(tmp_path / "run.yaml", tiny_path, world, **sections)
        assert main([str(recipe), *overrides]) == 2
        assert not (tmp_path / "run").exists()
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run


def test_an_unknown_key(refused):
    message = refused(train={"learning_rat": 1.0})
    assert "unknown key `train.learning_rat`" in message
    assert "Did you mean `train.learning_rate`?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.micro_batch_size=3", "batch_size 8 is not a multiple of micro_batch_size 3"),
        ("train.micro_batch_size=0", "train.micro_batch_size: expected at least 1"),
        ("train.schedule=zigzag", "zigzag"),
        ("train.precision=int4", "train.precision: expected one of auto, bf16, fp32"),
        ("train.warmup_ratio=10", "train.warmup_ratio: expected a share of the steps"),
        ("latent.loss=mae", "latent.loss: expected one of mse"),
        ("latent.own_share=1.5", "latent.own_share: expected a share of the samples, 0..1, found 1.5"),
        ("latent.own_passes=0", "latent.own_passes: expected at least 1"),
        ("latent.own_mean_cosine=1.0", "latent.own_mean_cosine: expected null or a number between 0 and 1"),
        ("data.question_media=gif", "data.question_media: expected one of images, video"),
        ("data.on_bad=ignore", "data.on_bad"),
        ("log.every=0", "log.every: expected at least 1"),
        ("data.records=nowhere.json", "nowhere.json: no such file of records"),
    ],
)
def test_bad_values(refused, override, expected):
    assert expected in refused(override)


def test_lora_cannot_train_the_vision_tower(refused):
    assert "train.train_vision" in refused("train.lora.rank=4", "train.train_vision=true")


def test_packing_in_the_other_host(refused):
    message = refused("train.packing=true", "qwen_vl_finetune.path=elsewhere")
    assert "train.packing: Qwen-VL-Series-Finetune has a forward pass of its own" in message


def test_several_gpus_in_one_process(refused, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 8))
    assert "GPUS=8 scripts/sft.sh" in refused()


def bad_data(world, folder: Path) -> Path:
    """A copy of the records of which five cannot be used."""
    records = json.loads(world.sft.read_text())
    records[0]["conversations"] = records[0]["conversations"][1:]
    records[1]["image"] = [1, 2, 3, 9]
    records[2]["video"] = "train/gone.mp4"
    records[3]["video"] = str(folder / "cut.mp4")
    records[4]["answer"] = "B <|latent_end|>"
    clip = (world.videos / "train" / "micro-train-00003.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    (folder / "bad.json").write_text(json.dumps(records))
    return folder / "bad.json"


def test_bad_rows_are_counted_and_named(refused, world, tmp_path):
    message = refused(data={"records": str(bad_data(world, tmp_path))})
    assert "2 of 32 records are bad" in message
    assert "micro-train-00000): no human turn" in message
    assert "micro-train-00001" in message
    assert "on_bad: skip" in message


def test_missing_videos_are_found_before_the_model_is_loaded(refused, world, tmp_path):
    records = json.loads(world.sft.read_text())
    for record in records[:12]:
        record["video"] = f"train/gone-{record['id']}.mp4"
    (tmp_path / "gone.json").write_text(json.dumps(records))
    message = refused(data={"records": str(tmp_path / "gone.json")})
    assert "12 of 32 records cannot be trained on" in message
    assert "go on with the other 20 by `on_bad: skip`" in message
    assert message.count("no such video") == 10
    assert "and 2 more" in message


def test_skipping_goes_on_and_lists(tiny_path, world, tmp_path, capsys):
    output = train(
        tmp_path / "run.yaml",
        tiny_path,
        world,
        "train.max_steps=1",
        data={"records": str(bad_data(world, tmp_path)), "on_bad": "skip"},
    )
    message = capsys.readouterr().err
    assert "left out 5 of 32 records" in message
    for i, reason in enumerate(["no human turn", "within 1..8", "no such video", "cut off", "<|latent_end|>"]):
        (line,) = [line for line in message.splitlines() if f"micro-train-0000{i}" in line and "left out" in line]
        assert reason in line
    assert (output / "final").exists()


def test_a_model_without_latent_tokens(world, tmp_path, capsys):
    from future_l1_plugin.model import make_tiny

    plain = make_tiny(tmp_path / "plain", latent=False)
    recipe = write_recipe(tmp_path / "run.yaml", plain, world)
    assert main([str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "latent" in message
    assert "convert" in message
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there(world, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path / "nowhere", world)
    assert main([str(recipe)]) == 2
    assert "no such folder" in capsys.readouterr().err
