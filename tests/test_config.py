"""Recipes: parents, overrides, and every message that a wrong recipe deserves."""

from dataclasses import dataclass, field

import pytest

from future_l1_plugin.config import from_mapping, load_recipe, save_recipe
from future_l1_plugin.errors import ConfigError


@dataclass
class Lora:
    rank: int = 0
    targets: list[str] = field(default_factory=lambda: ["q_proj"])


@dataclass
class Train:
    learning_rate: float = 1e-5
    seed: int = 0
    max_steps: int | None = None
    bf16: bool = False
    lora: Lora = field(default_factory=Lora)


@dataclass
class Recipe:
    output: str = "???"
    loss: str = "mse"
    train: Train = field(default_factory=Train)
    rewards: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.loss not in ("mse", "cosine"):
            raise ConfigError(f"loss: expected mse or cosine, found {self.loss!r}")


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def refused(path, *overrides) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(path, Recipe, overrides)
    return str(error.value)


def test_values_over_defaults(recipe):
    loaded = load_recipe(recipe("output: out\ntrain:\n  learning_rate: 1e-4\n  lora: {rank: 8}\n"), Recipe)
    assert loaded == Recipe(output="out", train=Train(learning_rate=1e-4, lora=Lora(rank=8)))
    assert isinstance(loaded.train.lora, Lora)


def test_overrides_win_and_are_read_as_yaml(recipe):
    path = recipe("output: out\ntrain: {seed: 1}\n")
    overrides = ["train.seed=2", "train.max_steps=20", "train.bf16=true", "train.lora.targets=[a, b]", "output=x=y"]
    loaded = load_recipe(path, Recipe, [*overrides, "rewards.format=0.1", "train.learning_rate=3e-4"])
    assert loaded.train == Train(3e-4, seed=2, max_steps=20, bf16=True, lora=Lora(targets=["a", "b"]))
    assert (loaded.output, loaded.rewards) == ("x=y", {"format": 0.1})
    assert load_recipe(path, Recipe, ["train.max_steps=null"]).train.max_steps is None


def test_parents_are_relative_and_chain(recipe):
    recipe("output: base\nloss: cosine\nrewards: {accuracy: 0.9, format: 0.1}\ntrain: {seed: 1}\n", "base.yaml")
    recipe("defaults: ../base.yaml\ntrain: {seed: 2, lora: {targets: [x, y]}}\n", "sweeps/middle.yaml")
    path = recipe("defaults: middle.yaml\noutput: leaf\nrewards: {format: 0.2}\n", "sweeps/leaf.yaml")
    loaded = load_recipe(path, Recipe)
    assert (loaded.output, loaded.loss, loaded.train.seed) == ("leaf", "cosine", 2)
    assert loaded.train.lora.targets == ["x", "y"]
    assert loaded.rewards == {"accuracy": 0.9, "format": 0.2}


def test_references(recipe):
    assert load_recipe(recipe("output: run-${train.seed}\ntrain: {seed: 3}\n"), Recipe).output == "run-3"
    assert "`output`" in refused(recipe("output: ${train.sed}\n"))


def test_empty_recipe_is_all_defaults(recipe):
    assert load_recipe(recipe(""), Recipe, ["output=out"]) == Recipe(output="out")


def test_round_trip(recipe, tmp_path):
    first = Recipe(output="1e-3", loss="cosine", train=Train(3e-7, max_steps=5), rewards={"format": 0.1})
    save_recipe(first, tmp_path / "new" / "folder" / "recipe.yaml")
    assert load_recipe(tmp_path / "new" / "folder" / "recipe.yaml", Recipe) == first
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["recipe.yaml"]


def test_unknown_key_names_file_key_nearest_and_all(recipe):
    path = recipe("output: out\ntrain:\n  learning_rat: 1e-4\n")
    assert refused(path) == (
        f"{path}: unknown key `train.learning_rat`. Did you mean `train.learning_rate`? "
        "Valid keys in `train`: learning_rate, seed, max_steps, bf16, lora."
    )


def test_key_in_the_wrong_section(recipe):
    assert "Did you mean `train.seed`?" in refused(recipe("seed: 1\n"))
    assert "Did you mean `train.lora.rank`?" in refused(recipe("train: {rank: 1}\n"))
    assert "Did you mean `train.learning_rate`?" in refused(recipe("learning_rat: 1\n"))
    assert "Valid keys: output, loss, train, rewards." in refused(recipe("zzz: 1\n"))
    assert "Did you mean" not in refused(recipe("zzz: 1\n"))


def test_all_unknown_keys_of_a_file_are_told_at_once(recipe):
    message = refused(recipe("outptu: x\ntrain: {sed: 1}\n"))
    assert "`outptu`" in message and "`train.sed`" in message


def test_unknown_key_of_a_parent_names_the_parent(recipe):
    parent = recipe("losss: mse\n", "base.yaml")
    path = recipe("defaults: base.yaml\noutput: out\n")
    assert refused(path).startswith(f"{parent}: unknown key `losss`. Did you mean `loss`?")


def test_unknown_override(recipe):
    message = refused(recipe("output: out\n"), "train.sed=1")
    assert message.startswith("override 'train.sed=1': unknown key `train.sed`. Did you mean `train.seed`?")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train: {seed: many}", "train.seed"),
        ("train: {seed: 1.5}", "train.seed"),
        ("train: {seed: true}", "train.seed"),
        ("train: {seed: null}", "train.seed"),
        ("train: {seed: [1]}", "train.seed"),
        ("train: {learning_rate: fast}", "train.learning_rate"),
        ("train: {bf16: perhaps}", "train.bf16"),
        ("train: {lora: {targets: q_proj}}", "train.lora.targets"),
        ("rewards: {format: high}", "rewards.format"),
        ("train: 3", "train"),
        ("train: [1]", "train"),
        ("train: null", "train"),
        ("output: {a: 1}", "output"),
    ],
)
def test_wrong_types_name_file_and_key(recipe, text, key):
    path = recipe(f"output: out\n{text}\n" if "output" not in text else text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert f"`{key}`" in message
    assert "\n" not in message


def test_what_the_recipe_itself_refuses(recipe):
    path = recipe("output: out\nloss: hinge\n")
    assert refused(path) == f"{path}: loss: expected mse or cosine, found 'hinge'"


def test_required_values(recipe):
    path = recipe("loss: mse\n")
    message = refused(path)
    assert message == f"{path}: output must be given. Add to the file, or pass output=VALUE on the command line."


def test_missing_files(recipe, tmp_path):
    recipe("output: out\n", "sft.yaml")
    assert refused(tmp_path / "sfft.yaml") == (
        f"{tmp_path / 'sfft.yaml'}: no such recipe. There are: {tmp_path / 'sft.yaml'}."
    )
    child = recipe("defaults: gone.yaml\n", "child.yaml")
    assert f"gone.yaml: no such recipe (named as `defaults` by {child})" in refused(child)
    assert "no such recipe" in refused(tmp_path / "none" / "sft.yaml")


@pytest.mark.parametrize(
    "text", ["a: [1", "output: a\noutput: b\n", "- 1\n- 2\n", "just words", "3", "defaults: [a.yaml, b.yaml]\n"]
)
def test_files_that_are_no_recipe(recipe, text):
    path = recipe(text)
    assert refused(path).startswith(f"{path}: ")


def test_parents_in_a_circle(recipe):
    recipe("defaults: b.yaml\n", "a.yaml")
    assert "circle" in refused(recipe("defaults: a.yaml\n", "b.yaml"))


@pytest.mark.parametrize("override", ["train.seed", "=1", "train.seed=[1", ""])
def test_bad_overrides(recipe, override):
    assert refused(recipe("output: out\n"), override).startswith(f"override {override!r}: ")


def test_a_section_of_a_host_is_checked_as_a_recipe_is():
    values = {"output": "x", "train": {"seed": 2}}
    assert from_mapping(Recipe, values, "future_l1") == Recipe(output="x", train=Train(seed=2))
    with pytest.raises(ConfigError, match=r"future_l1: unknown key `train\.sed`\. Did you mean `train\.seed`"):
        from_mapping(Recipe, {"output": "x", "train": {"sed": 2}}, "future_l1")
    with pytest.raises(ConfigError, match="future_l1: output must be given"):
        from_mapping(Recipe, {}, "future_l1")
