"""SFT runs that are broken off and go on: NaN, a kill in a save, changed data, raised limits, more steps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from future_l1_plugin.data import make_world
from future_l1_plugin.data.record_files import Records
from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.errors import TrainingError
from future_l1_plugin.integrations.hf_trainer.trainer import LatentSftTrainer
from future_l1_plugin.integrations.sft import fit, trainer
from future_l1_plugin.integrations.sft.finite import FiniteWatch
from future_l1_plugin.integrations.sft.memory import Sizes
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.integrations.sft.resume import Start
from future_l1_plugin.integrations.sft.run import main
from future_l1_plugin.resume import Found, Inputs, Kind, fault, rule_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=0, train=16, seed=0, progress=False)


@pytest.fixture(scope="module")
def start(tiny_path, world):
    """Runs 4 steps of 4 records, two passes each, into a folder; returns exit code and folder."""

    def run(folder: Path, *overrides: str, records: Path | None = None, videos: Path | None = None) -> tuple[int, Path]:
        values = {
            "model": str(tiny_path),
            "output": str(folder),
            "data": {"records": str(records or world.sft), "videos": str(videos or world.videos), "workers": 0},
            "latent": {"own_share": 0.0},
            "train": {"max_steps": 4, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
            "log": {"every": 1, "save_every": 2, "keep": 1, "tensorboard": False},
            "eval": {"prompts": 0},
        }
        values["data"] |= {"question_media": "video", "max_length": 512}
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(values))
        return main([str(file), *overrides]), folder

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that is not broken off."""
    code, folder = start(tmp_path_factory.mktemp("whole") / "run")
    assert code == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def checkpoints(folder: Path) -> list[str]:
    return sorted(one.name for one in (folder / "checkpoints").iterdir())


# ---- not finite -----------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_ends_the_run(start, whole, tmp_path, monkeypatch, capsys):
    """In the third step, as cuDNN's attention gives it. The same command then ends with the unbroken run's weights."""
    passes = []
    ordinary = LatentSftTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        loss = ordinary(self, model, inputs, *args, **kwargs)
        passes.append(inputs["record_ids"])
        if len(passes) == 5:
            model.model.language_model.layers[0].self_attn.q_proj.weight.grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(LatentSftTrainer, "training_step", training_step)
    code, folder = start(tmp_path / "run", "log.save_every=1")
    message = capsys.readouterr().err
    assert code == 2
    assert "error: step 3: a gradient norm of nan (losses: " in message
    assert f"{folder / 'checkpoints' / 'checkpoint-2'} is whole" in message
    assert ", ".join([*passes[4], *passes[5]]) in message
    assert checkpoints(folder) == ["checkpoint-2"] and fault(folder / "checkpoints" / "checkpoint-2") is None
    assert not (folder / "final").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    monkeypatch.undo()
    assert start(tmp_path / "run", "log.save_every=1")[0] == 0
    assert same(folder / "final", whole / "final")


def stand_in(folder, processes=1, index=0):
    """What `FiniteWatch` asks of a trainer."""
    return SimpleNamespace(
        state=SimpleNamespace(global_step=6),
        args=SimpleNamespace(process_index=index, world_size=processes, output_dir=str(folder)),
        accelerator=SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor, reduction: tensor),
    )


def test_a_loss_that_is_not_finite_names_its_pass(tmp_path):
    watch = FiniteWatch()
    watch.passed(["a", "b"], torch.tensor(1.5))
    watch.passed(["c", "d"], torch.tensor(float("inf")))
    with pytest.raises(TrainingError) as error:
        watch.check(stand_in(tmp_path), torch.tensor(2.0))
    assert str(error.value).startswith("step 7: a loss of inf. Nothing of this step was saved. There is no checkpoint")
    assert "Records of the step: c, d. These records may be the cause" in str(error.value)
    watch.passed(["a"], torch.tensor(1.0))
    watch.check(stand_in(tmp_path), 2.0)  # a step by itself
    watch.check(stand_in(tmp_path), None)  # DeepSpeed, before its first step
    with pytest.raises(TrainingError, match="a gradient norm of nan"):
        watch.check(stand_in(tmp_path), -1.0)  # DeepSpeed's word for it


TWO = """
import sys, torch
from types import SimpleNamespace
from accelerate import Accelerator
from future_l1_plugin.data.record_files import Records
from future_l1_plugin.data.records import TwiffRecord
from future_l1_plugin.errors import TrainingError
from future_l1_plugin.integrations.sft.finite import FiniteWatch
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
args = SimpleNamespace(process_index=rank, world_size=2, output_dir=sys.argv[1])
trainer = SimpleNamespace(state=SimpleNamespace(global_step=0), args=args, accelerator=accelerator)
watch = FiniteWatch()
watch.passed([f"record {rank}"], torch.tensor([1.0, float("nan")][rank]))
try:
    watch.check(trainer, 1.0)
except TrainingError as error:
    open(f"{sys.argv[1]}/{rank}", "w").write(str(error))
"""


def test_all_processes_stop_together(tmp_path):
    """A loss of one of them alone, with gradients that are finite."""
    (tmp_path / "two.py").write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, tmp_path / "two.py", tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a gradient norm of 1.0 (losses: 1), by process 0" in (tmp_path / "0").read_text()
    assert "a loss of nan, by process 1" in (tmp_path / "1").read_text()


# ---- a kill in a save -----------------------------------------------------------------------------------------------


def test_a_kill_in_a_save_leaves_the_checkpoint_before(start, whole, world, tmp_path, monkeypatch, capsys):
    """With keep=1. Started again elsewhere: the run's folder and the data were moved."""

    class Killed(BaseException):
        pass

    def killed(folder):
        if folder.name == "checkpoint-4":
            raise Killed
        sealed(folder)

    sealed = trainer.seal
    monkeypatch.setattr(trainer, "seal", killed)
    with pytest.raises(Killed):
        start(tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.undo()
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(world.videos, tmp_path / "data" / "videos")
    shutil.copy(world.sft, tmp_path / "data" / "sft.json")
    moved = {"records": tmp_path / "data" / "sft.json", "videos": tmp_path / "data" / "videos"}
    code, folder = start(tmp_path / "moved", **moved)
    said = capsys.readouterr().out
    assert code == 0
    assert f"passed over {folder / 'checkpoints' / 'checkpoint-4'}: its saving did not come to an end" in said
    assert f"resuming from {folder / 'checkpoints' / 'checkpoint-2'}" in said
    assert checkpoints(folder) == ["checkpoint-4"]
    assert same(folder / "final", whole / "final")


# ---- changed data, raised limits ------------------------------------------------------------------------------------


def test_a_record_file_edited_in_place_is_refused(start, whole, world, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    records = json.loads(world.sft.read_text())
    records[0], records[1] = records[1], records[0]
    (tmp_path / "sft.json").write_text(json.dumps(records))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    assert start(tmp_path / "run", records=tmp_path / "sft.json")[0] == 2
    message = capsys.readouterr().err
    assert (
        "has changed since: record files (sft.json was changed). Going on, it would see some records twice" in message
    )
    assert "Put back what was there. Or name another output" in message
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_a_finished_run_gets_more_steps_and_what_errors_advise(start, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    advised = ("data.max_length=1024", "train.micro_batch_size=1", "train.gradient_checkpointing=true")
    code, folder = start(tmp_path / "run", "train.max_steps=5", *advised)
    said = capsys.readouterr().out
    assert code == 0
    assert "going on with more: train.max_steps: 4 -> 5 (a schedule over all steps" in said
    assert "going on with more: data.max_length: 512 -> 1024" in said
    assert "going on otherwise: train.micro_batch_size: 2 -> 1" in said
    assert "gradient_checkpointing" not in said
    assert f"its final checkpoint is kept as {folder / 'final-4'}" in said
    assert same(folder / "final-4", whole / "final") and not same(folder / "final", whole / "final")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:5]] == [1, 2, 3, 4, 5]
    # One warm-up step, then half a cosine over four; the fifth step is three of them in: (1 + cos(135 degrees)) / 2.
    assert rows[4]["learning_rate"] == pytest.approx(1e-3 * 0.1464466)
    (folder / "final").rename(folder / "taken")  # killed before it was written, with the checkpoint of the last step
    assert start(tmp_path / "run", "train.max_steps=5", *advised)[0] == 0
    assert same(folder / "final", folder / "taken") and checkpoints(folder) == ["checkpoint-5"]
    assert start(tmp_path / "run", *advised)[0] == 2  # back to four
    assert "train.max_steps: 5 -> 4 (it may be raised, not lowered)" in capsys.readouterr().err


def test_a_limit_that_is_raised_moves_no_record(tmp_path):
    """`c` was too long when the run began, and `a` cannot be read any more: the run keeps the places of all."""
    records = [TwiffRecord(name, "clip.mp4", "?", [], (), "A") for name in "abc"]
    recipe = SftRecipe(model="m", output=str(tmp_path))
    before = Inputs(used={"ids": ["a", "b"]})
    start = Start(recipe, tmp_path, False, [], Found(), before, {})
    assert [record.id for record in start.as_before(Records(records))] == ["a", "b"]
    assert start.as_before(Records(records[1:])) is None  # the record files differ
    assert Start(recipe, None, False, [], Found(), None, {}).as_before(Records(records)) is None


def test_a_run_under_way_is_told_what_it_may_change_only():
    """Memory: of the ways out of a run that does not fit, those that the guard lets through."""
    sizes = Sizes(8 * 10**9, 0, 10**9, 36, 4096, 12288, 4096, 1024, 151936)
    recipe = SftRecipe(model="m", output="o")
    recipe.train.micro_batch_size = 4
    device = fit.Device(80, "80 GiB")
    start, going_on = (fit.problem(recipe, None, sizes, 8, True, device, flag) for flag in (False, True))
    assert all(key in start for key in ("zero3", "lora.rank=64", "data.max_length=8192", "micro_batch_size=1"))
    ways = [line.split(":")[0].strip() for line in going_on.splitlines()[1:-1]]
    assert sorted(ways) == ["train.gradient_checkpointing=true", "train.micro_batch_size=1"]
    assert all(rule_of("sft", way.split("=")[0]).kind is Kind.COST for way in ways)
