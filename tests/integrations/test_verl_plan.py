"""`future-l1 plan`: its arithmetic by hand, the shipped recipe at its real size, what it refuses, and the ways out."""

import json
import re
from dataclasses import replace

import pytest
from real_size import write_config

pytest.importorskip("verl")

from future_l1_plugin.cli import main
from future_l1_plugin.data import make_world
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.verl.compose import compose
from future_l1_plugin.integrations.verl.memory import (
    ASLEEP,
    GIB,
    GRAPHS,
    RESERVE,
    Engine,
    ModelCounts,
    Setup,
    checkpoint_bytes,
    kv_tokens,
    needed,
    passing,
    phases,
    resident,
)
from future_l1_plugin.integrations.verl.plan import make_plan
from future_l1_plugin.integrations.verl.settings import Settings
from future_l1_plugin.paths import recipes_dir

FILES = ["data.train_files=[rl.json]", "data.val_files=[futurebench.json]"]
SDPA = "++actor_rollout_ref.model.override_config.attn_implementation=sdpa"

# ---- the arithmetic, on round numbers -------------------------------------------------------------------------------

MODEL = ModelCounts(
    total=8_000,
    trained=7_000,
    largest_unit=1_000,
    outside_units=100,
    largest_tensor=900,
    layers=2,
    hidden=10,
    inner=30,
    queries=20,
    keys=5,
    vocabulary=50,
    vision_layers=3,
    vision_hidden=4,
    vision_inner=6,
    patches=4,
    patch=8,
    stored=2,
)
ENGINE = Engine(
    sleeps=True,
    pooled=True,
    utilization=0.5,
    dtype=2,
    parallel=2,
    sequences=3,
    length=40,
    batched=100,
    bucket=64,
)
SETUP = Setup(
    gpus=4,
    gpu_bytes=80 * GIB,
    tokens=100,
    old_tokens=100,
    reference_tokens=100,
    checkpointing=True,
    model_dtype=4,
    param_dtype=2,
    reduce_dtype=4,
    weights_away=False,
    optimizer_away=False,
    all_away=False,
    flash=True,
    packed=True,
    scaled=True,
    entropy="compiled",
    entropy_trained=False,
    vision_frozen=True,
    engine=ENGINE,
)


def sizes(parts):
    return {part.name: part.bytes for part in parts}


def test_what_the_actor_keeps():
    assert sizes(resident(MODEL, SETUP)) == {"actor's weights": 4 * 8000 / 4, "its optimiser": 8 * 7000 / 4}
    away = replace(SETUP, optimizer_away=True)
    assert sizes(resident(MODEL, away)) == {"actor's weights": 8000, "its optimiser": 0}
    assert sizes(phases(MODEL, replace(SETUP, weights_away=True))["rollout"])["actor's weights"] == 0
    assert sizes(phases(MODEL, replace(SETUP, weights_away=True))["update"])["actor's weights"] == 8000


def test_a_training_pass():
    layer = 2 * 100 * (6 * 10 + 3 * 20 + 4 * 5 + 4 * 30)  # 52,000
    expected = {
        "gathered units": 2 * (2 * 1000 + 100),
        "a unit's gradient": (2 + 4) * 1000,
        "decoder": 2 * 100 * 10 * 2 + layer,
        "vision tower": 2 * 100 * (4 * (9 * 4 + 2 * 6 + 8) + 4 * 10),
        "logits": 4 * 100 * 50,
    }
    assert sizes(passing(MODEL, SETUP, 100, trains=True)) == expected
    plain = sizes(passing(MODEL, replace(SETUP, checkpointing=False), 100, trains=True))
    assert plain["decoder"] == 2 * layer
    sdpa = sizes(passing(MODEL, replace(SETUP, flash=False), 100, trains=True))
    assert sdpa["attention mask"] == 3 * 100 * 100
    assert sdpa["logits"] == (2 + 2 + 4) * 100 * 50, "log-softmax in float32 beside two copies"
    assert sizes(passing(MODEL, replace(SETUP, packed=False), 100, True))["logits"] == 6 * 100 * 50


def test_entropies_without_a_compiler():
    def logits(**changes):
        return sizes(passing(MODEL, replace(SETUP, **changes), 4096, trains=False, entropy=True))["logits"]

    assert logits() == 4 * 4096 * 50
    assert logits(entropy="plain") == (4 + 12) * 4096 * 50
    assert logits(entropy="chunked") == (4 + 12 / 2) * 4096 * 50, "a chunk is 2,048 of 4,096 rows"


def test_a_bonus_on_entropy_keeps_them_for_the_update():
    def logits(**changes):
        update = phases(MODEL, replace(SETUP, **{"entropy_trained": True} | changes))["update"]
        return sizes(update)["logits"] / (SETUP.tokens * 50)

    assert logits(entropy_trained=False) == 4
    assert logits() == 4 + 2 * 2, "a gradient of its own, and one that cross-entropy does not write over the logits"
    assert logits(entropy="chunked") == logits(entropy="plain") == 4 + 2 * 2 + 12


def test_the_engine_and_its_cache():
    work = 2 * 100 * (60 + 3 * 30 / 2) + 2 * 40 * 4 * (36 + 12 + 8) + 8 * 3 * 50 + GRAPHS
    cache = 40 * GIB - 2 * 8000 / 2 - work
    assert kv_tokens(MODEL, SETUP) == int(cache // (2 * 2 * 5 * 2 // 2))
    rollout = phases(MODEL, SETUP)["rollout"]
    assert needed(rollout) == 40 * GIB + 8000 + 14000 + RESERVE, "it takes its share, whatever it does with it"
    asleep = sizes(phases(MODEL, SETUP)["update"])
    assert asleep["sleeping engine"] == ASLEEP and asleep["gradients, optimiser"] == 12 * 7000 / 4
    awake = sizes(phases(MODEL, replace(SETUP, engine=replace(ENGINE, sleeps=False)))["update"])
    assert awake["KV cache"] > 0 and awake["engine's weights"] == 8000
    static = replace(SETUP, engine=replace(ENGINE, pooled=False, sleeps=False, parallel=1))
    assert sizes(phases(MODEL, static)["rollout"])["KV cache"] == (2 * 2 * 5 * 2) * 3 * 40
    sent = sizes(phases(MODEL, SETUP)["weight update"])["sent"]
    assert sent == (4 + 2) * 900 + 64


def test_no_reference_no_phase_and_offload_policy():
    assert "reference" not in phases(MODEL, replace(SETUP, reference_tokens=None))
    away = sizes(phases(MODEL, replace(SETUP, all_away=True))["update"])
    assert (away["actor's weights"], away["gradients, optimiser"]) == (0, 0)


def test_a_checkpoint_on_disk():
    found = checkpoint_bytes(MODEL, SETUP, ["model", "optimizer", "extra", "hf_model"])
    assert found == {"model": 32_000, "optimizer": 56_000, "extra": 0, "hf_model": 16_000}


# ---- the shipped recipe at its real size ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_8b(tmp_path_factory):
    """Arguments that name a configuration of the real shape."""
    path = write_config(tmp_path_factory.mktemp("real") / "8b")
    return [f"actor_rollout_ref.model.path={path}", *FILES]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def plan(overrides, name="la_dapo", **keywords):
    return make_plan(recipes_dir() / f"{name}.yaml", overrides, **keywords)


def test_la_dapo_fits_8_gpus_of_80_gb(at_8b, capsys):
    assert main(["plan", str(recipes_dir() / "la_dapo.yaml"), *at_8b]) == 0
    said = capsys.readouterr().out
    assert said.endswith("\nfits\n")
    for line in (
        "parameters: 8,190,735,360 trained, 576,388,336 frozen",
        "mean_cosine: 0.9",
        "training: not checked, rl.json is not here",
        "a checkpoint: 126.3 GiB (model 32.7, optimizer 61.0, hf_model 32.7)",
        "flash_attention_2 needs flash-attn, which is not installed",
    ):
        assert line in said, line
    assert re.search(r"rollout: \d\d\.\d of 80\.0 GiB", said) and re.search(r"update: \d\d\.\d of 80\.0 GiB", said)


def test_one_gpu_is_refused_and_each_way_out_works(at_8b, capsys):
    assert main(["plan", str(recipes_dir() / "la_dapo.yaml"), *at_8b, "trainer.n_gpus_per_node=1"]) == 2
    captured = capsys.readouterr()
    assert "memory a GPU:" in captured.out and not captured.out.endswith("fits\n")
    found = re.search(r"update (\d+\.\d) GiB.*?\. It would fit with (.*)", captured.err)
    assert float(found[1]) > 130, "weights, gradients and two moments in float32: 16 bytes x 8 billion"
    ways = found[2].strip().split(", or with ")
    assert "trainer.n_gpus_per_node=4" in ways
    for way in ways:
        assert plan([*at_8b, "trainer.n_gpus_per_node=1", *way.split()]).problems == []


def test_smaller_gpus_a_cache_that_holds_no_sequence_and_lora(at_8b):
    (problem,) = plan(at_8b, gpu_memory=40).problems
    assert "(40.0 GiB) is not enough: update 46" in problem and "fsdp_config.offload_policy=true" in problem
    assert "trainer.n_gpus_per_node=8 trainer.nnodes=2" in problem
    problems = plan([*at_8b, "actor_rollout_ref.rollout.gpu_memory_utilization=0.27"]).problems
    assert "fewer than one sequence of rollout.max_model_len=15,360" in problems[0]
    lora = ["actor_rollout_ref.model.lora_rank=64", "actor_rollout_ref.model.lora.merge=true"]
    assert plan([*at_8b, *lora, "trainer.n_gpus_per_node=2"]).problems == []


def test_limits_that_cannot_hold_a_sample(at_8b):
    (problem,) = plan([*at_8b, "actor_rollout_ref.rollout.max_model_len=14336"]).problems
    assert problem.startswith(
        "actor_rollout_ref.rollout.max_model_len is 14,336, but a prompt and its response may have"
    )
    assert "Set actor_rollout_ref.rollout.max_model_len=15360 or more" in problem
    problems = plan([*at_8b, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=12288"]).problems
    assert [p.split(" is ")[0].rsplit(".")[-1] for p in problems] == [
        "ppo_max_token_len_per_gpu",
        "log_prob_max_token_len_per_gpu",
        "log_prob_max_token_len_per_gpu",
    ]


def test_micro_batches_of_so_many_samples(at_8b):
    """Without use_dynamic_bsz verl ignores limits of tokens, and a sample may have 15,360."""
    keys = {"actor": "ppo", "rollout": "log_prob", "ref": "log_prob"}
    given = [f"actor_rollout_ref.{part}.{name}_micro_batch_size_per_gpu=4" for part, name in keys.items()]
    given += ["actor_rollout_ref.actor.use_dynamic_bsz=false"]
    given += [f"actor_rollout_ref.{part}.log_prob_use_dynamic_bsz=false" for part in ("rollout", "ref")]
    (problem,) = plan([*at_8b, *given]).problems
    assert "is not enough: " in problem and "update" in problem
    assert "ppo_max_token_len_per_gpu" not in problem
    one = [key.replace("per_gpu=4", "per_gpu=1") for key in given]
    assert plan([*at_8b, *one]).problems == []


def test_on_a_machine_with_gpus_what_is_missing_is_a_problem(at_8b, monkeypatch, tmp_path):
    class Card:
        total_memory = 80 * GIB

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H100")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Card)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 100 * GIB}))
    problems = plan([*at_8b, "actor_rollout_ref.rollout.name=latent_hf", "actor_rollout_ref.rollout.max_num_seqs=8"])
    flash, disk = problems.problems
    assert "needs flash-attn" in flash and "100 GiB are free" in disk
    assert plan([*at_8b, SDPA, "trainer.save_freq=-1", "actor_rollout_ref.rollout.name=latent_hf"]).problems
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert any("this machine has 4 GPUs. Set it to 4" in problem for problem in plan(at_8b).problems)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("la_dapo", FILES, "must be given: actor_rollout_ref.model.path=VALUE"),
        ("la_dapo", ["actor_rollout_ref.model.path=absent", *FILES, "data.train_bath_size=3"], "train_bath_size"),
        ("la_dapo", ["actor_rollout_ref.model.path=absent", *FILES, "+latnt.weight=1"], "Did you mean `latent`"),
        ("la_dapo", ["actor_rollout_ref.model.path=absent", *FILES, "groups.low=2"], "expected 0 <= low"),
        ("sft", [], "SFT: scripts/sft.sh RECIPE --dry-run"),
        ("absent", [], "no such recipe"),
    ],
)
def test_a_wrong_recipe_is_refused(name, overrides, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan(overrides, name)


def test_a_missing_model_is_a_problem(tmp_path):
    found = plan([f"actor_rollout_ref.model.path={tmp_path / 'absent'}", *FILES]).problems
    assert len(found) == 1 and "no checkpoint here" in found[0]


def test_it_is_the_configuration_of_main_ppo():
    given = ["actor_rollout_ref.model.path=sft", *FILES, "+ablations=dapo", "latent.clip_low=0.3"]
    config = compose(recipes_dir() / "la_dapo.yaml", given)
    assert config.trainer.project_name == "outputs/dapo" and config.actor_rollout_ref.actor.clip_ratio_high == 0.28
    assert Settings.from_config(config).latent.clip_low == 0.3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=16, progress=False)


def test_the_micro_recipe_reads_its_data(tiny_path, world, tmp_path):
    files = [f"data.{name}_files=[{world.root}/futurebench.json]" for name in ("train", "val")]
    given = [f"actor_rollout_ref.model.path={tiny_path}", *files, f"out={tmp_path}"]
    found = plan(given, "la_dapo_micro")
    said = "\n".join(found.sections)
    assert found.problems == []
    assert "training: 16 prompts, 2 steps per epoch" in said and "a clip has at most" in said
    short = plan([*given, "data.max_prompt_length=100"], "la_dapo_micro").problems
    assert len(short) == 2 and "tokens, data.max_prompt_length is 100" in short[0]
    rows = json.loads((world.root / "futurebench.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(rows[:4]))
    few = plan(
        [*given, f"data.train_files=[{tmp_path}/few.json]", f"data.future_l1.video_root={world.videos}"],
        "la_dapo_micro",
    )
    assert any("fewer than data.train_batch_size=8" in problem for problem in few.problems)
    (tmp_path / "free.json").write_text(json.dumps([{"question": "What happens?", "answer": "It falls down"}]))
    free = plan([*given, f"data.val_files=[{tmp_path}/free.json]"], "la_dapo_micro").problems
    assert len(free) == 1 and "validation data: 1 of 1 prompts have a free-text answer" in free[0]


def test_verl_s_own_entry_names_the_dry_run():
    config = compose(recipes_dir() / "la_dapo.yaml", ["actor_rollout_ref.model.path=sft", *FILES, "+dry_run=true"])
    with pytest.raises(ConfigError, match=r"dry_run: verl has none\. Run: future-l1 plan"):
        Settings.from_config(config)
