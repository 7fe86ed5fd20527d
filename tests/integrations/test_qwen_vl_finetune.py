"""SFT in a checkout of Qwen-VL-Series-Finetune: its trainer gives the losses of transformers.Trainer, to the last step.

Tests marked `qwen_vl_finetune` run in the real checkout (`--qwen-vl-finetune PATH`, in an environment that has what its
requirements.txt pins of trl and deepspeed). The others use a stand-in with the same names.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from real_size import write_config
from safetensors.torch import load_file

from future_l1_plugin.config import load_recipe
from future_l1_plugin.data import make_world
from future_l1_plugin.errors import ConfigError, EnvironmentMismatch
from future_l1_plugin.integrations.qwen_vl_finetune.checkout import CALLED, FIRST, LAST, READ, open_checkout
from future_l1_plugin.integrations.qwen_vl_finetune.host import QwenVlFinetune
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.integrations.sft.run import main
from future_l1_plugin.model import convert, load, make_tiny
from future_l1_plugin.patches.qwen_vl_finetune_functions import functions

real = pytest.mark.qwen_vl_finetune
TOLERANCE = 1e-4
WITHOUT_TIED = "['lm_head', 'embed_tokens']"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=0, train=64, seed=0, progress=False)


@pytest.fixture(scope="module")
def project(request) -> Path:
    """The real checkout."""
    return Path(request.config.getoption("--qwen-vl-finetune")).resolve()


# ---- a stand-in: a few lines under the names of the real one --------------------------------------------------------

TRAINER = """
from transformers import Trainer

class QwenSFTTrainer(Trainer):
    def create_optimizer(self):
        return super().create_optimizer()

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
"""
FUNCTIONS = """
import a_package_that_is_nowhere

local_rank = None

def rank0_print(*args):
    print(local_rank, *args)

def set_requires_grad(parameters, requires_grad):
    for parameter in parameters:
        parameter.requires_grad = requires_grad

def configure_llm(model, training_args):
    for module in (model.lm_head, model.language_model):
        set_requires_grad(module.parameters(), not training_args.freeze_llm)

def configure_vision_tower(model, training_args, compute_dtype, device):
    set_requires_grad(model.visual.to(device, compute_dtype).parameters(), not training_args.freeze_vision_tower)

def unfreeze_topk_layers(model, k_llm=0, k_vis=0):
    for layer in model.language_model.layers[len(model.language_model.layers) - k_llm :]:
        set_requires_grad(layer.parameters(), True)

def find_target_linear_names(model, num_lora_modules=-1, lora_namespan_exclude=[], verbose=True):
    linear = (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return [n for n in linear if not any(word in n for word in lora_namespan_exclude)]
"""
PARAMS = """
from dataclasses import dataclass, field
from typing import Optional
import transformers

@dataclass
class TrainingArguments(transformers.TrainingArguments):
    freeze_vision_tower: bool = field(default=False)
    freeze_llm: bool = field(default=False)
    freeze_merger: bool = field(default=False)
    unfreeze_topk_llm: int = 0
    unfreeze_topk_vision: int = 0
    lora_enable: bool = False
    vision_lora: bool = False
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_bias: str = "none"
    lora_namespan_exclude: str = field(default=None)
    num_lora_modules: int = -1
    vision_lr: Optional[float] = None
    merger_lr: Optional[float] = None
    use_dora: bool = False
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """A folder that passes for a checkout without git; its modules are forgotten afterwards."""
    root = tmp_path / "checkout"
    files = {
        "src/__init__.py": "",
        "src/params.py": PARAMS,
        "src/trainer/sft_trainer.py": TRAINER,
        "src/train/train_sft.py": FUNCTIONS,
        "scripts/zero3_offload.json": '{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}',
        "scripts/zero3.json": '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}',
        "requirements.txt": "torch==2.8.0\na_package_that-is-nowhere==1.2.3\ndeepspeed==0.17.5\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    before = {name: sys.modules.pop(name) for name in ("src", "src.params", "sft_trainer") if name in sys.modules}
    yield root
    for name in ("src", "src.params", "sft_trainer"):
        sys.modules.pop(name, None)
    sys.modules.update(before)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def refused(root: Path) -> str:
    with pytest.raises(EnvironmentMismatch) as error:
        open_checkout(root)
    message = str(error.value)
    assert f"Supported are the commits {FIRST[0]} ({FIRST[1]}) to {LAST[0]} ({LAST[1]})" in message
    assert message.endswith(f"Run: git -C {root} checkout {LAST[0]}")
    return message


def test_no_checkout_there(tmp_path):
    with pytest.raises(ConfigError) as error:
        open_checkout(tmp_path / "no where")
    message = str(error.value)
    assert f"git clone https://github.com/2U1/Qwen-VL-Series-Finetune '{tmp_path}/no where' && git -C" in message
    assert "qwen_vl_finetune.path=null" in message


@pytest.mark.parametrize("name", [name for names in CALLED.values() for name in names])
def test_a_name_that_moved(stand_in, name):
    last = name.rpartition(".")[2]
    (file,) = (file for file, names in CALLED.items() if name in names)
    edit(stand_in / file, f"def {last}(", f"def new_{last}(")
    assert f"in {file}, found nothing of this name" in refused(stand_in)
    assert f"expected {name}({', '.join(CALLED[file][name])})" in refused(stand_in)


def test_other_parameters(stand_in):
    edit(
        stand_in / "src/train/train_sft.py", "def configure_llm(model, training_args)", "def configure_llm(model, args)"
    )
    assert "found configure_llm(model, args)" in refused(stand_in)


@pytest.mark.parametrize("name", READ)
def test_an_argument_that_is_gone(stand_in, name):
    edit(stand_in / "src/params.py", f"    {name}:", f"    other_{name}:")
    assert f"expected TrainingArguments.{name} in src/params.py" in refused(stand_in)


def test_a_file_that_is_gone(stand_in):
    (stand_in / "src/trainer/sft_trainer.py").unlink()
    assert "expected the file src/trainer/sft_trainer.py, found none" in refused(stand_in)


@pytest.mark.parametrize(
    ("date", "within"),
    [("2025-10-15", False), ("2025-10-20", True), ("2025-11-20", False)],
)
def test_the_commit_is_told_by_git(stand_in, date, within):
    moment = f"{date}T12:00:00Z"
    environment = os.environ | {"GIT_AUTHOR_DATE": moment, "GIT_COMMITTER_DATE": moment}

    def git(*command: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", stand_in, *who, *command], env=environment, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    if not within:
        assert f"({date})" in refused(stand_in)
        return
    assert open_checkout(stand_in).version.endswith(f"({date})")
    edit(stand_in / "src/params.py", "int = 64", "int = 8")
    assert open_checkout(stand_in).version.endswith(f"({date}, with local changes)")


def test_a_package_that_it_needs(stand_in):
    edit(stand_in / "src/params.py", "import transformers", "import a_package_that_is_nowhere, transformers")
    with pytest.raises(EnvironmentMismatch, match=r"params\.py imports `a_package_that_is_nowhere`.*\n.*") as error:
        open_checkout(stand_in).modules()
    assert str(error.value).endswith('-m pip install "a_package_that-is-nowhere==1.2.3"')


def test_another_module_of_the_name(stand_in, tmp_path, monkeypatch):
    (tmp_path / "first" / "src").mkdir(parents=True)
    for name in ("__init__", "params"):
        (tmp_path / "first" / "src" / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "first")
    with pytest.raises(EnvironmentMismatch, match=r"expected the module `src.params` of .*, found .*first/src/params"):
        open_checkout(stand_in).modules()


def test_the_path_is_left_as_it_was(stand_in):
    before = list(sys.path)
    open_checkout(stand_in).modules()
    assert sys.path == before


def test_functions_are_made_without_the_import_lines(tmp_path):
    (tmp_path / "a.py").write_text(
        "import nowhere\n\ndef one(x):\n    return two(x) + factor\n\ndef two(x):\n    return x\n"
    )
    made = functions(tmp_path / "a.py", ("one", "two"), {"factor": 3})
    assert made["one"](4) == 7
    assert made["one"].__code__.co_filename == str(tmp_path / "a.py")
    with pytest.raises(EnvironmentMismatch, match=r"a\.py: expected the functions one, three; three is missing"):
        functions(tmp_path / "a.py", ("one", "three"), {})


# ---- flags ----------------------------------------------------------------------------------------------------------


def write_recipe(path: Path, model, world, checkout, **sections) -> Path:
    """4 steps over 64 records, 8 a step in two passes of 4."""
    recipe = {
        "model": str(model),
        "output": str(path.parent / path.stem),
        "data": {
            "records": str(world.sft),
            "videos": str(world.videos),
            "question_media": "video",
            "max_length": 512,
            "cache_mb": 64,
            "workers": 0,
        },
        "train": {"max_steps": 4, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "seed": 3},
        "eval": {"prompts": 0},
        "log": {"every": 1, "save_every": 2, "tensorboard": False},
        "qwen_vl_finetune": {"path": str(checkout) if checkout else None},
    }
    for section, values in sections.items():
        recipe[section] = recipe.get(section, {}) | values
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def parsed(stand_in, world, tmp_path):
    """TrainingArguments of the stand-in, for overrides of the recipe."""

    def parse(*overrides: str):
        file = write_recipe(tmp_path / "flags.yaml", "model", world, stand_in)
        recipe = load_recipe(file, SftRecipe, overrides)
        return QwenVlFinetune(recipe).arguments(recipe, tmp_path / "checkpoints")

    return parse


def test_recipe_keys_are_its_flags(parsed):
    found = parsed("train.schedule=constant", "log.keep=3")
    assert (found.learning_rate, found.lr_scheduler_type, found.adam_beta2) == (1e-3, "constant", 0.95)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps, found.save_total_limit) == (4, 2, 3)
    assert (found.freeze_vision_tower, found.freeze_merger, found.freeze_llm) == (True, True, False)
    assert (found.warmup_steps, found.remove_unused_columns, found.report_to) == (0.1, False, [])
    found = parsed("train.lora.rank=8", "train.lora.alpha=24", "train.lora.dropout=0.25")
    assert (found.lora_enable, found.freeze_llm) == (True, True)
    assert (found.lora_rank, found.lora_alpha, found.lora_dropout) == (8, 24, 0.25)
    assert parsed("train.train_vision=true").freeze_merger is False
    assert parsed("train.gradient_checkpointing=true").gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_its_other_flags_are_arguments(parsed):
    found = parsed(
        "train.train_vision=true",
        "qwen_vl_finetune.arguments={vision_lr: 2e-6, merger_lr: 1e-5, freeze_merger: true, adam_epsilon: 1e-6, "
        "lr_scheduler_kwargs: {num_cycles: 0.4}}",
    )
    assert (found.vision_lr, found.merger_lr, found.freeze_merger, found.freeze_vision_tower) == (
        2e-6,
        1e-5,
        True,
        False,
    )
    assert (found.adam_epsilon, found.lr_scheduler_kwargs) == (1e-6, {"num_cycles": 0.4})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("vision_lrr: 1", "vision_lrr: not a flag of its TrainingArguments. Did you mean `vision_lr`?"),
        (
            "image_folder: x",
            "(In place of its ModelArguments and DataArguments stand the recipe's `model` and `data`.)",
        ),
        ("learning_rate: 1", "learning_rate: the recipe's train.learning_rate decides it"),
        ("lora_rank: 8", "lora_rank: the recipe's train.lora.rank decides it"),
        ("deepspeed: x", "deepspeed: the recipe's qwen_vl_finetune.deepspeed decides it"),
        ("use_dora: true", "use_dora: it never reads this flag. Take it out"),
        ("vision_lr: fast", "argument --vision_lr"),
        ("freeze_llm: perhaps", "freeze_llm"),
        ("vision_lora: true", "vision_lora: needs train.lora.rank above 0"),
        ("lora_namespan_exclude: lm_head", "expected a list as one string"),
        ("load_best_model_at_end: true", "the recipe's eval.patience decides it"),
        ("torch_empty_cache_steps: 0", "transformers refuses these settings"),
    ],
)
def test_bad_flags(parsed, arguments, expected):
    with pytest.raises(ConfigError) as error:
        parsed(f"qwen_vl_finetune.arguments={{{arguments}}}")
    assert expected in str(error.value)


def test_lora_freezes_the_rest(parsed):
    with pytest.raises(ConfigError, match="freeze_llm: LoRA needs true"):
        parsed("train.lora.rank=4", "qwen_vl_finetune.arguments.freeze_llm=false")


def test_deepspeed_configurations(parsed, monkeypatch):
    with pytest.raises(ConfigError, match=r"expected one of zero2, zero3, .* or the path of a JSON, found 'zero7'"):
        parsed("qwen_vl_finetune.deepspeed=zero7")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(EnvironmentMismatch, match=r'not installed.\nRun: .* -m pip install "deepspeed==0.17.5"'):
        parsed("qwen_vl_finetune.deepspeed=zero3_offload")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) or find("json"))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"DeepSpeed needs torchrun. Start with scripts/sft\.sh"):
        parsed("qwen_vl_finetune.deepspeed=zero3_offload")


def test_fsdp_is_refused_by_name(parsed):
    with pytest.raises(ConfigError, match=r"arguments.fsdp: FSDP2 around .* use qwen_vl_finetune.deepspeed=zero3"):
        parsed("qwen_vl_finetune.arguments={fsdp: full_shard}")


def test_a_dry_run_of_the_full_recipe(stand_in, tmp_path, repository, capsys):
    from future_l1_plugin.integrations.sft.launch import main as launch

    model = write_config(tmp_path / "8b")
    keys = [str(repository / "recipes" / "sft.yaml"), f"model={model}", f"qwen_vl_finetune.path={stand_in}"]
    keys += ["--dry-run", "--gpu-memory", "80"]
    assert launch([*keys, "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"dry run. SFT in Qwen-VL-Series-Finetune without git, commit unknown at {stand_in}")
    assert "in all: 1 GPU 191.03 GiB, 8 GPUs 56.59 GiB" in text and "verdict for 8 GPUs: it fits" in text
    assert launch(keys) == 2
    message = capsys.readouterr().err
    assert "GPUS=8 scripts/sft.sh .. qwen_vl_finetune.deepspeed=zero3: 56.6 GiB, fits" in message


# ---- whole runs -----------------------------------------------------------------------------------------------------


def train(path: Path, model, world, checkout, *overrides: str, **sections) -> Path:
    """A run in this process; returns the output folder."""
    assert main([str(write_recipe(path, model, world, checkout, **sections)), *overrides]) == 0
    return path.parent / path.stem


def rows(output: Path) -> list[dict]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "loss" in row]


def assert_same_steps(one: Path, other: Path, steps: int) -> None:
    """Each step's losses within 1e-4, and its learning rate."""
    first, second = rows(one), rows(other)
    assert [row["step"] for row in first] == [row["step"] for row in second] == list(range(1, steps + 1))
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "ce_loss", "latent_loss", "learning_rate"):
            assert a[key] == pytest.approx(b[key], abs=TOLERANCE, rel=0), f"{key} at step {a['step']}"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def changed(one: Path, other: Path) -> set[str]:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def broken_off(output: Path) -> None:
    """As if the run had been killed after its checkpoint at step 2."""
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoints" / "checkpoint-4")


def test_a_run_in_the_stand_in_equals_transformers_trainer(stand_in, tiny_path, world, tmp_path, capsys):
    keys = ("train.max_steps=2", "log.save_every=0")
    there = train(tmp_path / "there.yaml", tiny_path, world, stand_in, *keys)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"SFT in Qwen-VL-Series-Finetune without git, commit unknown at {stand_in}"
    here = train(tmp_path / "here.yaml", tiny_path, world, None, *keys)
    assert_same_steps(here, there, steps=2)
    assert not changed(here / "final", there / "final")


def test_lora_in_the_stand_in(stand_in, tiny_path, world, tmp_path):
    keys = ("train.max_steps=2", "log.save_every=0", "train.lora.rank=4")
    tied = write_recipe(tmp_path / "tied.yaml", tiny_path, world, stand_in)
    assert main([str(tied), *keys]) == 2  # lm_head and embed_tokens are one weight in the tiny model
    excluded = {"path": str(stand_in), "arguments": {"lora_namespan_exclude": WITHOUT_TIED}}
    output = train(tmp_path / "run.yaml", tiny_path, world, stand_in, *keys, qwen_vl_finetune=excluded)
    assert len(changed(tiny_path, output / "final")) == 7 * 4 + 1  # and the rows of the latent tokens
    load(output / "final")


# ---- in the real checkout -------------------------------------------------------------------------------------------


@real
@pytest.mark.slow
def test_twenty_steps_have_the_losses_of_transformers_trainer(project, tiny_path, world, tmp_path):
    keys = ("train.max_steps=20", "train.weight_decay=0.0", "log.save_every=0")
    here = train(tmp_path / "here.yaml", tiny_path, world, None, *keys)
    there = train(tmp_path / "there.yaml", tiny_path, world, project, *keys)
    assert_same_steps(here, there, steps=20)
    assert rows(here)[-1]["loss"] < 0.5 * rows(here)[0]["loss"]  # they are not alike for want of learning


@real
@pytest.mark.slow
def test_weight_decay_differs_by_the_norms_only(project, tiny_path, world, tmp_path, monkeypatch):
    """Its optimiser groups decay the weights of RMSNorm, those of transformers.Trainer do not."""
    from transformers.trainer_pt_utils import get_parameter_names

    from future_l1_plugin.integrations.hf_trainer.trainer import LatentSftTrainer

    keys = ("train.max_steps=20", "train.weight_decay=0.1", "log.save_every=0")
    plain = train(tmp_path / "plain.yaml", tiny_path, world, None, *keys)
    there = train(tmp_path / "there.yaml", tiny_path, world, project, *keys)
    assert rows(plain)[-1]["loss"] != pytest.approx(rows(there)[-1]["loss"], abs=TOLERANCE)

    def with_norms(self, model):
        return [name for name in get_parameter_names(model, [torch.nn.LayerNorm]) if "bias" not in name]

    monkeypatch.setattr(LatentSftTrainer, "get_decay_parameter_names", with_norms)
    here = train(tmp_path / "here.yaml", tiny_path, world, None, *keys)
    assert_same_steps(here, there, steps=20)


@real
def test_its_trainer_runs_and_says_so(project, tiny_path, world, tmp_path, capsys, monkeypatch):
    made = []
    trainer = QwenVlFinetune.trainer
    monkeypatch.setattr(QwenVlFinetune, "trainer", lambda host: made.append(trainer(host)) or made[-1])
    keys = ("train.max_steps=1", "log.save_every=0", "latent.own_share=0.5", "latent.own_passes=2")
    there = train(tmp_path / "there.yaml", tiny_path, world, project, *keys)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("SFT in Qwen-VL-Series-Finetune ") and first.endswith(f" at {project}")
    (cls,) = made
    assert sys.modules["sft_trainer"].QwenSFTTrainer in cls.__mro__
    here = train(tmp_path / "here.yaml", tiny_path, world, None, *keys)  # own latents: drawn alike in both
    assert_same_steps(here, there, steps=1)
    git = ["git", "-C", str(project), "status", "--porcelain"]
    assert subprocess.run(git, capture_output=True, text=True).stdout == "", "the checkout was changed"


@real
def test_a_run_goes_on_where_it_was(project, tiny_path, world, tmp_path, capsys):
    whole = train(tmp_path / "whole.yaml", tiny_path, world, project)
    parted = train(tmp_path / "parted.yaml", tiny_path, world, project)
    broken_off(parted)
    capsys.readouterr()
    assert main([str(tmp_path / "parted.yaml")]) == 0
    assert f"resuming from {parted / 'checkpoints' / 'checkpoint-2'}" in capsys.readouterr().out
    assert_same_steps(whole, parted, steps=4)
    assert not changed(whole / "final", parted / "final")
    assert main([str(tmp_path / "parted.yaml"), "qwen_vl_finetune.path=null"]) == 2
    assert f"qwen_vl_finetune.path: {project} -> None" in capsys.readouterr().err


@real
def test_its_lora(project, world, tmp_path):
    """On a model with a latent head, which is trained whole; the result is an ordinary checkpoint."""
    base = make_tiny(tmp_path / "base", latent=False)
    model = convert(base, tmp_path / "model", use_projection_head=True, projection_head_type="lvr")
    lora = {"path": str(project), "arguments": {"lora_namespan_exclude": WITHOUT_TIED}}
    keys = ("train.lora.rank=4", "log.save_every=1", "log.keep=2")
    output = train(tmp_path / "run.yaml", model, world, project, *keys, qwen_vl_finetune=lora)
    names = changed(model, output / "final")
    head = {name for name in names if name.startswith("projection_head.")}
    assert len(head) == 6 and len(names - head) == 7 * 4 + 1  # and the rows of the latent tokens
    assert sum(".language_model.layers." in name and "_proj" in name for name in names - head) == 7 * 4
    load(output / "final")
    kept = sorted(folder.name for folder in (output / "checkpoints").iterdir())
    assert kept == ["checkpoint-3", "checkpoint-4"]
    assert (output / "checkpoints" / "checkpoint-4" / "non_lora_state_dict.bin").is_file(), "its own LoRA checkpoint"


@real
def test_what_is_trained_beside_lora_comes_back(project, tiny_path, world, tmp_path):
    arguments = {"lora_namespan_exclude": WITHOUT_TIED, "freeze_merger": False, "merger_lr": 1e-3}
    lora = {"path": str(project), "arguments": arguments}
    whole = train(tmp_path / "whole.yaml", tiny_path, world, project, "train.lora.rank=4", qwen_vl_finetune=lora)
    assert any("merger" in name for name in changed(tiny_path, whole / "final"))
    parted = train(tmp_path / "parted.yaml", tiny_path, world, project, "train.lora.rank=4", qwen_vl_finetune=lora)
    broken_off(parted)
    assert main([str(tmp_path / "parted.yaml"), "train.lora.rank=4"]) == 0
    assert_same_steps(whole, parted, steps=4)
    assert not changed(whole / "final", parted / "final")


@real
def test_its_rates_and_its_freezing(project, tiny_path, world, tmp_path):
    def trained(name: str, **arguments) -> set[str]:
        section = {"path": str(project), "arguments": arguments}
        keys = ("train.max_steps=2", "train.train_vision=true", "log.save_every=0", "train.schedule=constant")
        run = train(tmp_path / f"{name}.yaml", tiny_path, world, project, *keys, qwen_vl_finetune=section)
        return changed(tiny_path, run / "final")

    def is_merger(name: str) -> bool:
        return "merger" in name

    every = trained("every")
    still = trained("still", vision_lr=0.0, merger_lr=1e-3)
    assert {name for name in every if ".visual." in name and not is_merger(name)} == every - still
    frozen = trained("frozen", freeze_merger=True, freeze_llm=True, unfreeze_topk_llm=1)
    text = {name for name in frozen if ".visual." not in name}
    assert text and all(".language_model.layers.3." in name for name in text)
    assert not any(map(is_merger, frozen)) and frozen - text


@real
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("rank", [0, 4])
def test_deepspeed(project, tiny_path, world, tmp_path, stage, rank):
    """One process over gloo, started as a user starts it: the losses and weights of the same run without it."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed, as the checkout's requirements.txt pins it")
    values = {"path": str(project), "arguments": {"lora_namespan_exclude": WITHOUT_TIED}}
    keys = ["train.max_steps=3", "train.max_grad_norm=0.5", f"train.lora.rank={rank}"]  # clips, and not at a default
    plain = train(tmp_path / "plain.yaml", tiny_path, world, project, *keys, qwen_vl_finetune=values)
    file = write_recipe(
        tmp_path / "run.yaml", tiny_path, world, project, qwen_vl_finetune=values | {"deepspeed": stage}
    )
    output = tmp_path / "run"
    command = [sys.executable, "-m", "future_l1_plugin.integrations.sft.launch", str(file), *keys]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def start() -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    start()
    assert_same_steps(plain, output, steps=3)
    first, second = weights(plain / "final"), weights(output / "final")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-5) for name in first)
    load(output / "final")
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoints" / "checkpoint-3", ignore_errors=True)
    assert "resuming from" in start()
    assert_same_steps(plain, output, steps=3)


@real
def test_a_checkout_without_a_name_is_refused(project, tiny_path, world, tmp_path, capsys):
    wrong = tmp_path / "wrong"
    shutil.copytree(project, wrong, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    edit(wrong / "src/train/train_sft.py", "def find_target_linear_names(", "def find_linear_names(")
    assert main([str(write_recipe(tmp_path / "run.yaml", tiny_path, world, wrong))]) == 2
    message = capsys.readouterr().err
    assert "expected find_target_linear_names(model, num_lora_modules, lora_namespan_exclude, verbose)" in message
    assert "found nothing of this name. Supported are the commits" in message
    assert not (tmp_path / "run").exists()


@real
def test_the_supported_commits_are_commits_of_it(project):
    for commit, date, seconds in (FIRST, LAST):
        command = ["git", "-C", str(project), "log", "-1", "--format=%cs %ct", commit]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{project} is no git checkout that reaches back to {commit}")
        assert done.stdout.split() == [date, str(seconds)]


@real
def test_the_functions_patch_is_still_needed(project):
    """patches/README.md, qwen_vl_finetune_functions."""
    folders = [str(project / folder) for folder in (".", "src", "src/train")]
    code = f"import sys; sys.path += {folders!r}; import train_sft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0, (
        "train_sft.py imports whole in this environment. If it does with the packages of scripts/cpu.lock and those of "
        "the checkout's requirements.txt, import it in checkout.py, and remove patches/qwen_vl_finetune_functions.py, "
        "its entry in patches/README.md and this test."
    )


@real
def test_a_dry_run_in_the_checkout(project, tiny_path, world, tmp_path, capsys):
    from future_l1_plugin.integrations.sft.launch import main as launch

    values = {"path": str(project), "deepspeed": "zero3_offload"}
    file = write_recipe(tmp_path / "run.yaml", tiny_path, world, project, qwen_vl_finetune=values)
    assert launch([str(file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"dry run. SFT in Qwen-VL-Series-Finetune {LAST[0]}" in text
    assert "1 GPU: " in text and "--nproc-per-node 1 -m" in text
    assert "DeepSpeed zero3_offload" in text and "on the CPU" in text
    assert "transformers.Trainer, each GPU" not in text
