"""The model card of a latent checkpoint: what a reader of the folder, or a hub's page, is told first.

Stock tools load such a checkpoint as the Qwen3-VL that it is, decode without feeding latents back, and say nothing.
Asked were transformers 5 and vLLM 0.31: notes in config.json or generation_config.json, an `auto_map` and another
`transformers_version` change no word of theirs. vLLM refuses an unknown class under `architectures`, but other tools go
by that name; transformers lists weights that it does not know, those of a latent head. So the folder says it.
"""

import json
import re
from pathlib import Path
from typing import Any

from future_l1_plugin.model.backbone import Backbone, by_config
from future_l1_plugin.model.config import LatentConfig

NAME = "README.md"
#: A key of generation_config.json, which tools carry along, and what it says.
NOTE = {"latents": "fed back by future_l1_plugin only; stock tools decode without them, see README.md"}
#: Lines of the front matter that go from a base's card to ours, with the lines of their values.
_CARRIED = re.compile(r"^(license|license_name|license_link|base_model|language):.*(?:\n[ \t-].*)*", re.MULTILINE)
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(folder: str | Path, hf_config: Any) -> None:
    """Write the card into a latent checkpoint's folder, and NOTE. An adapter's folder keeps the card that PEFT wrote.

    Args:
        hf_config: the checkpoint's configuration; `_name_or_path` is what it was made from, a folder or a hub id, whose
            card (if it is here) names licence and base.
    """
    folder, is_latent = Path(folder), getattr(hf_config, "latent_id", None) is not None
    if not is_latent or (folder / "adapter_config.json").exists():
        return
    text = card(LatentConfig.from_hf(hf_config), by_config(hf_config, folder), source_of(hf_config))
    (folder / NAME).write_text(text, encoding="utf-8")
    generation = folder / "generation_config.json"
    if generation.exists():
        values = json.loads(generation.read_text(encoding="utf-8")) | NOTE
        generation.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def source_of(hf_config: Any) -> dict[str, str]:
    """Lines of front matter, by key: those of the card beside what the checkpoint was made from; else its hub id."""
    name = str(getattr(hf_config, "_name_or_path", "") or "")
    path = Path(name) / NAME
    front = _FRONT.match(path.read_text(encoding="utf-8", errors="replace")) if name and path.is_file() else None
    found = {match[1]: match[0] for match in _CARRIED.finditer(front[1])} if front else {}
    if "base_model" not in found and _HUB_ID.fullmatch(name) and not Path(name).exists():
        found["base_model"] = f"base_model: {name}"
    return found


def card(latent: LatentConfig, family: Backbone, source: dict[str, str] | None = None) -> str:
    """The text of the card.

    Args:
        source: further lines of its front matter, by key.
    """
    budget = latent.budget
    most = f"exactly {budget.limit}" if budget.exact else f"at most {budget.limit}"
    head = f"a {latent.head} head on it" if latent.head != "none" else "nothing in between"
    front = ["library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [future-l1, latent-reasoning]"]
    front = "\n".join([*(source or {}).values(), *front])
    return _TEXT.format(front=front, name=family.name, model_type=family.model_type, most=most, head=head)


_TEXT = """---
{front}
---

# A {name} that reasons in latents

Between `<|latent_start|>` and `<|latent_end|>` the next input of this model is no token: it is the model's own last
hidden state ({head}), {most} in a span. The ids `<|latent|>` in its output only mark where.

**Stock tools do not feed latents back.** transformers' `generate` and pipelines, vLLM and others load this folder as
the ordinary `{model_type}` checkpoint that it is and decode without an error, but feed the embedding of `<|latent|>`
where the hidden state belongs. What they answer is not what this model answers.

## How to load it

With the package `future_l1_plugin` (the method: arXiv 2606.05769), in transformers:

```python
from future_l1_plugin.model import generate, load

model, processor = load("PATH")
out = generate(model, inputs, max_new_tokens=512)  # inputs: what the processor returns
```

In vLLM, `python -m future_l1_plugin.integrations.vllm PATH` serves it, and
`vllm.LLM(**future_l1_plugin.integrations.vllm.engine_args("PATH"))` loads it. In lmms-eval the model is
`future_l1`. RL on verl and EasyR1 starts from this folder, too.

What it may not be used for, and what its base says of itself, is the base's own card's to tell.
"""
