"""Every recipe that ships parses, and a user can read in the base recipes what each key means."""

import re
from pathlib import Path

import pytest
import yaml

from future_l1_plugin.config import load_recipe, save_recipe
from future_l1_plugin.data.curation import CurationRecipe
from future_l1_plugin.integrations.hf_trainer.recipe import SftRecipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ABLATIONS = ("grpo", "dapo", "dapo_ctr", "dapo_div", "text_only")
EVERY = sorted(file.relative_to(RECIPES).as_posix() for file in RECIPES.rglob("*.y*ml"))
#: Recipes of verl, which are Hydra's. tests/integrations/test_verl_recipes.py checks them.
VERL = {"la_dapo.yaml", "la_dapo_micro.yaml", *(f"ablations/{n}.yaml" for n in ABLATIONS)}
SHIPPED = [name for name in EVERY if name not in VERL]

#: Which dataclass a recipe fills, by the beginning of its file's name; the first match counts.
CLASSES = {"sft": SftRecipe, "curate": CurationRecipe, "micro_base": SftRecipe}


def recipe_class(name: str) -> type:
    stem = Path(name).stem
    found = next((cls for prefix, cls in CLASSES.items() if stem.startswith(prefix)), None)
    assert found, f"recipes/{name}: no dataclass is known for it. Add its prefix to CLASSES in {Path(__file__).name}."
    return found


def leaves(node, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
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
    assert {"sft_micro.yaml", "micro_base.yaml", "ablations/sft_micro_text.yaml"} <= set(SHIPPED)
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
        assert recipe.accumulation(1) >= 1
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


@pytest.mark.parametrize("name", ["sft_micro.yaml", "curate.yaml"])
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
