"""LA-DAPO in TRL's GRPOTrainer: on verl's batch, for two steps, and with settings that it must refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOConfig

from future_l1_plugin.data import make_world
from future_l1_plugin.data.rl import load_prompts
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.rl.groups import NotFinite, RolloutError
from future_l1_plugin.integrations.rl.metrics import METRICS
from future_l1_plugin.integrations.rl.settings import LatentSection, checked_rewards
from future_l1_plugin.integrations.trl.settings import ACT, loss_settings
from future_l1_plugin.integrations.trl.trainer import LaDapoTrainer, Row
from future_l1_plugin.la_dapo import Rollout
from future_l1_plugin.latent.channel import latent_head
from future_l1_plugin.model import LatentConfig, convert, load, make_tiny
from future_l1_plugin.model.tiny import copy_micro_base

#: Made by test_easyr1_reference.py with the verl integration.
REFERENCE = json.loads((Path(__file__).parent / "easyr1" / "reference.json").read_text())
REWARDS = [
    {"term": "accuracy", "weight": 0.9},
    {"term": "r_ctr", "weight": 0.2},
    {"term": "repetition", "weight": 1.0, "n": 1},  # the micro base is hardly ever right: so that groups differ
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return copy_micro_base(tmp_path_factory.mktemp("trl") / "base")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("trl") / "world", test=8, train=0, perception=0, progress=False)
    return load_prompts(world.futurebench, video_root=world.videos, num_frames=4)


def settings(out, **values) -> GRPOConfig:
    """Two prompts with four responses each a step, in two passes of four."""
    small = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 2,
        "beta": 0.01,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return GRPOConfig(str(out), **{**small, **values})


@pytest.fixture
def make_trainer(base, prompts, tmp_path):
    def make(bounds=None, latent=None, path=base, force=True, **values):
        model, processor = load(path, dtype=torch.float32, force_initial_latent_mode=force)
        section, args = LatentSection(**(latent or {})), settings(tmp_path, **values)
        return LaDapoTrainer(model, processor, prompts, checked_rewards(REWARDS), args, section, bounds)

    return make


def reference_batch() -> dict:
    """The batch of the reference file, in the trainer's columns."""
    found = REFERENCE["rows"]

    def vectors(seed, row):
        return torch.randn(row["response"].count(452), 128, generator=torch.Generator().manual_seed(seed))

    def a_row(i, row):
        ids, prompt = torch.tensor(row["response"]), torch.tensor([row["prompt"]])
        rollout = Rollout(ids, torch.tensor(row["mask"]).bool(), torch.zeros(len(ids)), vectors(i, row))
        inputs = {"input_ids": prompt, "attention_mask": prompt > -1, "mm_token_type_ids": torch.zeros_like(prompt)}
        return Row({name: value.long() for name, value in inputs.items()}, rollout)

    def column(name):
        rows = [torch.tensor(row[name], dtype=torch.float64) for row in found]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return {
        "rows": [a_row(i, row) for i, row in enumerate(found)],
        "kept": torch.ones(len(found), dtype=torch.bool),
        "advantages": torch.tensor([row["advantage"] for row in found]),
        "old_per_token_logps": column("old_log_probs"),
        "ref_per_token_logps": column("ref_log_probs"),
        "ref_mu": [vectors(100 + i, row) for i, row in enumerate(found)],
    }


@pytest.mark.parametrize("size", [1, 4])
def test_log_probs_loss_and_gradient_are_verls(make_trainer, size):
    expected = REFERENCE["settings"]
    trainer = make_trainer(
        latent={"policy": REFERENCE["policy"], "kl_weight": expected["latent_kl_weight"]},
        force=False,
        beta=expected["kl_weight"],
        epsilon_high=expected["clip_high"],
        delta=3.0,
        temperature=REFERENCE["temperature"],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=4 // size,
    )
    batch = reference_batch()
    with torch.no_grad():
        log_probs, _ = trainer._score(trainer.model, batch["rows"])
    for row, values in zip(REFERENCE["rows"], log_probs, strict=True):
        chosen = torch.tensor(row["mask"]).bool()
        given = torch.tensor(row["log_probs"], dtype=torch.float64)
        torch.testing.assert_close(values[: len(chosen)][chosen], given[chosen], atol=1e-4, rtol=0)
    batch["num_actions"] = torch.stack([mask.sum(1) for mask in trainer._masks(batch["rows"], batch["kept"])], 1)
    parts = [{name: column[i : i + size] for name, column in batch.items()} for i in range(0, 4, size)]
    trainer._buffered_inputs = parts
    total = 0.0
    for trainer._step, part in enumerate(parts):
        loss = trainer.compute_loss(trainer.model, part)
        loss.backward()
        total += loss.item()
    squares = sum(float(p.grad.square().sum()) for p in trainer.model.parameters() if p.grad is not None)
    assert total == pytest.approx(REFERENCE["loss"], abs=1e-4)
    assert squares**0.5 == pytest.approx(REFERENCE["grad_norm"], rel=1e-3)
    metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    parts = {"text/pg_loss": 1.0, "latent/pg_loss": 0.5, "text/kl_ref": 0.05, "latent/kl_ref": 0.2}
    assert sum(w * metrics[f"actor/{name}"] for name, w in parts.items()) == pytest.approx(REFERENCE["loss"], abs=1e-4)


def test_two_steps(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "reward" in entry)
    for step in (first, second):
        assert 0 < step["rollout_gap/text_max"] < 1e-4 and 0 < step["rollout_gap/latent_max"] < 1e-4
        assert step["grad_norm"] > 0 and step["latent/spans_per_response"] == 1
        assert step["actor/text/ratio"] == pytest.approx(1, abs=1e-4) == step["actor/latent/ratio"]
        assert step["reward"] == pytest.approx(step["rewards/la_dapo/mean"], abs=1e-5)
    assert abs(first["actor/latent/kl_ref"]) < 1e-9 < second["actor/latent/kl_ref"]
    ours = [m for m in METRICS if "TRL" in m.hosts and m.name != "latent/adjacent_cosine"]  # one span a response
    assert [m.name for m in ours if not any(m.matches(name) for name in second)] == []
    trainer.save_model()
    assert LatentConfig.from_hf(load(tmp_path)[0].config).latent_id == trainer.latent.latent_id


def test_several_updates_of_one_batch(make_trainer):
    """Rollouts of two updates, used twice: TRL's own buffers."""
    trainer = make_trainer(steps_per_generation=4, num_iterations=2, max_steps=4)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    moved = [abs(step["actor/text/ratio"] - 1) for step in steps]
    assert len(steps) == 4 and moved[0] < 1e-4 < min(moved[2:])


def test_a_group_outside_of_the_bounds_has_no_part(make_trainer):
    """The loss of a batch with left-out rows is that of the other rows alone, and a batch of them has none."""
    trainer = make_trainer(gradient_accumulation_steps=1)

    def loss_of(rows, kept):
        batch = {name: column[:rows] for name, column in reference_batch().items()}
        batch["kept"] = torch.arange(rows) < kept
        batch["num_actions"] = torch.stack([mask.sum(1) for mask in trainer._masks(batch["rows"], batch["kept"])], 1)
        trainer._buffered_inputs = [batch]
        return trainer.compute_loss(trainer.model, batch)

    assert loss_of(4, 3).item() == pytest.approx(loss_of(3, 3).item(), abs=1e-6) != loss_of(4, 4).item()
    loss = loss_of(4, 0)
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_without_a_group_the_run_ends(make_trainer):
    trainer = make_trainer(bounds=(0.9, 1.0))
    with pytest.raises(
        RolloutError, match=r"0 of 2 groups can be trained on.* 2 too hard.*gradient_accumulation_steps"
    ):
        trainer.train()


def test_what_is_not_finite_ends_the_run(make_trainer):
    trainer = make_trainer()
    batch = reference_batch()
    batch["num_actions"] = torch.stack([mask.sum(1) for mask in trainer._masks(batch["rows"], batch["kept"])], 1)
    batch["advantages"][2] = float("inf")
    trainer._buffered_inputs = [batch, batch]
    with pytest.raises(NotFinite, match="step 1: expected a finite loss, found"):
        trainer.compute_loss(trainer.model, batch)
    next(trainer.model.lm_head.parameters()).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(NotFinite, match="step 1: expected a finite gradient norm, found nan"):
        trainer.train()


def test_the_reference_has_the_latent_head(make_trainer, tmp_path):
    plain = make_tiny(tmp_path / "plain", latent=False)
    path = convert(plain, tmp_path / "headed", use_projection_head=True, projection_head_type="lvr")
    trainer = make_trainer(path=path)
    own, reference = (latent_head(model).state_dict() for model in (trainer.model, trainer.ref_model))
    assert own and all(torch.equal(own[name], reference[name]) for name in own)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_vllm": True}, "use_vllm: True would have no effect"),
        ({"loss_type": "grpo"}, "loss_type: 'grpo' would have no effect"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"reward_weights": [1.0]}, "reward_weights"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
        ({"use_liger_kernel": True}, "use_liger_kernel: latents need false"),
        ({"scale_rewards": "batch"}, "scale_rewards: latents need group or none; found batch"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy: latents need no"),
        ({"temperature": 0.0}, "temperature: latents need a number above 0"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"per_device_train_batch_size": 2, "generation_batch_size": 8, "gradient_accumulation_steps": 3},
         "steps_per_generation: latents need a multiple of gradient_accumulation_steps, 3"),
        ({"beta": 0.0}, "latent.kl_weight: 0.01, but TRL keeps a reference only"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_errors(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        loss_settings(settings(tmp_path, **values), LatentSection())


def test_answers_that_nobody_can_judge_are_refused(base, prompts, tmp_path):
    model, processor = load(base, dtype=torch.float32)
    text = [replace(prompts[0], options=None, kind="text", ground_truth="It rolls back to the left.")]
    with pytest.raises(DataError, match="1 of 1 prompts have a free-text answer"):
        LaDapoTrainer(model, processor, text, checked_rewards(REWARDS), settings(tmp_path), LatentSection())


def test_settings_make_the_loss(tmp_path):
    found = loss_settings(settings(tmp_path, epsilon=0.1, delta=3.0), LatentSection(weight=0.7))
    assert (found.clip_low, found.clip_high, found.dual_clip, found.kl_weight) == (0.1, 0.1, 3.0, 0.01)
    assert (found.latent_weight, found.latent_kl_weight) == (0.7, 0.01)
    assert set(vars(settings(tmp_path))) >= ACT
    with pytest.raises(ConfigError, match="val_policy"):
        loss_settings(settings(tmp_path), LatentSection(val_policy={"name": "vmf", "mean_cosine": 0.9}))
    plain = loss_settings(settings(tmp_path, beta=0.0), LatentSection(kl_weight=0.0))
    assert plain.kl_weight == plain.latent_kl_weight == 0
