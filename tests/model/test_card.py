"""The model card: in every saved folder, with the base's licence, and with lines that load the checkpoint."""

import json
import re
from types import SimpleNamespace

import pytest

from future_l1_plugin.model import LatentConfig, load, save
from future_l1_plugin.model.backbone import QWEN3_VL
from future_l1_plugin.model.card import card, source_of, write_card

BASE = """---
license: other
license_name: a-licence
license_link: https://example.org/licence
base_model:
- Some/Base-4B
pipeline_tag: text-generation
---
# A base
license: not this line
"""


def latent(**keys):
    return LatentConfig(latent_id=7, latent_start_id=8, latent_end_id=9, **keys)


class Config(SimpleNamespace):
    def to_dict(self):
        return vars(self)


def config(folder, **keys):
    """A configuration as transformers reads it from `folder`."""
    found = Config(_name_or_path=str(folder), model_type=QWEN3_VL.model_type)
    latent(**keys).to_hf(found)
    return found


def test_what_it_says():
    plain = card(latent(max_latent_token=4), QWEN3_VL)
    assert plain.startswith("---\nlibrary_name: transformers\n") and "license" not in plain.split("---")[1]
    assert "(nothing in between), at most 8 in a span" in plain  # 4 x the multiplier 2
    assert "**Stock tools do not feed latents back.**" in plain
    headed = card(latent(use_projection_head=True, projection_head_type="lvr", fixed_latent_budget=True), QWEN3_VL)
    assert "(a lvr head on it), exactly 4 in a span" in headed
    assert "{" not in re.sub(r"```.*?```", "", plain, flags=re.DOTALL)


def test_licence_and_base_come_from_the_card_beside_the_base(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    (base / "README.md").write_text(BASE)
    write_card(out, config(base))
    front = (out / "README.md").read_text().split("---\n")[1]
    assert front.splitlines() == [
        "license: other",
        "license_name: a-licence",
        "license_link: https://example.org/licence",
        "base_model:",
        "- Some/Base-4B",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [future-l1, latent-reasoning]",
    ]
    # And from there to what is trained from it.
    assert source_of(config(out)) == source_of(config(base))


@pytest.mark.parametrize(("name", "line"), [("Qwen/Qwen3-VL-8B", True), ("/some/folder", False), ("", False)])
def test_a_hub_id_is_a_base_and_a_folder_is_none(name, line):
    assert source_of(config(name)) == ({"base_model": "base_model: Qwen/Qwen3-VL-8B"} if line else {})


def test_an_adapter_keeps_its_own_card(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("PEFT's")
    write_card(tmp_path, config("base"))
    assert (tmp_path / "README.md").read_text() == "PEFT's"


def test_every_saved_checkpoint_has_one_and_its_lines_load_it(tiny_path, tmp_path):
    model, processor = load(tiny_path)
    save(model, processor, tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("PATH", str(tmp_path / "saved"))
    question = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]
    shown = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[shown], return_tensors="pt")
    exec(code.replace("512", "2"), found := {"inputs": inputs})
    assert len(found["out"].responses[0]) <= 2
    assert str(tmp_path) not in text
    assert "see README.md" in found["model"].generation_config.latents  # and a tool that saves it anew writes it, too
    assert "see README.md" in json.loads((tmp_path / "saved" / "generation_config.json").read_text())["latents"]
