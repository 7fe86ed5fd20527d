"""Evaluation of SFT: held-out losses by a second implementation, early stopping, spans of decoded answers, warnings."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers.trainer_utils import EvalLoopOutput

from future_l1_plugin.config import load_recipe
from future_l1_plugin.data import make_world
from future_l1_plugin.data.record_files import load_records
from future_l1_plugin.data.sft import SftCollator, SftDataset
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.sft import evaluation as module
from future_l1_plugin.integrations.sft import trainer as trainer_module
from future_l1_plugin.integrations.sft.evaluation import Evaluation, SpanCounts, SpanProbe, StopEarly
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.integrations.sft.run import main
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.model import LatentConfig, load
from future_l1_plugin.model.objective import sft_losses

SPANS = ("spans_per_response", "share_of_empty_spans", "latents_per_span")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=0, train=24, seed=0, progress=False)


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """(16 records to train on, 8 held out)."""
    records, folder = json.loads(world.sft.read_text()), tmp_path_factory.mktemp("files")
    for name, part in (("train", records[:16]), ("held", records[16:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    return folder / "train.json", folder / "held.json"


def write_recipe(path: Path, model: Path, world, records: Path, **sections) -> Path:
    recipe = {
        "model": str(model),
        "output": str(path.parent / path.stem),
        "data": {
            "records": str(records),
            "videos": str(world.videos),
            "question_media": "video",
            "max_length": 512,
            "workers": 0,
        },
        "train": {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3},
        "eval": {"every": 1, "prompts": 2, "max_new_tokens": 8},
        "log": {"every": 1, "save_every": 0, "tensorboard": False},
    }
    for section, values in sections.items():
        recipe[section] = recipe.get(section, {}) | values
    path.write_text(yaml.safe_dump(recipe))
    return path


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


DROPOUT = {"lora": {"rank": 4, "dropout": 0.2}}


@pytest.fixture(scope="module")
def evaluated(tiny_path, world, files, tmp_path_factory):
    """Under LoRA with dropout and own latents: two streams of random numbers that an evaluation must not touch."""
    path = tmp_path_factory.mktemp("evaluated") / "run.yaml"
    write_recipe(
        path,
        tiny_path,
        world,
        files[0],
        train=DROPOUT,
        latent={"own_share": 0.5, "own_passes": 1},
        eval={"records": str(files[1]), "limit": 6},
    )
    assert main([str(path)]) == 0
    return path.parent / "run"


# ---- held-out losses ------------------------------------------------------------------------------------------------


def test_an_evaluation_logs_losses_and_spans(evaluated):
    found = [row for row in rows(evaluated) if "eval_loss" in row]
    assert [row["step"] for row in found] == [1, 2]
    for row in found:
        assert {f"eval_{name}" for name in SPANS} <= row.keys()
        assert row["eval_loss"] == pytest.approx(row["eval_ce_loss"] + 0.1 * row["eval_latent_loss"], abs=3e-5)
    assert found[1]["eval_loss"] < found[0]["eval_loss"]
    assert not any("train_spans_per_response" in row for row in rows(evaluated))


def test_held_out_losses_are_means_over_all_records(tiny_path, world, files, tmp_path):
    """By the definitions: one record a batch, sums over sums. The run has batches of 4 and 2."""
    write_recipe(
        tmp_path / "run.yaml",
        tiny_path,
        world,
        files[0],
        train={"max_steps": 1},
        eval={"records": str(files[1]), "limit": 6, "prompts": 0},
    )
    assert main([str(tmp_path / "run.yaml")]) == 0
    (found,) = [row for row in rows(tmp_path / "run") if "eval_loss" in row]
    assert not any("spans" in name for name in found)
    model, processor = load(tmp_path / "run" / "final", dtype=torch.float32)
    config = LatentConfig.from_hf(model.config)
    data = SftDataset(list(load_records(files[1], video_root=world.videos))[:6])
    ce = decisions = latent = latents = 0.0
    for i in range(6):
        with torch.no_grad():
            losses = sft_losses(model, config, SftCollator(processor, config, "video")([data[i]]), going_on=True)
        ce, decisions = ce + float(losses.ce) * int(losses.decisions), decisions + int(losses.decisions)
        latent, latents = latent + float(losses.latent) * losses.latents, latents + losses.latents
    assert found["eval_ce_loss"] == pytest.approx(ce / decisions, abs=2e-5)
    assert found["eval_latent_loss"] == pytest.approx(latent / latents, abs=2e-5)


def test_an_evaluation_changes_nothing_that_is_trained(evaluated, tiny_path, world, files, tmp_path):
    """And without held-out records a few training prompts are answered at the end."""
    write_recipe(
        tmp_path / "run.yaml",
        tiny_path,
        world,
        files[0],
        train=DROPOUT,
        latent={"own_share": 0.5, "own_passes": 1},
    )
    assert main([str(tmp_path / "run.yaml")]) == 0
    keys = ("loss", "ce_loss", "latent_loss", "going_on_loss", "grad_norm")
    plain, other = ([[row[k] for k in keys] for row in rows(o) if "loss" in row] for o in (tmp_path / "run", evaluated))
    assert plain == other and len(plain) == 2
    ends = [row for row in rows(tmp_path / "run") if "train_spans_per_response" in row]
    assert [row["step"] for row in ends] == [2] and {f"train_{name}" for name in SPANS} <= ends[0].keys()


def test_a_fixed_budget_leaves_nothing_to_train(tiny_path, world, files, tmp_path, capsys):
    """The key is on by default; the first lines say that it has no effect, and the log holds no loss of it."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_path.iterdir():
        if file.name == "config.json":
            values = json.loads(file.read_text()) | {"fixed_latent_budget": True}
            (model / file.name).write_text(json.dumps(values))
        else:
            os.symlink(file, model / file.name)
    write_recipe(tmp_path / "run.yaml", model, world, files[0], train={"max_steps": 1}, eval={"prompts": 0})
    assert main([str(tmp_path / "run.yaml")]) == 0
    assert "latent.train_going_on: nothing to train" in capsys.readouterr().out
    assert all("going_on_loss" not in row for row in rows(tmp_path / "run"))


# ---- early stopping -------------------------------------------------------------------------------------------------


def test_waiting_counts_from_the_lowest_loss():
    def waited(*found):
        history = [{"step": 1, "loss": 0.1}, *({"step": i, "eval_loss": loss} for i, loss in enumerate(found))]
        return StopEarly(2).waited(SimpleNamespace(log_history=history))

    assert [waited(), waited(3.0), waited(3.0, 2.0), waited(3.0, 3.0), waited(2.0, 3.0, 2.5, 2.0)] == [0, 0, 0, 1, 3]


def test_a_run_stops_and_ends_with_its_best_weights(tiny_path, world, files, tmp_path, monkeypatch, capsys):
    """Losses 3, 2, 2.5, 2: it stops at step 4 of 8. Killed there, it makes no further step and ends alike."""
    values = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0}
    monkeypatch.setattr(
        trainer_module.LatentLosses,
        "evaluation_loop",
        lambda self, *a, **k: EvalLoopOutput(None, None, {"eval_loss": values[self.state.global_step]}, 1),
    )
    recipe = write_recipe(
        tmp_path / "run.yaml",
        tiny_path,
        world,
        files[0],
        train={"max_steps": 8},
        eval={"records": str(files[1]), "patience": 2, "prompts": 0},
        log={"save_every": 1, "keep": 2},
    )
    save_final = trainer_module.save_final

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "save_final", killed)
    with pytest.raises(KeyboardInterrupt):
        main([str(recipe)])
    output = tmp_path / "run"
    assert [row["step"] for row in rows(output) if "loss" in row] == [1, 2, 3, 4]
    assert "early stopping: no lower eval_loss in 2 evaluations, at step 4" in capsys.readouterr().out
    kept = sorted(folder.name for folder in (output / "checkpoints").iterdir())
    assert kept == ["checkpoint-2", "checkpoint-4"]  # the best one stays
    monkeypatch.setattr(trainer_module, "save_final", save_final)
    assert main([str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "final is checkpoint-2, the lowest eval_loss: 2.0000" in said
    assert [row["step"] for row in rows(output) if "loss" in row] == [1, 2, 3, 4]
    best, last = (load_file(output / "checkpoints" / f"checkpoint-{n}" / "model.safetensors") for n in (2, 4))
    final = load_file(output / "final" / "model.safetensors")
    assert all(torch.equal(final[name], best[name]) for name in final)
    assert any(not torch.equal(final[name], last[name]) for name in final)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"patience": 2}, "eval.patience: has no effect without held-out records. Set eval.records as well"),
        ({"videos": "x"}, "eval.videos: has no effect without held-out records"),
        ({"records": "x.json", "patience": 2, "every": 3}, "log.save_every is 0, eval.every 3: make them equal"),
        ({"every": 0}, "eval.every: expected at least 1, found 0"),
        ({"prompts": -1}, "eval.prompts: expected at least 0, found -1"),
    ],
)
def test_keys_that_cannot_be(tmp_path, world, files, values, expected):
    with pytest.raises(ConfigError, match=expected):
        load_recipe(write_recipe(tmp_path / "run.yaml", tmp_path, world, files[0], eval=values), SftRecipe)


# ---- spans of decoded answers ---------------------------------------------------------------------------------------

TOKENS = LatentTokens(latent=7, start=8, end=9)


def test_spans_are_counted():
    """Three answers: a span of 2 and an empty one; text only; a span cut off before and one behind its first latent."""
    answers = [[1, 8, 7, 7, 9, 2, 8, 9], [1, 2], [8, 7, 7, 7, 9, 8]]
    counts = SpanCounts.of(answers, TOKENS)
    assert counts == SpanCounts(responses=3, spans=3, empty=1, latents=5)
    found = counts.metrics()
    assert found == {"spans_per_response": 1.0, "share_of_empty_spans": 0.3333, "latents_per_span": 1.6667}
    assert SpanCounts.of([[1, 2]], TOKENS).metrics() == dict.fromkeys(SPANS, 0.0)
    assert SpanCounts.of([[8, 7]], TOKENS).spans == 1


class Stub:
    """What the probe asks of a trainer: one of two ranks, which is told of no other."""

    def __init__(self, model, rank):
        self.model = model
        self.args = SimpleNamespace(
            process_index=rank, world_size=2, per_device_eval_batch_size=1, device=torch.device("cpu")
        )
        self.accelerator = SimpleNamespace(
            unwrap_model=lambda model: model,
            autocast=lambda: torch.autocast("cpu", enabled=False),
            reduce=lambda sums, reduction: sums,
        )


@pytest.mark.parametrize("divided", [False, True])
def test_ranks_answer_their_share_and_under_zero3_step_by_step(tiny_path, world, files, monkeypatch, divided):
    """Three prompts on two ranks. Where weights are divided, both make 2 x 5 passes, whatever the answers are."""
    model, processor = load(tiny_path, dtype=torch.float32)
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))  # ends at once
    model.train()
    monkeypatch.setattr(module, "divided", lambda: divided)
    records = list(load_records(files[0], video_root=world.videos))[:3]
    tokens = LatentConfig.from_hf(model.config).tokens
    probe = SpanProbe(records, processor, tokens, "video", max_new_tokens=5)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    drawn = torch.get_rng_state()
    for rank, (responses, without) in enumerate(((2, 2), (1, 1))):
        passes.clear()
        counts = probe.count(Stub(model, rank))
        assert counts.responses == responses
        assert len(passes) == (2 * 5 if divided else without)
        assert counts.spans == 0  # each answer was cut off at its end
    handle.remove()
    assert model.training and torch.equal(torch.get_rng_state(), drawn)


def verdict(row, patience=None, **keys):
    """What is said of a run whose last evaluation was this one, the best one at step 1."""
    recipe = SftRecipe(model="m", output="o")
    for name, value in keys.items():
        setattr(recipe.latent, name, value)
    recipe.eval.patience = patience
    found = Evaluation.__new__(Evaluation)
    found.recipe, found.spans, found.probe = recipe, True, SimpleNamespace(records=[1, 2, 3])
    history = [{"step": 1, "eval_loss": 1.0, **dict(zip((f"eval_{n}" for n in SPANS), (2.0, 0.0, 4.0), strict=True))}]
    history.append({"step": 2, "eval_loss": 2.0, **dict(zip((f"eval_{n}" for n in SPANS), row, strict=True))})
    return found.verdict(SimpleNamespace(log_history=history, best_global_step=1, best_metric=1.0))


def test_a_run_of_empty_spans_says_so():
    assert verdict((2.0, 0.5, 4.0)) == []
    (line,) = verdict((2.0, 0.75, 1.0), train_going_on=False)
    assert line.startswith("warning: 75% of the latent spans") and "latent.train_going_on=false" in line
    (line,) = verdict((2.0, 0.75, 1.0))
    assert "too few steps (train.max_steps" in line and "train_going_on" not in line
    (line,) = verdict((0.0, 0.0, 0.0))
    assert line.startswith("warning: none of the 3 answers decoded holds a latent span")
    assert verdict((0.0, 0.0, 0.0), patience=1) == ["final is checkpoint-1, the lowest eval_loss: 1.0000"]
