"""Qwen3-VL-8B's real shape on the meta device: names and counts on the way from checkpoint to actor to vLLM."""

import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from real_size import qwen3_vl_8b, write_config

pytest.importorskip("verl")

from future_l1_plugin.integrations.verl.shape import counts_of, hf_config
from future_l1_plugin.latent.channel import HEAD_NAME
from future_l1_plugin.model.checkpoint import attach_head
from future_l1_plugin.model.config import LatentConfig
from future_l1_plugin.paths import recipes_dir


def on_meta(**keys):
    from transformers import Qwen3VLForConditionalGeneration

    config = qwen3_vl_8b(**keys)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
        attach_head(model, LatentConfig.from_hf(config))
    return model


@pytest.fixture(scope="module")
def model():
    return on_meta(use_projection_head=True, projection_head_type="swiglu")


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def kinds(names):
    """Names with their layers' numbers taken out, counted."""
    return Counter(re.sub(r"\.\d+\.", ".N.", name) for name in names)


def test_names_and_shapes_are_those_of_the_hub_s_checkpoint(model):
    found = shapes(model.state_dict())
    kept = {name: shape for name, shape in found.items() if not name.startswith(HEAD_NAME)}
    assert sum(torch.Size(shape).numel() for shape in kept.values()) == 8_767_123_696
    assert len(kept) == 750, "as model.safetensors.index.json of Qwen/Qwen3-VL-8B-Instruct lists"
    assert found["lm_head.weight"] == found["model.language_model.embed_tokens.weight"] == (151936, 4096)
    assert found["model.language_model.layers.35.self_attn.k_proj.weight"] == (8 * 128, 4096)
    assert found["model.language_model.layers.0.self_attn.q_norm.weight"] == (128,)
    assert found["model.visual.deepstack_merger_list.2.linear_fc2.weight"] == (4096, 4608)
    assert found["model.visual.patch_embed.proj.weight"] == (1152, 3, 2, 16, 16)
    counted = kinds(kept)
    assert counted["model.language_model.layers.N.mlp.gate_proj.weight"] == 36
    assert counted["model.visual.blocks.N.attn.qkv.weight"] == 27


def test_the_weight_update_sends_those_names(model):
    """verl's `get_per_tensor_param` and our merged LoRA weights go through the same two functions."""
    from peft import LoraConfig, get_peft_model
    from verl.utils.fsdp_utils import normalize_peft_param_name
    from verl.utils.model import convert_weight_keys

    expected = shapes(model.state_dict())
    assert shapes(convert_weight_keys(model.state_dict(), model)) == expected
    adapted = get_peft_model(
        on_meta(use_projection_head=True, projection_head_type="swiglu"),
        LoraConfig(r=8, target_modules="all-linear", exclude_modules=r".*\bvisual\b.*"),
        low_cpu_mem_usage=True,
    )
    names = [name for name in adapted.state_dict() if "lora_A" in name]
    assert len(names) == 36 * 7 + 5, "seven matrices a layer, and the head's"
    assert shapes(convert_weight_keys(normalize_peft_param_name(adapted.state_dict()), adapted)) == expected


@pytest.mark.vllm
def test_vllm_takes_each_of_them(model):
    from future_l1_plugin.integrations.vllm.model import LatentQwen

    names = list(model.state_dict())
    mapped = [LatentQwen.hf_to_vllm_mapper._map_name(name) for name in names]
    assert None not in mapped and len(set(mapped)) == len(names)
    assert {name.split(".")[0] for name in mapped} == {"visual", "language_model", HEAD_NAME}
    by_name = dict(zip(names, mapped, strict=True))
    assert by_name["lm_head.weight"] == "language_model.lm_head.weight"
    assert by_name["model.language_model.norm.weight"] == "language_model.model.norm.weight"
    assert by_name["model.visual.pos_embed.weight"] == "visual.pos_embed.weight"
    head = [name for name in names if name.startswith(HEAD_NAME)]
    assert head and all(by_name[name] == name for name in head)


def recipe(*overrides):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(recipes_dir()), version_base=None):
        return compose("la_dapo", overrides=["hydra.searchpath=[pkg://verl.trainer.config]", *overrides])


def test_counts_of_the_dry_run(tmp_path):
    path = f"actor_rollout_ref.model.path={write_config(tmp_path / '8b')}"
    config = recipe(path)
    counts = counts_of(config, hf_config(config))
    assert counts.total == 8_767_123_696
    tower = 576_388_336  # the vision tower with its four mergers: 8,767,123,696 - 8,190,735,360 of Qwen3-8B
    assert counts.trained == counts.total - tower
    assert counts.largest_unit == counts.largest_tensor == 151936 * 4096, "embedding and lm_head are units of their own"
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    block = 1152 * (3 * 1152 + 1152) + 2 * 1152 * 4304 + (3 * 1152 + 1152 + 4304 + 1152) + 4 * 1152
    units = 2 * 151936 * 4096 + 36 * layer + 27 * block + 2304 * 1152  # and the position embedding
    assert counts.outside_units == counts.total - units
    assert (counts.patches, counts.patch) == (4, 1536)
    lora = recipe(path, "actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=true")
    adapted = counts_of(lora, hf_config(lora))
    # of q, k, v, o and of gate, up, down: rank x (in + out)
    rows = 2 * 3 * 4096  # of the latent tokens, in the embedding and in lm_head
    assert adapted.trained == 36 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288)) + rows
    assert adapted.outside_units == counts.outside_units + 2 * 151936 * 4096 + 2304 * 1152 + rows
    assert adapted.total == counts.total + adapted.trained


TWO_RANKS = """
import multiprocessing, sys, torch
from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from future_l1_plugin.integrations.verl.engine import LatentEngine

path, store = sys.argv[1:]
torch.set_num_threads(1)
build, began = LatentEngine._build_module, {}

def watched(self):
    module = build(self)
    began.update((name, p.device.type) for name, p in module.named_parameters())
    return module

def run(rank):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    LatentEngine._build_module = watched
    engine = LatentEngine(
        model_config=HFModelConfig(path=path, override_config={"attn_implementation": "sdpa"}),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    weights = {name: value.clone() for name, value in engine.get_per_tensor_param()[0]}
    buffers = {name: value.clone() for name, value in engine.module.named_buffers()}
    torch.save({"began": began, "weights": weights, "buffers": buffers}, f"{store}.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

# Forked, so that verl is imported once.
ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank,), daemon=True) for rank in range(2)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join(90)
sys.exit(any(rank.exitcode != 0 for rank in ranks))
"""


def test_a_rank_that_starts_on_meta_has_rank_0_s_weights_and_head(tmp_path):
    """verl loads an untied model on rank 0 alone; the others begin on meta and get its weights by broadcast."""
    from safetensors.torch import load_file

    from future_l1_plugin.model import load, make_tiny
    from future_l1_plugin.model.checkpoint import save

    model, processor = load(make_tiny(tmp_path / "tied", seed=0), dtype=torch.float32)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    latent = LatentConfig.from_hf(model.config)
    latent.use_projection_head, latent.projection_head_type = True, "lvr"
    latent.to_hf(model.config)
    attach_head(model, latent)
    save(model, processor, tmp_path / "untied")
    command = [sys.executable, "-c", TWO_RANKS, tmp_path / "untied", tmp_path / "store"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"store.{rank}") for rank in (0, 1))
    assert set(first["began"].values()) == {"cpu"} and set(second["began"].values()) == {"meta"}
    expected = load_file(tmp_path / "untied" / "model.safetensors")
    assert "lm_head.weight" in expected and any(name.startswith(HEAD_NAME) for name in expected)
    real = on_meta(use_projection_head=True, projection_head_type="lvr").state_dict()
    assert kinds(expected).keys() == kinds(real).keys(), "a saved checkpoint has the real one's names"
    for found in (first, second):
        assert found["weights"].keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(found["weights"][name].float(), weight.float()), name
    assert first["buffers"].keys() == second["buffers"].keys()
    assert all(torch.equal(first["buffers"][name], second["buffers"][name]) for name in first["buffers"])
