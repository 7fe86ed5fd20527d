"""convert, load and save: ids, untouched bases, heads, released checkpoints, the chat template, and bad checkpoints."""

import hashlib
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from future_l1_plugin.errors import CheckpointError, ConfigError
from future_l1_plugin.latent import LatentTokens
from future_l1_plugin.latent.channel import HEAD_NAME, latent_head
from future_l1_plugin.latent.heads import build_head
from future_l1_plugin.latent.tokens import TOKENS
from future_l1_plugin.model import (
    SYSTEM_PROMPT,
    LatentConfig,
    chat_template,
    checkpoint,
    convert,
    load,
    make_tiny,
    save,
)
from future_l1_plugin.model.backbone import QWEN3_VL


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain Qwen3-VL without latent tokens. All tests share it: none may change it."""
    path = make_tiny(tmp_path_factory.mktemp("base") / "base", latent=False)
    before = hashes(path)
    yield path
    assert hashes(path) == before


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    return convert(base, tmp_path_factory.mktemp("converted") / "out")


def hashes(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(path).iterdir()}


def edited(source, path, **keys):
    """A copy of a checkpoint with other keys in its config.json; None takes a key out."""
    shutil.copytree(source, path)
    file = path / "config.json"
    config = {k: v for k, v in (json.loads(file.read_text()) | keys).items() if v is not None}
    file.write_text(json.dumps(config))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# convert
# ---------------------------------------------------------------------------------------------------------------------


def test_tokens_in_the_released_order_and_base_untouched(base, tmp_path):
    before = hashes(base)
    size = len(load_tokenizer(base))
    out = convert(base, tmp_path / "deep" / "out", max_latent_token=6)
    assert hashes(base) == before
    assert not list(out.parent.glob("*.part"))
    ids = load_tokenizer(out).get_vocab()
    assert [ids[token] for token in TOKENS] == [size, size + 1, size + 2]
    config = json.loads((out / "config.json").read_text())
    assert (config["latent_id"], config["latent_start_id"], config["latent_end_id"]) == (size, size + 1, size + 2)
    assert config["max_latent_token"] == 6
    assert config["model_type"] == "qwen3_vl" and config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    tokenizer = load_tokenizer(out)
    assert tokenizer("a<|latent_start|><|latent|><|latent_end|>b")["input_ids"][1:-1] == [size + 1, size, size + 2]


def load_tokenizer(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_weights_are_those_of_the_base(base, converted):
    from safetensors.torch import load_file

    old, new = (load_file(path / "model.safetensors") for path in (base, converted))
    assert old.keys() == new.keys()  # also: the embedding of 512 rows had room, so nothing was resized
    assert all(torch.equal(old[name], new[name]) for name in old)


def with_rows(base, path, spare):
    """The base with an embedding of as many rows as there are tokens, and some to spare; (model, rows)."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    model, processor = Qwen3VLForConditionalGeneration.from_pretrained(base), AutoProcessor.from_pretrained(base)
    rows = len(processor.tokenizer) + spare
    model.resize_token_embeddings(rows)
    save(model, processor, path)
    return model, rows


@pytest.mark.parametrize("spare", [3, 200])
def test_rows_to_spare_are_kept(base, tmp_path, spare):
    """As on the real Qwen3-VL, whose embedding has 267 rows more than tokens: nothing grows, nothing shrinks."""
    model, rows = with_rows(base, tmp_path / "in", spare)
    grown, _ = load(convert(tmp_path / "in", tmp_path / "out"))
    assert grown.config.text_config.vocab_size == rows
    assert torch.equal(grown.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_full_vocabulary_is_resized(base, tmp_path):
    full = tmp_path / "full"
    model, rows = with_rows(base, full, spare=0)
    out = convert(full, tmp_path / "out")
    grown, _ = load(out)
    tokens = LatentConfig.from_hf(grown.config).tokens
    assert tokens == LatentTokens(rows, rows + 1, rows + 2)
    weight = grown.get_input_embeddings().weight
    assert len(weight) == grown.config.text_config.vocab_size == -(-(rows + 3) // 64) * 64
    assert grown.lm_head.weight.data_ptr() == weight.data_ptr()  # still tied
    old = model.get_input_embeddings().weight
    assert torch.equal(weight[:rows], old)
    assert_apart(weight[rows : rows + 3], old)
    twin, _ = load(convert(full, tmp_path / "twin"))
    assert torch.equal(twin.get_input_embeddings().weight, weight)  # what is drawn follows the seed
    logits = grown(input_ids=torch.tensor([[5, tokens.start, tokens.latent]])).logits
    assert logits.shape[-1] == len(weight) and logits.isfinite().all()


def assert_apart(rows, others):
    """As far from each other, and as long, as any rows: within a factor of 1.5."""
    usual = torch.pdist(others.float()).median(), others.float().norm(dim=1).median()
    for found, expected in zip((torch.pdist(rows.float()), rows.float().norm(dim=1)), usual, strict=True):
        assert ((found > expected / 1.5) & (found < expected * 1.5)).all(), (found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_are_alike_are_drawn_apart(base, tmp_path, tied):
    """As in a real base, whose spare rows were never trained; rows that others stand in are left as they are."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    model, processor = Qwen3VLForConditionalGeneration.from_pretrained(base), AutoProcessor.from_pretrained(base)
    first = len(processor.tokenizer)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight[first:] = weight[:first].mean(0) + 1e-5 * torch.randn(len(weight) - first, weight.shape[1])
    save(model.bfloat16(), processor, tmp_path / "alike")
    found, _ = load(convert(tmp_path / "alike", tmp_path / "out"))
    again, _ = load(convert(tmp_path / "alike", tmp_path / "again", seed=1))
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new, other = (getattr(m, name)().weight for m in (model, found, again))
        assert new.dtype == torch.bfloat16
        changed = (old != new).any(1).nonzero()[:, 0].tolist()
        assert changed == [first, first + 1, first + 2]
        assert_apart(new[first : first + 3], new[:first])
        assert not torch.equal(new[first], other[first])  # the seed's
    same = found.get_input_embeddings().weight[first] == found.get_output_embeddings().weight[first]
    assert bool(same.all()) is tied


def test_the_micro_base_keeps_its_rows(tmp_path):
    """They are apart, and `make demo` starts where it did."""
    from future_l1_plugin.model.tiny import MICRO_BASE

    model, _ = load(convert(MICRO_BASE, tmp_path / "out"))
    assert torch.equal(model.get_input_embeddings().weight, load(MICRO_BASE)[0].get_input_embeddings().weight)


def test_converting_again_keeps_ids_and_takes_new_settings(converted, tmp_path):
    again = convert(converted, tmp_path / "again", max_latent_token=8, latent_loss="cosine", latent_lambda=0.2)
    first, second = (LatentConfig.from_hf(load(path)[0].config) for path in (converted, again))
    assert second == LatentConfig(
        first.latent_id, first.latent_start_id, first.latent_end_id, 8, latent_loss="cosine", latent_lambda=0.2
    )
    assert len(load_tokenizer(again)) == len(load_tokenizer(converted))


def test_latent_keys_round_trip(base, tmp_path):
    keys = dict(
        train_fixed_latent_budget=2,
        fixed_latent_budget=True,
        loose_latent_budget=7,
        infer_latent_multiplier=1.5,
        pool_after_proj=False,
        latent_loss="sum_mse",
        latent_lambda=0.5,
        force_initial_latent_mode=True,
        projection_hidden_dim=64,
        projection_head_type="lvr",
    )
    model, _ = load(convert(base, tmp_path / "out", max_latent_token=3, **keys))
    found = LatentConfig.from_hf(model.config)
    assert {key: getattr(found, key) for key in keys} == keys and found.max_latent_token == 3
    save(*load(tmp_path / "out"), tmp_path / "again")
    assert LatentConfig.from_hf(load(tmp_path / "again")[0].config) == found


@pytest.mark.parametrize("kind", ["lvr", "swiglu"])
def test_heads_are_saved_and_loaded(base, tmp_path, kind):
    keys = dict(use_projection_head=True, projection_head_type=kind, projection_hidden_dim=32)
    out = convert(base, tmp_path / "out", seed=3, **keys)
    from safetensors.torch import load_file

    stored = {k: v for k, v in load_file(out / "model.safetensors").items() if k.startswith(f"{HEAD_NAME}.")}
    model, processor = load(out)
    head = latent_head(model)
    assert {f"{HEAD_NAME}.{name}" for name in head.state_dict()} == set(stored)
    assert all(torch.equal(stored[f"{HEAD_NAME}.{name}"], value) for name, value in head.state_dict().items())
    # Trained weights come back too, in another dtype and from sharded files.
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    processor.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    again, _ = load(tmp_path / "sharded", dtype="bfloat16")
    state = latent_head(again).state_dict()
    assert all(torch.equal(value.bfloat16(), state[name]) for name, value in head.state_dict().items())


def test_the_seed_initialises_a_head_and_leaves_the_global_generator_alone(base, tmp_path):
    state = torch.get_rng_state()
    keys = dict(use_projection_head=True, projection_head_type="lvr")
    outs = [convert(base, tmp_path / str(i), seed=seed, **keys) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(torch.get_rng_state(), state)
    heads = [latent_head(load(out)[0]).mlp[0].weight for out in outs]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_convert_refuses(base, tmp_path):
    before = hashes(base)
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    for out, message in (
        (used, "expected a new or empty folder, found files in it"),
        (used / "notes.txt", "expected a new or empty folder, found files in it"),
        (base, "is the base itself, which is never changed"),
        (base.parent / "x" / ".." / base.name, "is the base itself"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(base, out)
    assert (used / "notes.txt").read_text() == "mine" and hashes(base) == before
    (tmp_path / "empty").mkdir()
    assert convert(base, tmp_path / "empty").name == "empty"  # an empty folder will do
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        make_tiny(used)


def test_convert_refuses_what_is_no_qwen3_vl(base, tmp_path):
    other = edited(base, tmp_path / "other", model_type="qwen2_5_vl")
    for act in (lambda: convert(other, tmp_path / "out"), lambda: load(other)):
        with pytest.raises(
            CheckpointError, match=r"other/config\.json: expected model_type 'qwen3_vl', found 'qwen2_5"
        ):
            act()
    (tmp_path / "nothing").mkdir()
    for act in (lambda: convert(tmp_path / "nothing", tmp_path / "out"), lambda: load(tmp_path / "nothing")):
        with pytest.raises(CheckpointError, match=r"nothing: expected a checkpoint folder, found no config\.json"):
            act()
    with pytest.raises(ConfigError, match="latent_loss: expected one of mse, sum_mse, cosine, found 'l1'"):
        convert(base, tmp_path / "out", latent_loss="l1")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# load
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", QWEN3_VL.released)
def test_released_architectures_load_as_the_stock_class(converted, tmp_path, architecture):
    from transformers import Qwen3VLForConditionalGeneration

    # As released: the keys of training alone, and what is off written as False.
    released = edited(
        converted,
        tmp_path / "released",
        architectures=[architecture],
        force_initial_latent_mode=None,
        loose_latent_budget=None,
        train_fixed_latent_budget=0,
        fixed_latent_budget=None,
    )
    (released / "chat_template.jinja").write_text("{{ messages[0].content }}")
    model, processor = load(released)
    assert type(model) is Qwen3VLForConditionalGeneration and not model.training
    latent = LatentConfig.from_hf(model.config)
    assert latent.force_initial_latent_mode is (architecture == "RICE_Qwen3VL")
    assert latent.train_fixed_latent_budget is None and latent.fixed_latent_budget is False
    assert latent.budget.limit == 8
    assert processor.tokenizer.padding_side == "left"
    assert processor.chat_template == chat_template()
    # Saved again it is a stock checkpoint, and what the old name meant is kept.
    save(model, processor, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert config["force_initial_latent_mode"] is latent.force_initial_latent_mode
    assert json.loads((released / "config.json").read_text())["architectures"] == [architecture]


def test_weights_and_overrides(converted):
    from safetensors.torch import load_file

    model, _ = load(converted, max_latent_token=8, fixed_latent_budget=True)
    latent = LatentConfig.from_hf(model.config)
    assert (latent.budget.limit, latent.budget.exact) == (8, True)
    assert LatentConfig.from_hf(load(converted)[0].config).budget.limit == 8  # 4 x 2: the checkpoint is as it was
    stored = load_file(converted / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    with pytest.raises(CheckpointError, match=r"unknown latent keys \['max_latents'\]; known are .*'max_latent_token'"):
        load(converted, max_latents=8)
    with pytest.raises(ConfigError, match="max_latent_token: expected at least 1, found 0"):
        load(converted, max_latent_token=0)


def test_dtype(converted):
    assert load(converted, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load(converted, dtype="float64")[0].dtype == torch.float64
    for wrong in ("float33", "nn"):
        with pytest.raises(ConfigError, match=f"expected auto or a torch dtype such as bfloat16, found '{wrong}'"):
            load(converted, dtype=wrong)


def test_ids_that_differ_from_the_config(converted, tmp_path):
    ids = json.loads((converted / "config.json").read_text())
    swapped = edited(converted, tmp_path / "swapped", latent_id=ids["latent_end_id"], latent_end_id=ids["latent_id"])
    with pytest.raises(CheckpointError) as error:
        load(swapped)
    message = str(error.value)
    assert message.startswith(f"{swapped}: config.json says LatentTokens(latent={ids['latent_end_id']}, ")
    assert f"the tokenizer says LatentTokens(latent={ids['latent_id']}, " in message
    assert "copy the tokenizer files" in message and "future-l1 convert" in message


def test_no_latent_tokens(base, converted, tmp_path):
    with pytest.raises(CheckpointError, match=r"missing are latent_id, .*future-l1 convert BASE OUT"):
        load(base)
    # The config of one checkpoint with the tokenizer of another.
    mixed = shutil.copytree(base, tmp_path / "mixed")
    shutil.copy(converted / "config.json", mixed)
    with pytest.raises(CheckpointError, match=r"tokenizer .*missing are <\|latent\|>.*future-l1 convert BASE OUT"):
        load(mixed)


def test_missing_and_broken_files(converted, tmp_path):
    for path in (tmp_path / "not" / "there", "./not_there"):
        with pytest.raises(CheckpointError, match=r"not.there: no such folder"):
            load(path)
        with pytest.raises(CheckpointError, match=r"not.there: no such folder"):
            convert(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="some/name: no such folder here, and the hub did not give it"):
        load("some/name")  # may be a hub id: asked for, in vain
    no_weights = shutil.copytree(converted, tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no_weights: the checkpoint is incomplete: .*model.safetensors"):
        load(no_weights)
    broken = shutil.copytree(converted, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="broken: the checkpoint is incomplete"):
        load(broken)


def test_missing_and_misfit_head_weights(base, converted, tmp_path):
    asks = edited(converted, tmp_path / "asks", use_projection_head=True, projection_head_type="lvr")
    with pytest.raises(CheckpointError, match=r"asks: .*LvrHead.*missing: ln_q.bias.*use_projection_head to false"):
        load(asks)
    assert latent_head(load(asks, use_projection_head=False)[0]) is None
    keys = dict(use_projection_head=True, projection_head_type="swiglu", projection_hidden_dim=32)
    out = convert(base, tmp_path / "out", **keys)
    with pytest.raises(CheckpointError, match=r"(?s)out: .*SwigluHead do not fit config.json.*projection_hidden_dim"):
        load(out, projection_hidden_dim=16)


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed's ZeRO-3, which divides weights among processes as they are made
# ---------------------------------------------------------------------------------------------------------------------


def test_zero3_places_nothing_and_divides_the_head(base, tmp_path, monkeypatch):
    """`.to` would move divided weights, and the rope's buffers, to where no GPU looks for them."""
    path = convert(base, tmp_path / "out", use_projection_head=True, projection_head_type="lvr")
    expected = latent_head(load(path)[0]).state_dict()
    done = []

    @contextmanager
    def note(name, value):
        done.append((name, "in", value))
        yield
        done.append((name, "out", value))

    zero = SimpleNamespace(
        Init=lambda config_dict_or_path: note("Init", config_dict_or_path),
        GatheredParameters=lambda parameters, modifier_rank: note("Gathered", (len(parameters), modifier_rank)),
    )
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    monkeypatch.setattr(checkpoint, "divided", lambda: True)
    monkeypatch.setattr("transformers.integrations.deepspeed_config", lambda: {"stage": 3})
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_, **__: pytest.fail("moved"))
    monkeypatch.setattr(checkpoint, "build_head", lambda *shape: done.append("made") or build_head(*shape))
    with pytest.raises(ConfigError, match=r"load: device='cpu' would move weights .* Pass device=None"):
        load(path)
    model, _ = load(path, device=None)
    loaded = [("Gathered", "in", (6, 0)), ("Gathered", "out", (6, 0))]
    assert done == [("Init", "in", {"stage": 3}), "made", ("Init", "out", {"stage": 3}), *loaded]
    for name, value in latent_head(model).state_dict().items():
        assert torch.equal(value, expected[name])
    with checkpoint.gathered(model):  # what `final` is written within
        assert done[-1] == ("Gathered", "in", (len(list(model.parameters())), None))


def test_a_model_on_the_meta_device_has_no_weights_to_divide(base, monkeypatch):
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    monkeypatch.setattr(checkpoint, "divided", lambda: True)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(base))
        checkpoint.attach_head(model, LatentConfig(1, 2, 3, use_projection_head=True))
    assert latent_head(model) is not None


# ---------------------------------------------------------------------------------------------------------------------
# LatentConfig
# ---------------------------------------------------------------------------------------------------------------------


def hf_config(**keys):
    keys = dict(latent_id=7, latent_start_id=8, latent_end_id=9) | keys
    return SimpleNamespace(**keys, to_dict=lambda: dict(keys))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latent_id", 17),
        ("latent_start_id", 18),
        ("latent_end_id", 19),
        ("max_latent_token", 16),
        ("train_fixed_latent_budget", 3),
        ("fixed_latent_budget", True),
        ("loose_latent_budget", 5),
        ("infer_latent_multiplier", 1.25),
        ("pool_after_proj", False),
        ("latent_loss", "cosine"),
        ("latent_lambda", 0.7),
        ("use_projection_head", True),
        ("projection_hidden_dim", 99),
        ("projection_head_type", "lvr"),
        ("force_initial_latent_mode", True),
    ],
)
def test_every_released_key_is_read_and_written(key, value):
    default = LatentConfig.from_hf(hf_config())
    assert getattr(default, key) != value
    read = LatentConfig.from_hf(hf_config(**{key: value}))
    assert {k: v for k, v in vars(read).items() if v != getattr(default, k)} == {key: value}
    written = SimpleNamespace()
    read.to_hf(written)
    assert getattr(written, key) == value


def test_decoder_recon_keys_are_carried(converted, tmp_path):
    extra = {"decoder_recon_weight": 0.5, "decoder_recon_layers": [1, 2]}
    read = LatentConfig.from_hf(hf_config(**extra))
    assert read.decoder_recon == extra
    written = SimpleNamespace()
    read.to_hf(written)
    assert vars(written).items() >= extra.items()
    model, processor = load(edited(converted, tmp_path / "in", **extra))
    save(model, processor, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in written.items() if k.startswith("decoder_recon")} == extra


def test_values_that_mean_off():
    off = LatentConfig.from_hf(
        hf_config(train_fixed_latent_budget=0, fixed_latent_budget=0, loose_latent_budget=None, latent_loss=None)
    )
    assert off == LatentConfig(7, 8, 9)
    assert LatentConfig(7, 8, 9).head == "none" and LatentConfig(7, 8, 9, use_projection_head=True).head == "swiglu"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(max_latent_token=0), "max_latent_token: expected at least 1, found 0"),
        (dict(latent_loss="l2"), "latent_loss: expected one of mse, sum_mse, cosine, found 'l2'"),
        (
            dict(use_projection_head=True, projection_head_type="mlp"),
            "projection_head_type: expected one of lvr, swiglu, found 'mlp'",
        ),
    ],
)
def test_bad_settings(keys, message):
    with pytest.raises(ConfigError, match=message):
        LatentConfig(7, 8, 9, **keys)


# ---------------------------------------------------------------------------------------------------------------------
# The chat template, as a processor renders it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(converted):
    return load(converted)[1]


USER = {"role": "user", "content": "hello"}


def render(processor, *messages, template=None, **kwargs):
    return processor.apply_chat_template(list(messages), tokenize=False, chat_template=template, **kwargs)


def test_images_of_assistant_turns_survive(processor):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Q?"}]}
    assistant = {
        "role": "assistant",
        "content": [{"type": "text", "text": "<reason>r</reason>"}, {"type": "image"}, {"type": "text", "text": "A"}],
    }
    text = render(processor, {"role": "system", "content": "S"}, user, assistant, {"role": "user", "content": "more"})
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n"
        f"<|im_start|>user\n{QWEN3_VL.image_text}{QWEN3_VL.video_text}Q?<|im_end|>\n"
        f"<|im_start|>assistant\n<reason>r</reason>{QWEN3_VL.image_text}A<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n"
    )


def test_media_tokens_of_both_turns_reach_the_model(processor, converted):
    """End to end: pictures given in the messages, tokenized by the processor."""
    model, _ = load(converted)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    show = {"type": "image", "image": picture}
    inputs = processor.apply_chat_template(
        [
            {"role": "user", "content": [show, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "R"}, show]},
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2 * 4  # 64x64: 2x2 tokens each
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert model(**inputs).logits.isfinite().all()


def test_other_spellings_of_parts(processor):
    parts = [{"image_url": "a.png"}, {"image": "a.png"}, {"video": "a.mp4"}, {"text": "t"}]
    assert f"user\n{QWEN3_VL.image_text}{QWEN3_VL.image_text}{QWEN3_VL.video_text}t<|im_end|>" in render(
        processor, {"role": "user", "content": parts}
    )


def test_default_system_prompt(processor, converted, tmp_path):
    opening = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
    assert render(processor, USER, add_generation_prompt=True) == (
        f"{opening}<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    own = render(processor, {"role": "system", "content": "Mine."}, USER)
    assert own == "<|im_start|>system\nMine.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    # It is saved: on the processor's side and on the tokenizer's.
    assert (converted / "chat_template.jinja").read_text() == chat_template()
    assert load_tokenizer(converted).chat_template == chat_template()


def test_no_system_prompt(base, tmp_path):
    processor = load(convert(base, tmp_path / "out", system_prompt=""))[1]
    assert render(processor, USER) == "<|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize(
    "prompt",
    ['It\'s "so".', "two\nlines\n", "back\\slash\\n", "braces {{ x }} {% if %} {# no #}", "Zürich 東京 \t.", "'"],
)
def test_system_prompts_of_all_sorts(processor, prompt):
    text = render(processor, USER, template=chat_template(prompt))
    assert text == f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"


def test_unknown_role(processor):
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="expected role system, user or assistant, found tool"):
        render(processor, USER, {"role": "tool", "content": "x"})
