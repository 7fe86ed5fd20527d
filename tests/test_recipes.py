"""Every recipe that ships parses, and a user can read in the base recipes what each key means."""

import re
from pathlib import Path

import pytest
import yaml

from future_l1_plugin.config import load_recipe, save_recipe
from future_l1_plugin.data.curation_recipe import CurationRecipe
from future_l1_plugin.integrations.sft.jobs import jobs
from future_l1_plugin.integrations.sft.recipe import SftRecipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ABLATIONS = ("grpo", "dapo", "dapo_ctr", "dapo_div", "text_only")
EVERY = sorted(file.relative_to(RECIPES).as_posix() for file in RECIPES.rglob("*.y*ml"))
#: Recipes of verl, which are Hydra's. tests/integrations/test_verl_recipes.py checks them.
VERL = {"la_dapo.yaml", "la_dapo_micro.yaml", *(f"ablations/{n}.yaml" for n in ABLATIONS)}
SHIPPED = [name for name in EVERY if name not in VERL and not name.startswith("easyr1/")]  # theirs: test_easyr1*.py

#: Which dataclass a recipe fills, by the beginning of its file's name; the first match counts.
CLASSES = {"sft": SftRecipe, "curate": CurationRecipe, "micro_base": SftRecipe}


def recipe_class(name: str) -> type:
    stem = Path(name).stem
    found = next((cls for prefix, cls in CLASSES.items() if stem.startswith(prefix)), None)
    assert found, f"recipes/{name}: no dataclass is known for it. Add its prefix to CLASSES in {Path(__file__).name}."
    return found


def leaves(node, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix]
    return [leaf for key, value in node.items() for leaf in leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def commented(text: str) -> dict[str, bool]:
    """{leaf key: whether its line ends in a comment} of a recipe written in block style."""
    found, path = {}, []
    for line in text.splitlines():
        match = re.match(r"^( *)([\w-]+):(.*)$", line)
        if not match:
            continue
        depth, key, rest = len(match[1]) // 2, match[2], match[3].strip()
        path = [*path[:depth], key]
        if rest and not rest.startswith("#"):
            found[".".join(path)] = bool(re.search(r"\s#\s*\S", f" {rest}"))
    return found


def test_there_are_recipes():
    assert {"sft.yaml", "sft_micro.yaml", "micro_base.yaml", "ablations/sft_micro_text.yaml"} <= set(SHIPPED)
    assert set(EVERY) >= VERL


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_parses(name, tmp_path):
    cls = recipe_class(name)
    recipe = load_recipe(RECIPES / name, cls)
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml", cls) == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_fits_its_batches_and_names_no_machine(name):
    recipe = load_recipe(RECIPES / name, recipe_class(name))
    if isinstance(recipe, SftRecipe):
        assert recipe.accumulation(8 if recipe.train.batch_size == 128 else 1) >= 1
        assert recipe.output != recipe.model
    paths = [line for line in (RECIPES / name).read_text().splitlines() if re.match(r"[^:]*:\s*[~/]", line)]
    assert paths == [], "an absolute path"


def test_ablations_change_values_over_a_base_and_write_elsewhere():
    for name in (n for n in SHIPPED if n.startswith("ablations/")):
        values = yaml.safe_load((RECIPES / name).read_text())
        parent = (RECIPES / name).parent / values["defaults"]
        ablation, base = (load_recipe(file, recipe_class(name)) for file in (RECIPES / name, parent))
        assert ablation != base
        assert ablation.output != base.output, f"recipes/{name} would overwrite the run of its base"


def test_sft_has_the_values_of_the_paper():
    """notes of the paper: "SFT"; what the recipe class says without a recipe is the same."""
    recipe, plain = load_recipe(RECIPES / "sft.yaml", SftRecipe), SftRecipe(model="m", output="o")
    for each in (recipe, plain):
        train, latent = each.train, each.latent
        assert (train.epochs, train.batch_size, train.learning_rate, train.schedule) == (1, 128, 1e-5, "cosine")
        assert (train.warmup_ratio, train.weight_decay, train.max_grad_norm, train.beta2) == (0.1, 0.1, 1.0, 0.95)
        assert (each.data.max_length, each.data.question_media, train.train_vision) == (16384, "images", False)
        assert (latent.own_share, train.lora.rank) == (0.0, 0)
    assert (recipe.latent.weight, recipe.latent.max_latent_token, recipe.train.precision) == (0.1, 4, "bf16")


def test_sft_micro_trains_as_the_readme_says():
    """The demo's figures belong to these values."""
    recipe = load_recipe(RECIPES / "sft_micro.yaml", SftRecipe)
    assert vars(recipe.latent) == {
        "loss": "mse",
        "weight": 0.1,
        "max_latent_token": 4,
        "train_fixed_latent_budget": None,
        "train_going_on": True,  # without effect: the README's convert fixes the budget
        "own_share": 1.0,
        "own_passes": 3,
        "own_mean_cosine": None,
    }
    assert {key: value for key, value in vars(recipe.train).items() if key != "lora"} == {
        "epochs": 1.0,
        "max_steps": 500,
        "batch_size": 32,
        "packing": False,
        "micro_batch_size": 32,
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "max_grad_norm": 1.0,
        "precision": "auto",
        "gradient_checkpointing": False,
        "train_vision": False,
        "attn_implementation": None,
        "seed": 0,
        "check_memory": True,
    }
    assert (recipe.train.lora.rank, recipe.hf_trainer.deepspeed, recipe.qwen_vl_finetune.deepspeed) == (0, None, None)


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("sft_lambda", "latent.weight", [0.01, 0.05, 0.1, 0.2, 0.5, 1.0]),
        ("sft_lmax", "latent.max_latent_token", [2, 4, 8, 16, 32, 64]),
    ],
)
def test_sweeps_have_the_values_of_the_paper(name, key, values):
    runs = jobs(str(RECIPES / "ablations" / f"{name}.yaml"))
    section, _, leaf = key.partition(".")
    assert [getattr(getattr(job.recipe, section), leaf) for job in runs] == values
    assert [job.recipe.output for job in runs] == [f"outputs/{name}/{key}={value}" for value in values]
    base = load_recipe(RECIPES / "sft.yaml", SftRecipe)
    for job in runs:  # and nothing else differs
        setattr(getattr(job.recipe, section), leaf, getattr(getattr(base, section), leaf))
        assert (job.recipe.data, job.recipe.latent, job.recipe.train) == (base.data, base.latent, base.train)


@pytest.mark.parametrize("name", ["sft.yaml", "curate.yaml"])
def test_each_key_of_a_base_recipe_is_there_and_explained(name):
    text = (RECIPES / name).read_text()
    comments = commented(text)
    assert sorted(comments) == sorted(leaves(yaml.safe_load(text)))
    assert [key for key, there in comments.items() if not there] == []
    recipe = load_recipe(RECIPES / name, recipe_class(name))
    every = leaves(yaml.safe_load(_dump(recipe)))
    assert sorted(every) == sorted(comments), "a key of the dataclass is missing in the recipe"


def _dump(recipe) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(recipe))
