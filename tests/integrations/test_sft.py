"""What scripts/sft.sh does before and around a run: dispatch, sweeps, the dry run and its arithmetic."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from real_size import write_config

from future_l1_plugin.config import load_recipe
from future_l1_plugin.data import make_world
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.hf_trainer.host import HfTrainer
from future_l1_plugin.integrations.sft import fit, launch
from future_l1_plugin.integrations.sft.deepspeed import NAMES, configuration, named
from future_l1_plugin.integrations.sft.host import RECIPE_KEYS, checked, shared_arguments
from future_l1_plugin.integrations.sft.hosts import host_of
from future_l1_plugin.integrations.sft.memory import Sharding, Sizes, activations, model_states, with_lora
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.integrations.sft.run import _few
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
            "eval": {"prompts": 0},
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


def test_the_full_recipe_divides_the_weights_without_a_checkout_too():
    host = host_of(load_recipe(RECIPES / "sft.yaml", SftRecipe))
    assert isinstance(host, HfTrainer)
    assert host.sharding() == Sharding(3)
    assert ", DeepSpeed zero3 (no qwen_vl_finetune.path is given)" in host.line
    whole = host_of(load_recipe(RECIPES / "sft.yaml", SftRecipe, ["hf_trainer.deepspeed=null"]))
    assert whole.sharding() is None and ", each GPU holds everything (no" in whole.line


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
    for keys in (sharded, ["hf_trainer.deepspeed=zero3"]):
        (job,) = launch.jobs(recipe(), keys)
        assert job.command(None)[:6] == [*torchrun, "1"]  # DeepSpeed wants torchrun's names for its processes
    (job,) = launch.jobs(recipe(), ["hf_trainer.deepspeed=zero3", "qwen_vl_finetune.path=somewhere"])
    assert job.command(None)[:3] == [sys.executable, "-m", "future_l1_plugin.integrations.sft.run"]  # the other host's


# ---- DeepSpeed on transformers.Trainer ------------------------------------------------------------------------------


def test_the_configurations_behind_the_names(tmp_path):
    for name, sharding in NAMES.items():
        config = named(name)
        assert Sharding.from_config(config) == sharding, name
        assert config["bf16"] == {"enabled": "auto"} and config["gradient_clipping"] == "auto"
    assert named("zero3")["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    own = tmp_path / "mine.json"
    own.write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 3}')
    assert configuration(str(own), "key") == {"zero_optimization": {"stage": 1}, "gradient_clipping": 3}
    own.write_text("{")
    with pytest.raises(ConfigError, match=r"key: .*mine.json is no JSON"):
        configuration(str(own), "key")
    with pytest.raises(ConfigError, match=r"key: expected one of zero2, .* or the path of a JSON, found 'no.json'"):
        configuration("no.json", "key")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("hf_trainer.deepspeed=zero7", "hf_trainer.deepspeed: expected one of zero2, zero3, zero2_offload"),
        ("qwen_vl_finetune.deepspeed=zero7", "qwen_vl_finetune.deepspeed: expected one of zero2, zero3, zero2_offload"),
        ("hf_trainer.fsdp=full_shard", "hf_trainer.fsdp: FSDP2 around the whole model fails at the latent targets"),
    ],
)
def test_bad_sharding_starts_nothing(recipe, capsys, monkeypatch, key, expected):
    monkeypatch.setattr(launch.os, "execv", lambda *command: pytest.fail("a run was started"))
    assert expected in refused(capsys, recipe(), key)


def test_a_missing_deepspeed_is_found_before_torchrun(recipe, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    monkeypatch.setattr(launch.os, "execv", lambda *command: pytest.fail("a run was started"))
    message = refused(capsys, recipe(), "hf_trainer.deepspeed=zero3", "--gpus", "8")
    command = f'Run: {sys.executable} -m pip install "deepspeed>=0.17.5,<0.20"'
    assert f"hf_trainer.deepspeed: DeepSpeed is not installed.\n{command}\n" in message
    assert run_main([recipe(), "hf_trainer.deepspeed=zero3"]) == 2  # and by whoever starts torchrun himself
    assert "DeepSpeed is not installed" in capsys.readouterr().err


def test_fsdp_of_accelerate_launch_is_refused(recipe, capsys, monkeypatch):
    with pytest.raises(ConfigError, match=r"FSDP is on: FSDP2 around .* use hf_trainer.deepspeed=zero3"):
        checked(SimpleNamespace(n_gpu=1, fsdp=["full_shard"]), "hf_trainer.deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run_main([recipe()]) == 2
    assert "FSDP is on" in capsys.readouterr().err


def test_under_zero3_the_model_is_placed_nowhere(recipe, capsys, monkeypatch):
    """`load` would move divided weights and the rope's buffers to the CPU, where the first pass on a GPU fails."""
    asked = {}

    def no_load(path, **keys):
        asked.update(keys)
        raise ConfigError("loaded enough")

    monkeypatch.setattr("future_l1_plugin.model.load", no_load)
    assert run_main([recipe()]) == 2
    assert asked["device"] == "cpu"
    monkeypatch.setattr("future_l1_plugin.model.checkpoint.divided", lambda: True)
    assert run_main([recipe()]) == 2
    assert asked["device"] is None and capsys.readouterr().err.count("loaded enough") == 2


# ---- does it fit ----------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_is_refused_before_weights_are_loaded(recipe, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr("future_l1_plugin.model.load", lambda *_, **__: loaded.append(1) or pytest.fail("loaded"))
    monkeypatch.setattr(fit, "device_here", lambda: fit.Device(0.001, "0.0 GiB a GPU (a small one)"))
    assert run_main([recipe()]) == 2
    message = capsys.readouterr().err
    assert "on 1 GPU this run needs about " in message and "0.0 GiB a GPU (a small one). What helps:" in message
    assert "GPUS=8 scripts/sft.sh .. hf_trainer.deepspeed=zero3: " in message
    assert "train.check_memory=false starts anyway" in message
    with pytest.raises(pytest.fail.Exception):
        run_main([recipe(), "train.check_memory=false"])
    assert loaded == [1]


def test_on_a_cpu_nothing_is_measured(recipe, monkeypatch):
    monkeypatch.setattr(fit, "model_sizes", lambda *_: pytest.fail("measured"))
    assert fit.device_here() is None or torch.cuda.is_available()
    monkeypatch.setattr(fit, "device_here", lambda: None)
    fit.check(load_recipe(recipe(), SftRecipe), None, 1, True, None)


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
    """Runs a dry run that must end with `code` and load no weights; returns what it printed."""
    from transformers import Qwen3VLForConditionalGeneration

    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    def run(*arguments: str, code: int = 0) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Qwen3VLForConditionalGeneration, "from_pretrained", no_weights)
            assert launch.main([*arguments, "--dry-run"]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

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
    lora += 3 * model.config.text_config.hidden_size  # the rows of the latent tokens
    assert f"parameters: {lora:,} trained, {every:,} frozen" in dry(recipe(), "train.lora.rank=4")


def projections(model) -> list:
    named = model.model.language_model.layers.named_modules()
    return [module for name, module in named if name.endswith("_proj")]


def test_a_dry_run_of_the_full_recipe(dry, eight_billion):
    text = dry(str(RECIPES / "sft.yaml"), f"model={eight_billion}", "--gpus", "8", "--gpu-memory", "80")
    assert "parameters: 8,190,735,360 trained, 576,388,336 frozen" in text  # 8,767,123,696, as the hub counts
    assert "records not counted: outputs/curated/sft.jsonl: no such file" in text
    assert "estimated for bf16; DeepSpeed zero3:" in text
    assert "in all: 1 GPU 191.03 GiB, 8 GPUs 56.59 GiB" in text
    # 2 bytes of 8.77 billion weights, 12 of 8.19 billion: float32 weights and two moments
    assert "disk: about 107.87 GiB a checkpoint, every 100 steps; log.keep=2" in text
    assert text.endswith("verdict for 8 GPUs: it fits, 80 GiB a GPU (--gpu-memory)\n")


def test_a_dry_run_refuses_a_full_fine_tune_of_8b_on_one_gpu(dry, eight_billion, monkeypatch):
    monkeypatch.setattr(fit, "device_here", lambda: None)
    text = dry(str(RECIPES / "sft.yaml"), f"model={eight_billion}", code=2)
    assumed = "80 GiB a GPU (assumed: no GPU is here, see --gpu-memory)"
    assert f"verdict for 1 GPU: it does not fit, {assumed}" in text
    assert f"error: on 1 GPU this run needs about 191.0 GiB on each, and there are {assumed}. What helps:\n" in text
    assert "  GPUS=8 scripts/sft.sh .. hf_trainer.deepspeed=zero3: 56.6 GiB, fits\n" in text
    assert "  hf_trainer.deepspeed=zero3_offload (slower; the CPU's memory holds the rest): " in text
    assert "  train.lora.bits=4 train.lora.rank=64 hf_trainer.deepspeed=null (QLoRA): " in text
    assert "  train.lora.rank=64: " in text and "  data.max_length=8192: " in text
    assert "train.gradient_checkpointing" not in text.partition("What helps")[2]  # it is on already
    whole = (str(RECIPES / "sft.yaml"), f"model={eight_billion}", "hf_trainer.deepspeed=null", "--gpus", "8")
    assert "on 8 GPUs this run needs about 205.0 GiB on each" in dry(*whole, code=2)
    lora = dry(*whole[:3], "train.lora.rank=64")  # what it says helps does
    assert "verdict for 1 GPU: it fits" in lora
    assert f"parameters: {with_lora(EIGHT, 64).trained:,} trained, 8,767,123,696 frozen" in lora
    four = dry(*whole[:3], "train.lora.rank=64", "train.lora.bits=4")
    # 36 layers of 2 x 4096 x (4096 + 1024) + 3 x 4096 x 12288 weights; 8.77 billion and the adapters less these
    assert "0.516 bytes x 6,945,767,424 in NF4 + 4 x the rest" in four
    weights = 0.515869140625 * 6_945_767_424 + 4 * (8_767_123_696 - 6_945_767_424 + with_lora(EIGHT, 64).trained)
    assert f"{weights / 2**30:.2f} GiB" in four


#: Of the real 8B model.
EIGHT = Sizes(8_190_735_360, 576_388_336, 0, layers=36, hidden=4096, inner=12288, queries=4096, keys=1024, vocabulary=0)


def test_a_dry_run_says_what_it_cannot_estimate(dry):
    text = dry(str(RECIPES / "sft.yaml"), "model=Qwen/Qwen3-VL-8B-Instruct")
    said = "parameters, memory and whether it fits: not estimated, for want of the model's configuration: "
    assert f"{said}Qwen/Qwen3-VL-8B-" in text
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
    assert "expected one of zero2, zero3, zero2_offload, zero3_offload or the path of a JSON, found 'zero7'" in message
    message = refused(capsys, recipe(), "--gpu-memory", "80")
    assert "--gpu-memory belongs to --dry-run" in message


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


def test_records_that_do_not_fill_a_batch_are_said():
    assert _few(8, 8) == ""
    assert _few(5, 8).startswith("train.batch_size: a step takes 8 samples, there are 5 records.")
