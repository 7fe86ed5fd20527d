"""LoRA with the rows of the latent tokens, the dtype of what is written, and checkpoints of runs in training."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from future_l1_plugin.cli import main as command
from future_l1_plugin.data import make_world
from future_l1_plugin.errors import CheckpointError
from future_l1_plugin.integrations.hf_trainer.host import lora_targets, with_lora
from future_l1_plugin.integrations.sft.lora import quantization
from future_l1_plugin.integrations.sft.recipe import LoraRecipe
from future_l1_plugin.integrations.sft.run import main
from future_l1_plugin.integrations.sft.trainer import save_final
from future_l1_plugin.latent.channel import HEAD_NAME
from future_l1_plugin.model import LatentConfig, export, load, save
from future_l1_plugin.model.backbone import QWEN3_VL
from future_l1_plugin.model.checkpoint import attach_head
from future_l1_plugin.model.training import check_whole, sources

IDS = torch.tensor([[5, 452, 7, 453, 454, 11]])  # with the three latent tokens


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def start(request, tiny_path, tmp_path_factory):
    """A latent checkpoint in bfloat16 with a latent head."""
    model, processor = load(tiny_path)
    latent = LatentConfig.from_hf(model.config)
    latent.use_projection_head, latent.projection_head_type = True, "lvr"
    latent.to_hf(model.config)
    attach_head(model, latent)
    if not request.param:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(1).clone())
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    out = tmp_path_factory.mktemp("start") / "start"
    save(model, processor, out, dtype=torch.bfloat16)
    return out


def stored(path):
    return load_file(path / "model.safetensors")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def trained(start, tmp_path):
    """(the model under LoRA as if it had been trained, its logits, processor)."""
    model, processor = load(start, dtype=torch.float32)
    model = with_lora(model, LoraRecipe(rank=2, alpha=4))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model, logits(model), processor


def test_saved_in_the_start_s_dtype(start):
    tensors, config = stored(start), json.loads((start / "config.json").read_text())
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
    assert ("lm_head.weight" in tensors) is not config["tie_word_embeddings"]  # a tied weight is written once
    model, _ = load(start)
    assert model.dtype == torch.bfloat16 == model.stored_dtype
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())


def test_of_the_embeddings_the_three_rows_are_trained(start):
    model = with_lora(load(start, dtype=torch.float32)[0], LoraRecipe(rank=2))
    logits(model)
    model(input_ids=IDS).logits.square().sum().backward()
    rows = {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    tied = model.config.tie_word_embeddings
    assert len(rows) == (1 if tied else 2)
    assert all(p.shape == (3, 128) and p.grad.abs().sum(1).min() > 0 for p in rows.values())
    others = {name for name, p in model.named_parameters() if p.requires_grad and name not in rows}
    assert all("lora_" in name or HEAD_NAME in name for name in others)


def test_merged_and_unmerged_agree_and_peft_loads_the_adapters(start, trained, tmp_path):
    from peft import PeftModel

    model, expected, processor = trained
    save_final(model, processor, tmp_path / "final")
    before, after = stored(start), stored(tmp_path / "final")
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.bfloat16}
    rows = {name for name in before if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    for name in rows:
        assert (before[name] != after[name]).any(1).nonzero()[:, 0].tolist() == [452, 453, 454]
    adapted = PeftModel.from_pretrained(load(start, dtype=torch.float32)[0], tmp_path / "final" / "adapter")
    torch.testing.assert_close(logits(adapted), expected)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)
    final = logits(load(tmp_path / "final", dtype=torch.float32)[0])
    assert (final - expected).abs().max() < 0.05 * expected.std()  # bfloat16
    assert not (logits(load(start, dtype=torch.float32)[0]) - expected).abs().max() < 0.5 * expected.std()
    # The subfolder is its own affair: a stock loader of `final` does not see it.
    assert (tmp_path / "final" / "adapter" / "adapter_config.json").exists()
    assert sources(tmp_path / "final").is_whole


def test_a_folder_of_adapters_is_exported(start, trained, tmp_path, capsys):
    model, expected, processor = trained
    folder = tmp_path / "checkpoints" / "checkpoint-2"
    model.save_pretrained(folder)
    merged, _ = load(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert load(folder)[0].dtype == torch.bfloat16
    save_final(model, processor, tmp_path / "final")
    assert command(["export", str(folder), str(tmp_path / "out")]) == 0
    ours, theirs = stored(tmp_path / "out"), stored(tmp_path / "final")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert check_whole(tmp_path / "out", "key") is None
    with pytest.raises(
        CheckpointError, match=f"key: .*checkpoint-2 holds a run's adapters. Run: future-l1 export {folder}"
    ):
        check_whole(folder, "key")
    # A start that has moved is asked for, and can be given.
    adapter = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "/gone/start"}))
    capsys.readouterr()
    assert command(["export", str(folder), str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert "it names /gone/start, which is not here" in said and f"export {folder} OUT --base START" in said
    assert command(["export", str(folder), str(tmp_path / "again"), "--base", str(start)]) == 0
    assert all(torch.equal(value, theirs[name]) for name, value in stored(tmp_path / "again").items())


def test_weights_without_a_processor_are_exported(start, tmp_path):
    """What transformers.Trainer writes by itself: float32, no processor. The recipe beside it tells the start."""
    model, _ = load(start, dtype=torch.float32)
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    model.save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"Which checkpoint did that run start from\? .*--base START"):
        load(folder)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"model": str(start)}))
    again, processor = load(folder)
    torch.testing.assert_close(logits(again), logits(model))
    assert processor.tokenizer.padding_side == "left"
    with pytest.raises(CheckpointError, match="holds a run's weights without a processor"):
        check_whole(folder, "key")
    export(folder, tmp_path / "out")
    assert all(torch.equal(value, stored(start)[name]) for name, value in stored(tmp_path / "out").items())
    with pytest.raises(CheckpointError, match="is no checkpoint of a run in training; use it as it is"):
        export(start, tmp_path / "other")
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        export(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["zero_to_fp32.py", "global_step4/x.pt"], r"python {0}/zero_to_fp32.py {0} {0} --safe_serialization"),
        (["pytorch_model_fsdp_0/x"], r"accelerate merge-weights {0}/pytorch_model_fsdp_0 {0}, then: future-l1 export"),
        (
            ["actor/model_world_size_1_rank_0.pt", "actor/huggingface/config.json"],
            "without whole weights, because hf_m",
        ),
        (
            ["checkpoint_tracker.json", "actor/model_world_size_1_rank_0.pt"],
            "EasyR1 resumes from. Run python EasyR1/scripts/model_merger.py --local_dir {0}/actor, and use",
        ),
        (
            ["checkpoint_tracker.json", "actor/model_world_size_1_rank_0.pt", "actor/lora_adapter/adapter_config.json"],
            "EasyR1 resumes from. Run future-l1 export {0}/actor/lora_adapter OUT",
        ),
        (["actor/huggingface/config.json", "actor/huggingface/model.safetensors"], r"Use {0}/actor/huggingface"),
        (["huggingface/config.json", "huggingface/model.safetensors"], r"Use {0}/huggingface"),
        (["checkpoint-2/x", "checkpoint-4/x"], r"a run's folder. Name one of {0}/checkpoint-2, {0}/checkpoint-4"),
    ],
)
def test_folders_that_need_another_tool_first(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for act in (load, lambda path: export(path, tmp_path / "out"), lambda path: check_whole(path, "key")):
        with pytest.raises(CheckpointError) as error:
            act(tmp_path)
        assert message.format(tmp_path) in str(error.value)


def write_recipe(start, tmp_path, lora):
    """run.yaml: one step of two records."""
    world = make_world(tmp_path / "world", test=0, train=4, seed=0, progress=False)
    rates = {"learning_rate": 0.01, "schedule": "constant", "warmup_ratio": 0.0}
    recipe = {
        "model": str(start),
        "output": str(tmp_path / "run"),
        "data": {"records": str(world.sft), "videos": str(world.videos), "question_media": "video", "workers": 0},
        "train": rates | {"max_steps": 1, "batch_size": 2, "micro_batch_size": 2, "lora": lora},
        "eval": {"prompts": 0},
        "log": {"every": 1, "save_every": 1, "tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))


def test_a_run_from_bfloat16(start, tmp_path):
    """Trained in float32, written in bfloat16; its checkpoint-N is one that any tool reads, or is exported.

    Full from the one start, LoRA from the other.
    """
    rank = 0 if json.loads((start / "config.json").read_text())["tie_word_embeddings"] else 2
    write_recipe(start, tmp_path, {"rank": rank})
    assert main([str(tmp_path / "run.yaml")]) == 0
    final, checkpoint = tmp_path / "run" / "final", tmp_path / "run" / "checkpoints" / "checkpoint-1"
    assert {value.dtype for value in stored(final).values()} == {torch.bfloat16}
    assert (final / "adapter").exists() is bool(rank)
    exported = export(checkpoint, tmp_path / "out")
    assert all(torch.equal(value, stored(final)[name]) for name, value in stored(exported).items())
    assert not all(torch.equal(value, stored(start)[name]) for name, value in stored(exported).items())
    assert load(checkpoint)[0].dtype == (torch.bfloat16 if rank else torch.float32)
    assert sources(checkpoint).is_whole is not bool(rank)


def test_four_bits_hold_the_layers_that_have_adapters(start):
    from bitsandbytes.nn import Linear4bit

    whole = load(start, dtype=torch.float32)[0]
    packed = load(start, dtype=torch.float32, quantization=quantization(4, bf16=False))[0]
    names = {name for name, module in packed.named_modules() if isinstance(module, Linear4bit)}
    assert names == {name for name, _ in whole.named_modules() if re.fullmatch(lora_targets(QWEN3_VL), name)}
    assert {p.dtype for name, p in packed.named_parameters() if name.rpartition(".")[0] not in names} == {torch.float32}
    # The largest of 16 NF4 levels in a block of 64 is exact; between two levels an error of half their distance.
    name = min(names)
    weight = whole.get_submodule(name).weight.detach()
    inner = packed.get_submodule(name)
    with torch.no_grad():
        found = inner(torch.eye(weight.shape[1])).T
    largest = weight.abs().amax()
    assert 0 < (found - weight).abs().max() < 0.16 * largest  # the widest gap of NF4 is .304 of a block's largest


def test_a_run_with_four_bits(start, tmp_path):
    """`final` has its adapters on the weights that it started from; the run goes on from its checkpoint."""
    write_recipe(start, tmp_path, {"rank": 2, "bits": 4})
    assert main([str(tmp_path / "run.yaml")]) == 0
    assert main([str(tmp_path / "run.yaml"), "train.max_steps=2"]) == 0
    final, checkpoint = tmp_path / "run" / "final", tmp_path / "run" / "checkpoints" / "checkpoint-2"
    before, after = stored(start), stored(final)
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in changed if "layers" in name} == {
        name for name, _ in load(start)[0].named_modules() if re.fullmatch(lora_targets(QWEN3_VL), name)
    }
    assert not any("quantization" in key for key in json.loads((final / "config.json").read_text()))
    exported = export(checkpoint, tmp_path / "out")
    assert all(torch.equal(value, after[name]) for name, value in stored(exported).items())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"train": {"lora": {"rank": 2, "bits": 8}}}, "bits: expected 4 or null, found 8"),
        ({"train": {"lora": {"bits": 4}}}, "Set train.lora.rank as well"),
        ({"train": {"lora": {"rank": 2, "bits": 4}}, "hf_trainer": {"deepspeed": "zero3"}}, "each GPU then holds"),
        (
            {"train": {"lora": {"rank": 2, "bits": 4}}, "qwen_vl_finetune": {"path": "x"}},
            "adapters to quantised layers",
        ),
    ],
    ids=["8", "rank", "deepspeed", "host"],
)
def test_where_four_bits_have_no_place(tmp_path, capsys, change, match):
    recipe = {"model": "m", "output": "o", "data": {"records": "r", "videos": "v"}} | change
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(tmp_path / "run.yaml")]) == 2
    assert match in capsys.readouterr().err
