"""What may change when a run goes on: the table, the comparison, digests of inputs, whole checkpoints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.sft.recipe import SftRecipe
from future_l1_plugin.resume import TABLES, Inputs, changes, check, delete, flat, newest_whole, rule_of, seal
from future_l1_plugin.resume.__main__ import page
from future_l1_plugin.resume.checkpoints import MARKER
from future_l1_plugin.resume.table import UNLISTED

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SFT = [*sorted(RECIPES.glob("**/sft*.yaml")), RECIPES / "micro_base.yaml"]
VERL = sorted([*RECIPES.glob("la_dapo*.yaml"), *(file for file in RECIPES.glob("ablations/*.yaml") if file not in SFT)])
EASYR1 = sorted(RECIPES.glob("easyr1/*.yaml"))


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "file"),
    [("sft", f) for f in SFT] + [("verl", f) for f in VERL] + [("easyr1", f) for f in EASYR1],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_key_of_every_recipe_has_its_class(host, file):
    """A new key is put into one: into `future_l1_plugin/resume/table.py`."""
    keys = {key for key in flat(yaml.safe_load(file.read_text())) if key.split(".")[0] not in ("defaults", "hydra")}
    assert not [key for key in sorted(keys) if rule_of(host, key) is UNLISTED]


def test_every_key_that_an_sft_recipe_may_have_has_its_class():
    keys = flat(OmegaConf.to_container(OmegaConf.structured(SftRecipe(model="m", output="o"))))
    assert len(keys) > 50
    assert not [key for key in keys if rule_of("sft", key) is UNLISTED]


def test_no_rule_is_hidden_behind_an_earlier_one():
    """A pattern without a wildcard that an earlier rule fits would never be asked."""
    for host, rules in TABLES.items():
        for rule in rules:
            for key in rule.keys:
                for each in _spelled(key):
                    if "*" not in each:
                        assert rule_of(host, each) is rule, f"{host}: {each}"


def _spelled(key: str) -> list[str]:
    found = re.search(r"\{([^}]*)\}", key)
    if not found:
        return [key]
    return [one for part in found[1].split(",") for one in _spelled(key[: found.start()] + part + key[found.end() :])]


def test_the_page_is_written_from_the_table():
    assert (RECIPES / "resume.md").read_text() == page(), "run: python -m future_l1_plugin.resume > recipes/resume.md"
    for recipe in (RECIPES / "sft.yaml", RECIPES / "la_dapo.yaml", RECIPES / "easyr1" / "la_dapo.yaml"):
        assert "resume.md" in recipe.read_text()


def test_neither_torch_nor_a_host_is_loaded():
    code = (
        "import sys, future_l1_plugin.resume; print([m for m in ('torch', 'verl', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- the comparison -------------------------------------------------------------------------------------------------


def kind_of(host: str, key: str, old, new) -> str:
    found = changes(host, {key: old}, {key: new})
    return "refused" if found.refused else "extends" if found.extended else "said" if found.said else "free"


@pytest.mark.parametrize(
    ("host", "key", "old", "new", "expected"),
    [
        ("sft", "data.max_length", 512, 1024, "extends"),
        ("sft", "data.max_length", 1024, 512, "refused"),
        ("sft", "train.max_steps", 4, 8, "extends"),
        ("sft", "train.max_steps", 8, 4, "refused"),
        ("sft", "train.max_steps", -1, 500, "refused"),  # by epochs before: nobody can tell which is longer
        ("sft", "train.epochs", 1.0, 2.0, "extends"),
        ("sft", "data.on_bad", "raise", "skip", "extends"),
        ("sft", "data.on_bad", "skip", "raise", "refused"),
        ("sft", "train.micro_batch_size", 8, 4, "said"),
        ("sft", "train.gradient_checkpointing", False, True, "free"),
        ("sft", "train.learning_rate", "1e-05", 1e-5, "free"),  # the same number
        ("sft", "train.learning_rate", 1e-5, 5e-6, "refused"),
        ("sft", "train.something_new", None, 1, "refused"),
        ("sft", "model", "a", "b", "free"),
        ("sft", "qwen_vl_finetune.path", "a", "b", "free"),
        ("sft", "qwen_vl_finetune.path", None, "b", "refused"),
        ("sft", "hf_trainer.deepspeed", "zero2", "zero3", "refused"),
        ("sft", "processes", 8, 4, "refused"),
        ("sft", "devices", 2, 1, "said"),
        ("verl", "ranks", 8, 4, "refused"),
        ("verl", "groups.max_failed", 16, 32, "extends"),
        ("verl", "groups.max_failed", 32, 16, "extends"),  # what was done is the same
        ("verl", "trainer.total_epochs", 1, 2, "extends"),
        ("verl", "rewards.0.judge.base_url", "http://a", "http://b", "free"),
        ("verl", "rewards.0.judge.model", "a", "b", "refused"),
        ("verl", "rewards.0.weight", 0.9, 0.8, "refused"),
        ("verl", "actor_rollout_ref.actor.checkpoint.save_contents", ["model", "optimizer", "extra", "hf_model"],
         ["model", "optimizer", "extra"], "free"),
        ("verl", "actor_rollout_ref.actor.checkpoint.load_contents", ["model", "optimizer", "extra"], ["model"],
         "refused"),
        ("easyr1", "trainer.max_try_make_batch", 10, 20, "extends"),
        ("easyr1", "worker.actor.optim.lr", 1e-6, 1e-5, "refused"),
        ("easyr1", "worker.actor.offload.offload_params", True, False, "free"),
    ],
)  # fmt: skip
def test_changes(host, key, old, new, expected):
    assert kind_of(host, key, old, new) == expected


#: What errors of the product tell users of a run under way to set, by the file that says so and some of its words.
ADVISED = [
    ("sft", "data.max_length", 512, 2048, "data/record_lengths.py", "data.max_length is"),
    ("sft", "data.on_bad", "raise", "skip", "data/sft.py", "go on without it by data.on_bad=skip"),
    ("sft", "data.max_failed", 100, 200, "data/sft.py", "data.max_failed is {most}"),
    ("sft", "train.micro_batch_size", 8, 1, "integrations/sft/fit.py", "train.micro_batch_size=1"),
    ("sft", "train.gradient_checkpointing", False, True, "integrations/sft/fit.py", "gradient_checkpointing=true"),
    ("sft", "train.check_memory", True, False, "integrations/sft/fit.py", "train.check_memory=false"),
    ("sft", "train.attn_implementation", None, "eager", "integrations/sft/finite.py", "train.attn_implementation"),
    ("verl", "data.max_prompt_length", 256, 2048, "integrations/verl/dataset.py", "Raise it"),
    ("verl", "actor_rollout_ref.rollout.max_model_len", 352, 2144, "integrations/verl/dataset.py", "max_model_len"),
    ("verl", "data.future_l1.on_bad", "raise", "skip", "integrations/verl/dataset.py", "data.future_l1.on_bad=skip"),
    ("verl", "groups.max_failed", 16, 32, "integrations/verl/groups.py", "groups.max_failed is"),
    ("verl", "groups.max_rounds", 10, 20, "integrations/verl/groups.py", "groups.max_rounds"),
    ("verl", "actor_rollout_ref.rollout.custom.wave_timeout_s", 60, 600, "integrations/verl/rollout_server.py",
     "raise actor_rollout_ref.rollout.custom.wave_timeout_s"),
    ("verl", "actor_rollout_ref.rollout.enable_sleep_mode", False, True, "integrations/vllm/allocator.py",
     "set {key}=true"),
    ("verl", "actor_rollout_ref.model.override_config.attn_implementation", None, "sdpa",
     "integrations/verl/settings.py", "attn_implementation"),
    ("verl", "groups.stall_s", 3600, 7200, "integrations/verl/groups.py", "raise groups.stall_s"),
    ("verl", "actor_rollout_ref.rollout.agent.num_workers", 8, 4, "integrations/verl/watch.py", "agent.num_workers"),
    ("verl", "reward.num_workers", 8, 4, "integrations/verl/watch.py", "reward.num_workers"),
    ("verl", "data.future_l1.frame_cache_mb", 2048, 256, "integrations/verl/watch.py", "frame_cache_mb"),
    ("verl", "actor_rollout_ref.actor.fsdp_config.optimizer_offload", False, True, "integrations/verl/shape.py",
     "{fsdp}.optimizer_offload=true"),
    ("verl", "actor_rollout_ref.actor.fsdp_config.offload_policy", False, True, "integrations/verl/shape.py",
     "{fsdp}.offload_policy=true"),
    ("verl", "actor_rollout_ref.rollout.max_num_seqs", 64, 32, "integrations/verl/shape.py", "rollout.max_num_seqs="),
    ("sft", "train.attn_implementation", "flash_attention_2", "sdpa", "integrations/sft/run.py",
     "train.attn_implementation"),
    ("verl", "rewards.0.judge.cache", "a.db", "b.db", "endpoint/cache.py", "set `cache` to another path"),
    ("verl", "rewards.0.judge.api_key_file", None, "key", "endpoint/settings.py", "name that as api_key_file"),
    ("easyr1", "trainer.max_try_make_batch", 10, 20, "integrations/easyr1/trainer.py", "max_try_make_batch"),
    ("easyr1", "data.max_prompt_length", 256, 2048, "integrations/easyr1/dataset.py", "max_prompt_length"),
]  # fmt: skip


@pytest.mark.parametrize(("host", "key", "old", "new", "file", "words"), ADVISED, ids=lambda value: None)
def test_what_an_error_advises_can_be_resumed(host, key, old, new, file, words):
    source = (RECIPES.parent / "future_l1_plugin" / file).read_text()
    assert words in re.sub(r'"\s*\n\s*f?"', "", source), f"{file} says something else now: bring this list up to date"
    assert kind_of(host, key, old, new) != "refused"


def test_a_refusal_names_key_values_and_what_to_do():
    old = {"train.seed": 0, "data.max_length": 512}
    with pytest.raises(ConfigError) as error:
        check("sft", old, {"train.seed": 1, "data.max_length": 256}, "outputs/a holds a run", "Or name another output.")
    assert str(error.value) == (
        "outputs/a holds a run with other settings (data.max_length: 512 -> 256 (it may be raised, not lowered); "
        "train.seed: 0 -> 1). Set them back, to go on with it (recipes/resume.md says which keys may change). Or name "
        "another output."
    )


def test_a_refusal_that_needs_it_says_why():
    (line,) = changes("verl", {"ranks": 8}, {"ranks": 4}).refused
    assert line == "ranks: 8 -> 4 (a checkpoint is read by as many ranks as wrote it)"


def test_what_is_extended_is_said():
    lines = check("sft", {"train.max_steps": 4}, {"train.max_steps": 8}, "", "")
    assert lines == [
        "going on with more: train.max_steps: 4 -> 8 (a schedule over all steps (cosine, warm-up) is the longer run's "
        "from here on)"
    ]


def test_sections_that_an_older_version_did_not_keep_are_not_compared():
    assert not changes("verl", {"latent.weight": 0.5}, {"latent.weight": 0.5, "reward.new": 1}).refused
    assert changes("verl", {"latent.weight": 0.5}, {"latent.weight": 0.5, "latent.new": 1}).refused


def test_flat_numbers_lists_of_sections():
    values = {"a": {"b": [{"c": 1}, {"c": 2}], "d": [1, 2]}, "e": {}}
    assert flat(values) == {"a.b.0.c": 1, "a.b.1.c": 2, "a.d": [1, 2], "e": {}}


# ---- inputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    """A folder with records, a start checkpoint and two clips."""
    home = tmp_path / "world"
    (home / "start").mkdir(parents=True)
    (home / "sft.json").write_text("[1, 2]")
    (home / "start" / "config.json").write_text("{}")
    (home / "start" / "model.safetensors").write_bytes(bytes(1000))
    (home / "start" / "README.md").write_text("a card")
    for name in ("a.mp4", "b.mp4"):
        (home / name).write_bytes(b"clip")
    return home


def taken(home: Path, ids=("x", "y")) -> Inputs:
    return Inputs.of([home / "sft.json"], ids, home / "start", [home / "a.mp4", home / "b.mp4"])


def test_a_moved_folder_is_free(world, tmp_path):
    before = taken(world)
    before.write(tmp_path)
    world.rename(tmp_path / "elsewhere")
    now = taken(tmp_path / "elsewhere")
    assert now == before == Inputs.read(tmp_path)
    now.check(before, "outputs/a", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda home: (home / "sft.json").write_text("[1, 3]"), "record files (sft.json was changed)"),
        (
            lambda home: [(home / name).write_bytes(b"longer") for name in ("a.mp4", "b.mp4")],
            "videos and images (a.mp4 was changed, b.mp4 was changed)",
        ),
        (
            lambda home: (home / "start" / "model.safetensors").write_bytes(bytes(999) + b"1"),
            "files of the start checkpoint (model.safetensors was changed)",
        ),
        (lambda home: (home / "start" / "config.json").unlink(), "start checkpoint (config.json is gone)"),
        (lambda home: (home / "start" / "more.json").write_text("{}"), "start checkpoint (more.json is new)"),
    ],
)
def test_an_edit_in_place_is_named(world, change, said):
    before = taken(world)
    change(world)
    with pytest.raises(DataError, match=re.escape(said)):
        taken(world).check(before, "outputs/a", "Or name another output.")


def test_what_no_tool_reads_of_a_checkpoint_may_change(world):
    before = taken(world)
    (world / "start" / "README.md").write_text("another card")
    taken(world).check(before, "outputs/a", "")


def test_a_repaired_clip_is_said(world):
    """A run that stopped at a clip is told to fix it. Of two clips one may be; see the test before for both."""
    before = taken(world)
    (world / "a.mp4").write_bytes(b"longer")
    lines = taken(world).check(before, "outputs/a", "")
    assert lines == ["going on although a.mp4 is not the file of the run's start (repaired, or gone)"]
    (world / "a.mp4").unlink()
    assert taken(world).check(before, "outputs/a", "") == lines


def test_other_records_or_another_order_are_named(world):
    before = taken(world)
    with pytest.raises(DataError, match=r"their order \(2 -> 3: a limit, on_bad"):
        taken(world, ("x", "y", "z")).check(before, "outputs/a", "")
    with pytest.raises(DataError, match=r"2 -> 2 \(as many, but others\)"):
        taken(world, ("y", "x")).check(before, "outputs/a", "")


def test_large_weights_are_read_at_64_places(world, monkeypatch):
    """1,000 bytes, in blocks of 4 at 64 places: the last byte counts, and the size; one between two places does not."""
    monkeypatch.setattr("future_l1_plugin.resume.inputs._WHOLE", 100)
    monkeypatch.setattr("future_l1_plugin.resume.inputs._BLOCK", 4)
    file = world / "start" / "model.safetensors"
    before = taken(world).checkpoint["model.safetensors"]
    assert before.startswith("1000 ")
    file.write_bytes(bytes(10) + b"1" + bytes(989))  # places are at 0, 15, 31, ..
    assert taken(world).checkpoint["model.safetensors"] == before
    for content in (bytes(999) + b"1", b"1" + bytes(999), bytes(1001)):
        file.write_bytes(content)
        assert taken(world).checkpoint["model.safetensors"] != before


def test_a_missing_record_file_is_named(world):
    (world / "sft.json").unlink()
    with pytest.raises(DataError, match=r"sft\.json: cannot be read"):
        taken(world)


# ---- whole checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """checkpoint-2, -4 and -10, sealed, with a file of a rank in a folder of its own, as DeepSpeed has it."""
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "global_step").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(step))
        (folder / "global_step" / "rank_0.pt").write_bytes(bytes(5))
        seal(folder)
    return tmp_path


def test_the_newest_whole_one_is_found(saved):
    assert newest_whole(saved).newest == saved / "checkpoint-10"
    assert newest_whole(saved).broken == {}
    assert newest_whole(saved / "nowhere").newest is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MARKER).unlink(), "its saving did not come to an end"),
        (lambda folder: (folder / MARKER).write_text('{"mod'), "its whole.json is broken"),
        (lambda folder: (folder / "global_step" / "rank_0.pt").unlink(), "global_step/rank_0.pt is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors has 0 bytes, expected 10"),
    ],
)
def test_one_that_is_not_whole_is_passed_over_and_said(saved, damage, reason):
    damage(saved / "checkpoint-10")
    found = newest_whole(saved)
    assert (found.newest, found.step) == (saved / "checkpoint-4", 4)
    assert found.lines() == [f"passed over {saved / 'checkpoint-10'}: {reason}"]


def test_a_deletion_that_is_killed_leaves_nothing_whole(saved, monkeypatch):
    monkeypatch.setattr("future_l1_plugin.resume.checkpoints.shutil.rmtree", lambda *args, **kwargs: None)
    delete(saved / "checkpoint-10")
    assert newest_whole(saved).newest == saved / "checkpoint-4"


def test_the_marker_is_written_last_and_to_the_disk(tmp_path, monkeypatch):
    """Every file and folder is flushed before the marker appears."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"1")
    flushed = []

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.append((Path(name).name.lstrip(".").split(".")[0], (tmp_path / "a" / MARKER).exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    seal(tmp_path / "a")
    assert flushed[:3] == [("weights", False), ("a", False), ("whole", False)]
    assert json.loads((tmp_path / "a" / MARKER).read_text()) == {"weights": 1}
