"""Released checkpoints, from loading to evaluation: a small one with their keys, names and files.

They were written by transformers 4.57: rope settings in their old spelling, processors in files of their own, a chat
template that drops pictures of the assistant, bfloat16 weights, and only those latent keys that training knew.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from future_l1_plugin.data import make_world
from future_l1_plugin.model import LatentConfig, chat_template, convert, generate, load, make_tiny
from future_l1_plugin.model.backbone import QWEN3_VL

#: The latent keys of a released config.json, as they stand there; ids are filled in.
RELEASED_KEYS = {
    "max_latent_token": 4,
    "train_fixed_latent_budget": False,
    "pool_after_proj": True,
    "latent_loss": "mse",
    "latent_lambda": 0.1,
    "use_projection_head": False,
    "projection_hidden_dim": 2048,
    "projection_head_type": "swiglu",
    "infer_latent_multiplier": 2.0,
    "decoder_recon_enabled": False,
    "decoder_recon_weight": 0.0,
}
DROPS_PICTURES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"
SPELLING = "Where will the red circle be 1 step later?"


def as_released(source: Path, path: Path, architecture: str, **keys) -> Path:
    """A copy of a latent checkpoint of ours in the form of the released ones."""
    model, _ = load(source, dtype=torch.bfloat16)
    shutil.copytree(source, path)
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    for key in LatentConfig.__dataclass_fields__:
        if key not in ("latent_id", "latent_start_id", "latent_end_id"):
            config.pop(key, None)
    config |= {"architectures": [architecture], "transformers_version": "4.57.0", **RELEASED_KEYS, **keys}
    config["torch_dtype"] = config.pop("dtype")
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (path / "config.json").write_text(json.dumps(config))
    both = json.loads((path / "processor_config.json").read_text())
    (path / "processor_config.json").unlink()
    named = {"processor_class": both["processor_class"]}
    for name, part in (("preprocessor", "image_processor"), ("video_preprocessor", "video_processor")):
        (path / f"{name}_config.json").write_text(json.dumps(both[part] | named))
    (path / "chat_template.jinja").write_text(DROPS_PICTURES)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=0, train=16, seed=0, progress=False)


@pytest.fixture(scope="module", params=QWEN3_VL.released)
def released(request, tiny_path, tmp_path_factory) -> Path:
    return as_released(tiny_path, tmp_path_factory.mktemp("released") / request.param, request.param)


def architecture(path: Path) -> str:
    return json.loads((path / "config.json").read_text())["architectures"][0]


def test_it_loads_as_what_it_is(released, tiny_path):
    model, processor = load(released)
    ours, _ = load(tiny_path, dtype=torch.bfloat16)
    state = ours.state_dict()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.config.text_config.rope_parameters == ours.config.text_config.rope_parameters
    latent = LatentConfig.from_hf(model.config)
    assert latent.decoder_recon == {"decoder_recon_enabled": False, "decoder_recon_weight": 0.0}
    assert (latent.train_fixed_latent_budget, latent.budget.limit, latent.head) == (None, 8, "none")
    assert latent.force_initial_latent_mode is (architecture(released) == "RICE_Qwen3VL")
    assert processor.chat_template == chat_template()  # pictures of the assistant are kept again


def question(processor) -> dict:
    """A picture and a question, as the model's inputs."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": SPELLING}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_it_generates(released):
    model, processor = load(released, dtype=torch.float32)
    output = generate(model, question(processor), max_new_tokens=12)
    (text,), (latents,) = output.text, output.latents
    assert latents.shape == (text.count("<|latent|>"), model.config.text_config.hidden_size)
    assert latents.isfinite().all()
    if architecture(released) == "RICE_Qwen3VL":  # whose first token is the start of a span
        assert text.startswith("<|latent_start|><|latent|>") and len(latents)


def test_it_is_trained_and_resumed(released, world, tmp_path):
    """Two steps, broken off after the first; the result is a checkpoint of ours that still knows what it was."""
    from future_l1_plugin.integrations.sft.run import main

    recipe = {
        "model": str(released),
        "output": str(tmp_path / "run"),
        "data": {"records": str(world.sft), "videos": str(world.videos), "question_media": "video", "workers": 0},
        "train": {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0},
        "eval": {"prompts": 0},
        "log": {"every": 1, "save_every": 1, "tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    final, metrics = tmp_path / "run" / "final", tmp_path / "run" / "metrics.jsonl"
    assert main([str(tmp_path / "run.yaml")]) == 0
    whole, log = load_file(final / "model.safetensors"), metrics.read_text().splitlines()[:2]
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    assert all(json.loads(line)["latent_loss"] > 0 for line in log)
    shutil.rmtree(final)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    assert main([str(tmp_path / "run.yaml")]) == 0
    again = load_file(final / "model.safetensors")
    assert all(torch.allclose(whole[name], again[name], rtol=0, atol=1e-5) for name in whole)
    before = load_file(released / "model.safetensors")
    trained = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors")  # in float32
    assert before.keys() == again.keys() == trained.keys()
    assert all(torch.equal(trained[name].to(before[name].dtype), again[name]) for name in before)
    moved = [name for name in before if ".visual." not in name and not torch.equal(before[name].float(), trained[name])]
    assert len(moved) == len([name for name in before if ".visual." not in name])
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert config["decoder_recon_enabled"] is False
    assert config["force_initial_latent_mode"] is (architecture(released) == "RICE_Qwen3VL")
    assert json.loads((released / "config.json").read_text())["architectures"] != config["architectures"]


def test_lmms_eval_evaluates_it(released, world, tmp_path):
    """Through the adapter, as lmms-eval calls it; the tasks themselves are tested with the adapter."""
    pytest.importorskip("lmms_eval", reason="needs lmms-eval")
    from lmms_eval.api.instance import Instance

    from future_l1_plugin.integrations.lmms_eval.adapter import FutureL1

    arguments = f"pretrained={released},responses={tmp_path / 'responses.jsonl'},max_num_frames=4,device=cpu"
    model = FutureL1.create_from_arg_string(f"{arguments},dtype=float32,batch_size=2", {})
    clips = sorted(world.videos.rglob("*.mp4"))[:2]
    docs = [[{"type": "video", "url": str(clip)}, {"type": "text", "text": SPELLING}] for clip in clips]
    model.task_dict["t"] = {"test": docs}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(
                SPELLING,
                lambda doc: [{"role": "user", "content": doc}],
                {"max_new_tokens": 8, "until": ["\n\n"]},
                i,
                "t",
                "test",
            ),
            idx=0,
            metadata={"task": "t", "doc_id": i, "repeats": 1},
        )
        for i in range(len(docs))
    ]
    results = model.generate_until(requests)
    assert len(results) == 2
    for result in results:
        assert result.token_counts.reasoning_tokens == result.text.count("<|latent|>")
        if architecture(released) == "RICE_Qwen3VL":
            assert result.text.startswith("<|latent_start|><|latent|>")


def test_one_with_a_head(tmp_path):
    """A released head is called `projection_head` in the weights, and its kind stands in the configuration."""
    base = make_tiny(tmp_path / "base", latent=False)
    keys = dict(use_projection_head=True, projection_head_type="swiglu", projection_hidden_dim=32)
    path = as_released(convert(base, tmp_path / "ours", **keys), tmp_path / "released", "SwimBird_Qwen3VL", **keys)
    names = [name for name in load_file(path / "model.safetensors") if name.startswith("projection_head.projection.")]
    assert "projection_head.projection.2.w1.weight" in names
    model, processor = load(path, dtype=torch.float32)
    assert LatentConfig.from_hf(model.config).head == "swiglu"
    generate(model, question(processor), max_new_tokens=4)
