"""What scripts/sft.sh does before and around a run: dispatch, sweeps, the dry run and its arithmetic."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from real_size import write_config

from future_l1_plugin.config import load_recipe
from future_l1_plugin.data import make_world
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.hf_trainer.host import HfTrainer
from future_l1_plugin.integrations.sft import launch
from future_l1_plugin.integrations.sft.host import RECIPE_KEYS, host_of, shared_arguments
from future_l1_plugin.integrations.sft.memory import Sharding, Sizes, activations, model_states
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.integrations.sft.run import main as run_main
from future_l1_plugin.model import LatentConfig, load

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=0, train=16, seed=0, progress=False)


@pytest.fixture
def recipe(tiny_path, world, tmp_path):
    """Writes a recipe of one step on the micro world, with more sections; returns its file."""

    def write(**sections) -> str:
        values = {
            "defaults": str(RECIPES / "sft_micro.yaml"),
            "model": str(tiny_path),
            "output": str(tmp_path / "out"),
            "data": {"records": str(world.sft), "videos": str(world.videos)},
            "train": {"max_steps": 1, "batch_size": 4, "micro_batch_size": 2},
            "latent": {"own_share": 0.0},
            "log": {"save_every": 0, "tensorboard": False},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values | sections))
        return str(file)

    return write


def refused(capsys, *arguments: str) -> str:
    assert launch.main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# ---- dispatch -------------------------------------------------------------------------------------------------------


def test_without_a_checkout_it_is_transformers_trainer_and_says_so(recipe, capsys):
    assert run_main([recipe()]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("SFT on transformers.Trainer 5") and first.endswith("(no qwen_vl_finetune.path is given)")


def test_the_full_recipe_says_that_nothing_is_sharded_without_a_checkout():
    host = host_of(load_recipe(RECIPES / "sft.yaml", SftRecipe))
    assert isinstance(host, HfTrainer)
    assert "qwen_vl_finetune.deepspeed (zero3) is not used: each GPU holds everything" in host.line


def test_flags_of_a_checkout_need_a_checkout(recipe, capsys):
    message = refused(capsys, recipe(), "qwen_vl_finetune.arguments.vision_lr=2e-6")
    assert "vision_lr are flags of Qwen-VL-Series-Finetune" in message and "Give the path" in message


def test_every_shared_argument_has_its_recipe_key(recipe, tmp_path):
    """A host refuses a second value for these by that name."""
    assert set(shared_arguments(load_recipe(recipe(), SftRecipe), tmp_path)) == set(RECIPE_KEYS)
    keys = load_recipe(recipe(), SftRecipe)
    for key in RECIPE_KEYS.values():
        section, _, leaf = key.partition(".")
        assert hasattr(getattr(keys, section), leaf) if leaf else hasattr(keys, section), key


def test_a_run_is_not_resumed_in_another_host(recipe, capsys, tmp_path):
    assert run_main([recipe()]) == 0
    saved = tmp_path / "out" / "recipe.yaml"
    values = yaml.safe_load(saved.read_text())
    values["qwen_vl_finetune"]["path"] = "elsewhere"
    saved.write_text(yaml.safe_dump(values))
    assert run_main([recipe()]) == 2
    assert "qwen_vl_finetune.path: elsewhere -> None" in capsys.readouterr().err


# ---- launching ------------------------------------------------------------------------------------------------------


def test_commands(recipe):
    (job,) = launch.jobs(recipe(), ["train.seed=1"])
    tail = ["-m", "future_l1_plugin.integrations.sft.run", job.file, "train.seed=1"]
    assert job.command(None) == [sys.executable, *tail]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert job.command(8) == [*torchrun, "8", *tail]
    sharded = ["qwen_vl_finetune.path=somewhere", "qwen_vl_finetune.deepspeed=zero2"]
    (job,) = launch.jobs(recipe(), sharded)
    assert job.command(None)[:6] == [*torchrun, "1"]  # DeepSpeed wants torchrun's names for its processes


SWEEP = {"key": "latent.weight", "values": [0.1, 0.5, 1]}


def test_a_sweep_is_runs_that_differ_in_one_key(recipe, tmp_path):
    runs = launch.jobs(recipe(sweep=SWEEP), ["train.seed=1"])
    assert [job.recipe.latent.weight for job in runs] == [0.1, 0.5, 1.0]
    names = ["latent.weight=0.1", "latent.weight=0.5", "latent.weight=1"]
    assert [job.recipe.output for job in runs] == [f"{tmp_path}/out/{name}" for name in names]
    for job in runs:  # the command says the same as the recipe
        assert load_recipe(job.file, SftRecipe, job.overrides) == job.recipe
        assert (job.recipe.train.seed, job.recipe.sweep.key) == (1, None)
    words = recipe(sweep={"key": "latent.loss", "values": ["mse", "cosine"]})
    assert [job.recipe.latent.loss for job in launch.jobs(words)] == ["mse", "cosine"]


def test_a_sweep_is_shared_by_machines(recipe):
    file = recipe(sweep=SWEEP)
    assert [job.name for job in launch.jobs(file, ["sweep.only=0.5"])] == ["latent.weight=0.5"]
    assert [job.name for job in launch.jobs(file, ["sweep.only=[1, 0.1]"])] == ["latent.weight=1", "latent.weight=0.1"]
    with pytest.raises(ConfigError, match=r"sweep\.only: expected one or more of \[0\.1, 0\.5, 1\], found \[0\.2\]"):
        launch.jobs(file, ["sweep.only=0.2"])


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({"key": "latent.weigth", "values": [1]}, "Did you mean `latent.weight`?"),
        ({"key": "latent.loss", "values": ["mse", "mae"]}, "latent.loss: expected one of mse"),
        ({"key": "latent.weight"}, "sweep: expected both key and values"),
        ({"values": [1]}, "sweep: expected both key and values"),
    ],
)
def test_a_bad_sweep_starts_nothing(recipe, capsys, monkeypatch, sweep, expected):
    monkeypatch.setattr(launch.subprocess, "run", lambda command: pytest.fail("a run was started"))
    assert expected in refused(capsys, recipe(sweep=sweep))


def test_runs_of_a_sweep_start_in_order_and_stop_at_the_first_failure(recipe, capsys, monkeypatch):
    started = []

    def run(command):
        started.append(command)
        return subprocess.CompletedProcess(command, 3 if len(started) == 2 else 0)

    monkeypatch.setattr(launch.subprocess, "run", run)
    assert launch.main([recipe(sweep=SWEEP), "--gpus", "2"]) == 3
    assert started == [job.command(2) for job in launch.jobs(recipe(sweep=SWEEP))][:2]
    captured = capsys.readouterr()
    assert "run 2 of 3: latent.weight=0.5 -> " in captured.out
    assert "latent.weight=0.5 ended with code 3; the rest was not started" in captured.err


def test_a_sweep_is_not_taken_for_a_run(recipe, capsys):
    assert run_main([recipe(sweep=SWEEP)]) == 2
    assert "Start it with scripts/sft.sh" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_trains_each_value_and_goes_on(recipe, tmp_path, capfd):
    file = recipe(sweep={"key": "latent.weight", "values": [0.1, 0.5]})
    assert launch.main([file, "sweep.only=0.5"]) == 0
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["latent.weight=0.5"]
    assert launch.main([file]) == 0
    assert capfd.readouterr().out.count("nothing to do") == 1
    for value in (0.1, 0.5):
        model, _ = load(tmp_path / "out" / f"latent.weight={value}" / "final")
        assert LatentConfig.from_hf(model.config).latent_lambda == value


# ---- the dry run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory) -> Path:
    """The configuration of Qwen3-VL-8B with latent keys: a folder without weights, tokenizer and processor."""
    return write_config(tmp_path_factory.mktemp("8b") / "latent")


@pytest.fixture
def dry(monkeypatch, capsys):
    """Runs a dry run that must end well and load no weights; returns what it printed."""
    from transformers import Qwen3VLForConditionalGeneration

    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    def run(*arguments: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Qwen3VLForConditionalGeneration, "from_pretrained", no_weights)
            assert launch.main([*arguments, "--dry-run"]) == 0
        return capsys.readouterr().out

    return run


def test_a_dry_run_of_the_micro_recipe(recipe, dry, tmp_path):
    text = dry(recipe(), "train.max_steps=-1", "train.epochs=2")
    assert text.startswith("dry run. SFT on transformers.Trainer")
    shown = text.partition("resolved recipe:\n")[2].partition("\n\ncommand")[0]
    assert yaml.safe_load(shown)["train"]["epochs"] == 2.0
    assert f"{sys.executable} -m future_l1_plugin.integrations.sft.run {tmp_path}/recipe.yaml" in text
    assert "torch.distributed.run --standalone --nproc-per-node 8" in text
    assert "16 records, 4 samples a step" in text
    assert "  1 GPU: 8 steps (2 epochs), passes of 2 on each GPU: 2 a step" in text
    assert "8 GPUs: not possible: train.batch_size 4 is not a multiple" in text
    assert not (tmp_path / "out").exists()


def test_the_counts_are_those_of_the_model(recipe, dry, tiny_path, world):
    model, _ = load(tiny_path)
    vision = sum(p.numel() for p in model.model.visual.parameters())
    every = sum(p.numel() for p in model.parameters())
    assert f"parameters: {every - vision:,} trained, {vision:,} frozen" in dry(recipe())
    lora = 4 * sum(module.in_features + module.out_features for module in projections(model))
    assert f"parameters: {lora:,} trained, {every:,} frozen" in dry(recipe(), "train.lora.rank=4")


def projections(model) -> list:
    named = model.model.language_model.layers.named_modules()
    return [module for name, module in named if name.endswith("_proj")]


def test_a_dry_run_of_the_full_recipe(dry, eight_billion):
    text = dry(str(RECIPES / "sft.yaml"), f"model={eight_billion}")
    assert "parameters: 8,190,735,360 trained, 576,388,336 frozen" in text  # 8,767,123,696, as the hub counts
    assert "records not counted: outputs/curated/sft.jsonl: no such file" in text
    alone, _, sharded = text.partition("DeepSpeed zero3, if qwen_vl_finetune.path named a checkout")
    assert "in all: 1 GPU 174.53 GiB, 8 GPUs 205.04 GiB" in alone
    assert "in all: 1 GPU 191.03 GiB, 8 GPUs 56.59 GiB" in sharded


def test_a_dry_run_says_what_it_cannot_estimate(dry):
    text = dry(str(RECIPES / "sft.yaml"), "model=Qwen/Qwen3-VL-8B-Instruct")
    assert "parameters and memory: not estimated, for want of the model's configuration: Qwen/Qwen3-VL-8B-" in text
    assert "the hub did not give it" in text
    text = dry(str(RECIPES / "sft.yaml"))  # the folder of `future-l1 convert` is not there yet
    assert "not estimated" in text and "outputs/qwen3_vl_8b_latent" in text


def test_a_dry_run_of_a_base_checkpoint(recipe, dry, tmp_path):
    from future_l1_plugin.model import make_tiny

    base = make_tiny(tmp_path / "base", latent=False)
    assert "future-l1 convert" in dry(recipe(), f"model={base}")


def test_a_dry_run_of_a_sweep(recipe, dry):
    text = dry(recipe(sweep=SWEEP))
    assert "sweep of 3 runs, one after the other:\n  latent.weight=0.1 -> " in text
    assert "resolved recipe of the first:" in text


def test_a_dry_run_refuses_what_a_run_would_refuse(recipe, capsys):
    assert "unknown key `train.sed`" in refused(capsys, recipe(), "--dry-run", "train.sed=1")
    assert "zigzag" in refused(capsys, recipe(), "--dry-run", "train.schedule=zigzag")
    message = refused(capsys, recipe(), "--dry-run", "qwen_vl_finetune.deepspeed=zero7")
    assert "expected one of zero2, zero3, zero2_offload, zero3_offload or a file, found zero7" in message


# ---- its arithmetic -------------------------------------------------------------------------------------------------

SIZES = Sizes(
    trained=1000, frozen=200, largest=50, layers=2, hidden=8, inner=16, queries=12, keys=4, vocabulary=100
)  # fmt: skip


def total(parts) -> float:
    return sum(part.bytes for part in parts)


@pytest.mark.parametrize(
    ("gpus", "bf16", "sharding", "expected"),
    [
        (1, False, None, 4 * 1200 + 4 * 1000 + 8 * 1000),
        (1, True, None, 4 * 1200 + 4 * 1000 + 8 * 1000 + 2 * 1000),
        (8, False, None, 4 * 1200 + 4 * 1000 + 8 * 1000 + 4 * 1000),
        (8, True, Sharding(2), 2 * 1200 + 2 * 1000 + 16 * 125),
        (8, True, Sharding(3), 2 * 150 + 2 * 125 + 16 * 125 + 4 * 50),
        (8, False, Sharding(3), 4 * 150 + 4 * 125 + 16 * 125 + 8 * 50),
        (8, True, Sharding(2, offload_optimizer=True), 2 * 1200),
        (8, True, Sharding(3, offload_optimizer=True, offload_weights=True), 4 * 50),
    ],
)
def test_model_states(gpus, bf16, sharding, expected):
    assert total(model_states(SIZES, gpus, bf16, sharding)) == expected


def test_activations():
    a_layer = 2 * 10 * (6 * 8 + 3 * 12 + 4 * 4 + 4 * 16)  # 2 bytes, 10 tokens
    logits = 12 * 10 * 100
    assert total(activations(SIZES, 10, bf16=True, checkpointing=False)) == 2 * a_layer + logits
    assert total(activations(SIZES, 10, bf16=True, checkpointing=True)) == a_layer + 2 * (2 * 10 * 8) + logits


def test_sharding_of_a_configuration_file():
    offload = {"device": "cpu", "pin_memory": True}
    zero = {"stage": 3, "offload_optimizer": offload, "offload_param": offload}
    assert Sharding.from_config({"zero_optimization": zero}) == Sharding(3, True, True)
    assert Sharding.from_config({"zero_optimization": zero | {"stage": 2}}) == Sharding(2, True, False)
    assert Sharding.from_config({}) == Sharding(0)
