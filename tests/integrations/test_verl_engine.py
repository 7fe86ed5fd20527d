"""The FSDP2 engine with latents against a rollout of our own decoder: one rank over gloo, no Ray."""

import json
import shutil
import types
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from la_dapo_losses import loss_of
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack, TensorDict

pytest.importorskip("verl")

from torch.distributed.tensor import DTensor
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.tokenizer import hf_processor
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine_workers import ActorRolloutRefWorker

from future_l1_plugin.errors import CheckpointError, ConfigError
from future_l1_plugin.integrations.verl.batch import with_ragged_positions
from future_l1_plugin.integrations.verl.columns import ANGLE, MEANS, MU, RETURN_ANGLE, RETURN_MU, WEIGHTS, rows
from future_l1_plugin.integrations.verl.engine import LatentEngine
from future_l1_plugin.integrations.verl.loss import loss_function
from future_l1_plugin.integrations.verl.worker import LatentWorker
from future_l1_plugin.la_dapo import LaDapoLoss, LatentScoring, Tempering, continue_log_prob, latent_kl, latent_log_prob
from future_l1_plugin.latent import LatentChannel, build_policy
from future_l1_plugin.model import LatentConfig, generate, load, make_tiny
from future_l1_plugin.model.checkpoint import attach_head, save

TEMPERATURE = 0.8
VMF = {"name": "vmf", "mean_cosine": 0.9}
SCORING = LatentScoring.build(VMF, "sqrt_dim")
STOCK = {}


@pytest.fixture(scope="module", autouse=True)
def group():
    """One rank over gloo. verl patches classes of transformers for good: they are put back for the other tests."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    kinds = [kind for kind in vars(modeling_qwen3_vl).values() if isinstance(kind, type)]
    STOCK.update({kind: dict(vars(kind)) for kind in kinds})
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()
    with stock_forward():
        STOCK.clear()


@contextmanager
def stock_forward():
    """transformers' own classes, as they were before verl patched them."""
    changed = [
        (kind, name, vars(kind).get(name), value)
        for kind, attributes in STOCK.items()
        for name, value in attributes.items()
        if vars(kind).get(name) is not value and callable(value)
    ]
    for kind, name, _, value in changed:
        setattr(kind, name, value)
    yield
    for kind, name, patched, _ in changed if STOCK else ():
        setattr(kind, name, patched)


CHECKPOINTS = ("own_budget", "fixed_budget_and_head")


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """Checkpoint -> (path, model, rollouts), made before any engine: see `group`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_tiny(folder / "own_budget", seed=0)
    model, processor = load(folder / "own_budget")
    latent = LatentConfig.from_hf(model.config)
    latent.use_projection_head, latent.projection_head_type, latent.fixed_latent_budget = True, "lvr", True
    latent.to_hf(model.config)
    torch.manual_seed(1)
    attach_head(model, latent)
    save(model, processor, folder / "fixed_budget_and_head")
    return {name: (folder / name, *roll_out(folder / name)) for name in CHECKPOINTS}


@pytest.fixture(params=CHECKPOINTS)
def rollout(request, rollouts):
    return rollouts[request.param]


def prompts(processor):
    """A text, an image and a video prompt."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    video = rng.integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    media = [("", {}), ("<image>", {"images": [image]}), ("<video>", {"videos": [video]})]
    tags = {"": "", "<image>": "<|vision_start|><|image_pad|><|vision_end|>"}
    tags["<video>"] = "<|vision_start|><|video_pad|><|vision_end|>"
    for tag, given in media:
        text = f"<|im_start|>user\n{tags[tag]}where <|latent|> next?<|im_end|>\n<|im_start|>assistant\n"
        extra = {}
        if "videos" in given:
            from transformers.video_utils import VideoMetadata

            extra = {
                "videos_kwargs": {
                    "video_metadata": [VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])],
                    "do_sample_frames": False,
                }
            }
        encoded = processor(text=[text], return_tensors="pt", **given, **extra)
        yield {k: v for k, v in encoded.items() if isinstance(v, torch.Tensor)}


def roll_out(path):
    """Rollouts that hold spans, two for each prompt."""
    model, processor = load(path, dtype=torch.float32, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(3)

    def open_spans(ids, scores):  # a random model hardly ever opens one by itself
        scores[:, model.config.latent_start_id] += 4.0
        return scores

    found = []
    for inputs in [prompt for prompt in prompts(processor) for _ in range(2)]:
        out = generate(
            model,
            inputs,
            policy=build_policy(**VMF),
            max_new_tokens=14,
            temperature=TEMPERATURE,
            generator=generator,
            record_means=True,
            logits_processor=[open_spans],
        )
        found.append((inputs, out))
    return model, found


def as_batch(path, model, found):
    """The rollouts as what verl's agent loop puts into its queue and its trainer takes out."""
    worker = types.SimpleNamespace(processor=hf_processor(str(path)))
    fields = {name: [] for name in ("input_ids", "prompts", "responses", "response_mask", "position_ids", "latents")}
    media = []
    for inputs, out in found:
        prompt, response = inputs["input_ids"][0], out.responses[0]
        ids = torch.cat([prompt, response])
        mm = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        position = AgentLoopWorker._compute_position_ids(worker, ids[None], torch.ones_like(ids)[None], mm)
        mask = [
            int(not f or t == model.config.latent_id)
            for t, f in zip(response.tolist(), out.forced[0].tolist(), strict=True)
        ]
        for name, value in zip(
            fields, (ids, prompt, response, torch.tensor(mask), position[0], out.latents[0].float()), strict=True
        ):
            fields[name].append(value)
        media.append(mm)
    nested = {
        k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in fields.items() if k != "position_ids"
    }
    nested["position_ids"] = tu.nested_tensor_from_tensor_list(fields["position_ids"], ragged_idx=2)
    batch = TensorDict(
        nested | {"loss_mask": nested["response_mask"].clone()},
        batch_size=len(found),
    )
    batch["multi_modal_inputs"] = NonTensorStack(*(NonTensorData(m) for m in media))
    tu.assign_non_tensor(
        batch,
        temperature=TEMPERATURE,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=600,
        calculate_entropy=True,
        **{RETURN_MU: True},
    )
    return batch


def make_engine(path, packed=False, model=None, **settings):
    model = HFModelConfig(
        path=str(path),
        use_remove_padding=packed,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
        **(model or {}),
    )
    config = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        **{"mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32"}, **settings},
    )
    engine = LatentEngine(
        model_config=model,
        engine_config=config,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    engine.scoring = SCORING
    return engine


def expected_log_probs(out, model):
    """What the decoder says: its tokens' log-probabilities, and the latents' tempered densities in their places."""
    tempering = Tempering.from_name("sqrt_dim")
    values = out.logprobs[0].double().clone()
    at = out.responses[0] == model.config.latent_id
    density = latent_log_prob(build_policy(**VMF), out.means[0], out.latents[0], tempering)
    if not model.config.fixed_latent_budget:
        density = density + torch.log1p(-out.end_logprobs[0].double().exp())
    values[at] = density
    return values


@pytest.mark.parametrize("packed", [False, True])
def test_log_probs_are_those_of_the_rollout(rollout, packed):
    path, model, found = rollout
    assert sum(len(out.latents[0]) for _, out in found) > 10
    engine = make_engine(path, packed)
    batch = as_batch(path, model, found)
    tu.assign_non_tensor(batch, use_remove_padding=packed)
    with engine.eval_mode():
        result = engine.infer_batch(batch.clone())["model_output"]
    for (inputs, out), log_probs, mu in zip(found, rows(result["log_probs"]), rows(result[MU]), strict=True):
        prompt = inputs["input_ids"].shape[1]
        got = log_probs[prompt - 1 : -1]
        chosen = ~out.forced[0] | (out.responses[0] == model.config.latent_id)
        torch.testing.assert_close(got[chosen], expected_log_probs(out, model)[chosen], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mu, out.means[0].float(), atol=2e-5, rtol=1e-4)


def test_the_angle_between_the_rollout_s_mean_and_the_actor_s(rollout):
    """The actor computes what the rollout did; turned by 0.01 and 0.5 rad, its means are told to be that far off."""
    path, model, found = rollout
    engine, angles, means = make_engine(path), [], []
    batch = as_batch(path, model, found)
    for i, (_, out) in enumerate(found):
        mu = out.means[0].double()
        aside = torch.randn(mu.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        aside -= (aside * mu).sum(1, keepdim=True) / mu.square().sum(1, keepdim=True) * mu
        aside *= mu.norm(dim=1, keepdim=True) / aside.norm(dim=1, keepdim=True)
        angles.append(torch.tensor([0.0, 0.01, 0.5]).repeat(len(mu))[: len(mu), None])
        means.append((mu * angles[-1].cos() + aside * angles[-1].sin()).float() * 3)  # lengths do not matter
    batch[MEANS] = torch.nested.as_nested_tensor(means, layout=torch.jagged)
    tu.assign_non_tensor(batch, use_remove_padding=False, **{RETURN_ANGLE: True})
    with engine.eval_mode():
        found_angles = rows(engine.infer_batch(batch)["model_output"][ANGLE])
    for got, expected in zip(found_angles, angles, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def trainable(batch, found, model):
    """The batch as it reaches the actor: old and reference log-probabilities, the reference's mu, advantages."""
    rng = torch.Generator().manual_seed(5)
    responses = rows(batch["responses"])

    def noise(values, scale):
        return values + scale * torch.randn(values.shape, generator=rng, dtype=values.dtype)

    log_probs = [expected_log_probs(out, model).float().double() for _, out in found]
    columns = {
        "old_log_probs": [noise(values, 0.2) for values in log_probs],
        "ref_log_prob": [noise(values, 0.2) for values in log_probs],
        "advantages": [torch.full(row.shape, float(i - 2)) for i, row in enumerate(responses)],
        MU: [noise(out.means[0].float(), 0.1) for _, out in found],
    }
    for name, values in columns.items():
        batch[name] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return batch


def plain_loss(model, found, batch, settings):
    """The same loss, one sample at a time, without verl: a forward pass of the stock model in a `LatentChannel`."""
    policy, tempering = build_policy(**VMF), Tempering.from_name("sqrt_dim")
    config, padded, entropies = model.config, [], []
    for i, (inputs, out) in enumerate(found):
        prompt, response = inputs["input_ids"], out.responses[0]
        ids = torch.cat([prompt[0], response])[None]
        media = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(response)))
        with LatentChannel(model, LatentConfig.from_hf(config).tokens) as channel:
            channel.feed([out.latents[0]], prompt.shape[1])
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **media).logits[0, prompt.shape[1] - 1 : -1]
        logits = logits.float() / TEMPERATURE
        values = logits.log_softmax(-1).gather(1, response[:, None])[:, 0].double()
        at = response == config.latent_id
        # Of the words that the model chose: no latent, and no end of a span.
        words = ~out.forced[0] & (response != config.latent_id) & (response != config.latent_end_id)
        entropies.append(-(logits.log_softmax(-1).exp() * logits.log_softmax(-1)).sum(-1)[words].sum())
        density = latent_log_prob(policy, channel.mu, out.latents[0], tempering)
        if not config.fixed_latent_budget:
            density = density + continue_log_prob(logits[at], config.latent_end_id)
        values = values.masked_scatter(at, density)
        kl = torch.zeros_like(values).masked_scatter(at, latent_kl(policy, channel.mu, rows(batch[MU])[i], tempering))
        padded.append((values, kl))
    columns = {name: batch[name].to_padded_tensor(0) for name in ("old_log_probs", "ref_log_prob", "advantages")}
    mask, ids = (batch[name].to_padded_tensor(0) for name in ("response_mask", "responses"))
    latent = mask.bool() & (ids == config.latent_id)
    text = mask.bool() & ~latent
    values, kl = (torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for column in zip(*padded, strict=True))
    weights = batch[WEIGHTS].to_padded_tensor(0) if WEIGHTS in batch else None
    loss, _, _ = loss_of(
        replace(settings, entropy_weight=0.0),
        values,
        columns["old_log_probs"],
        columns["advantages"],
        text,
        latent,
        int(text.sum()),
        int(latent.sum()),
        ref_log_prob=columns["ref_log_prob"],
        latent_kl=kl,
        weights=weights,
    )
    return loss - settings.entropy_weight * torch.stack(entropies).sum() / text.sum()


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_the_stock_model(rollout, packed, corrected):
    path, model, found = rollout
    # The entropy bonus, in two of the four: on verl's own entropies.
    settings = LaDapoLoss(
        kl_weight=0.05, latent_kl_weight=0.2, clip_high=0.1, entropy_weight=0.3 if packed == corrected else 0.0
    )
    batch = trainable(as_batch(path, model, found), found, model)
    if corrected:
        drawn = torch.Generator().manual_seed(7)
        weights = [2 * torch.rand(row.shape, generator=drawn) for row in rows(batch["responses"])]
        batch[WEIGHTS] = torch.nested.as_nested_tensor(weights, layout=torch.jagged)
    with stock_forward():
        model.zero_grad()
        expected = plain_loss(model, found, batch, settings)
        expected.backward()
    engine = make_engine(path, packed)
    # Micro-batches of one sample or two; a response or more has no span.
    tu.assign_non_tensor(batch, use_remove_padding=packed, max_token_len_per_gpu=120)
    with engine.train_mode():
        result = engine.forward_backward_batch(
            batch, loss_function(settings, SCORING, model.config.latent_id, corrected)
        )
        ours = {n: None if p.grad is None else p.grad.full_tensor() for n, p in engine.module.named_parameters()}
    assert len(result["loss"]) > 1
    assert sum(result["loss"]) == pytest.approx(float(expected), abs=1e-5)
    for name, value in model.named_parameters():
        theirs = torch.zeros_like(value) if value.grad is None else value.grad
        got = torch.zeros_like(value) if ours[name] is None else ours[name]
        torch.testing.assert_close(got, theirs, atol=2e-6, rtol=2e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_entropy_is_of_the_words_that_were_chosen(rollouts):
    """None of a latent, and none where a span was ended: what was chosen there was not one id among all."""
    path, model, found = rollouts["own_budget"]
    config, found = model.config, deepcopy(found)
    response = found[0][1].responses[0]
    words = (response != config.latent_id) & (response != config.latent_end_id)
    response[words.nonzero()[-1]] = config.latent_end_id  # as if the model had ended a span by itself
    batch = as_batch(path, model, found)
    tu.assign_non_tensor(batch, use_remove_padding=False)
    engine = make_engine(path)
    with engine.eval_mode():
        entropies = rows(engine.infer_batch(batch)["model_output"]["entropy"])
    assert sum(len(out.latents[0]) for _, out in found) > 10
    for (inputs, out), row in zip(found, entropies, strict=True):
        words = (out.responses[0] != config.latent_id) & (out.responses[0] != config.latent_end_id)
        assert ((row[inputs["input_ids"].shape[1] - 1 : -1] > 0) == words).all()


def peak_memory(run):
    """Bytes allocated by torch at the worst moment of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("packed", [False, True])
def test_the_choice_to_go_on_costs_no_second_gradient_of_the_logits(rollouts, packed):
    path, model, found = rollouts["own_budget"]
    engine, vocabulary = make_engine(path, packed), 4000
    batch = as_batch(path, model, found)
    tu.assign_non_tensor(batch, use_remove_padding=packed, calculate_entropy=False)
    count = sum(len(out.latents[0]) for _, out in found)
    mu = torch.randn(count, model.config.text_config.hidden_size, requires_grad=True)
    engine._channel = types.SimpleNamespace(feed=lambda *a, **k: None, mu=mu)
    inputs, arguments = engine.prepare_model_inputs(batch)
    hidden = torch.randn(*inputs["input_ids"].shape, 8, requires_grad=True)
    weight = torch.randn(8, vocabulary)

    def log_probs():
        output = types.SimpleNamespace(logits=hidden @ weight)
        return engine.prepare_model_outputs(output, arguments, batch, None)["log_probs"].values().sum()

    with_choice = peak_memory(lambda: log_probs().backward())
    engine.latent.fixed_latent_budget = True
    without = peak_memory(lambda: log_probs().backward())
    assert with_choice - without < 0.5 * 4 * hidden[..., 0].numel() * vocabulary


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_weights_are_cast_before_they_are_gathered(rollouts, dtype, lora, monkeypatch):
    adapters = {"lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora": {"merge": True}}
    engine = make_engine(rollouts["fixed_budget_and_head"][0], model=adapters if lora else {})
    if lora:
        for name, parameter in engine.module.named_parameters():
            if "lora_B" in name:  # zero at the start: nothing would be merged
                torch.nn.init.constant_(parameter, 0.01)
    gathered, gather = [], DTensor.full_tensor

    def full_tensor(self, **kwargs):
        gathered.append(self.dtype)
        return gather(self, **kwargs)

    weights = {name: value.clone() for name, value in engine.get_per_tensor_param()[0]}
    monkeypatch.setattr(DTensor, "full_tensor", full_tensor)
    engine.sync_dtype = dtype
    synced = {name: value.clone() for name, value in engine.get_per_tensor_param()[0]}
    assert set(gathered) == {dtype or torch.float32}
    assert synced.keys() == weights.keys() and all(value.dtype == torch.float32 for value in weights.values())
    for name, value in weights.items():
        assert torch.equal(synced[name], value.to(dtype or torch.float32)), name


@pytest.mark.parametrize(
    ("given", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", None)]
)
def test_weights_are_synced_in_the_rollout_s_dtype(given, expected, monkeypatch):
    worker = object.__new__(LatentWorker)
    worker.role, worker.actor = "actor_rollout", types.SimpleNamespace(engine=types.SimpleNamespace())
    worker.config = OmegaConf.create({"actor": {}, "model": {}, "rollout": {"dtype": given}})
    monkeypatch.setattr(ActorRolloutRefWorker, "init_model", lambda self: None)
    worker.init_model()
    assert worker.actor.engine.sync_dtype is {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(given)


def test_a_reference_in_bfloat16_computes_what_one_in_float32_does(rollouts):
    """The forward pass is in bfloat16 in any case: `ref.fsdp_config.model_dtype=bf16` only halves the weights."""
    path, model, found = rollouts["fixed_budget_and_head"]
    results = []
    for dtype in ("fp32", "bf16"):
        engine = make_engine(path, forward_only=True, model_dtype=dtype, mixed_precision={"param_dtype": "bf16"})
        assert {parameter.dtype for parameter in engine.module.parameters()} == {
            {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        }
        batch = as_batch(path, model, found)
        tu.assign_non_tensor(batch, use_remove_padding=False)
        with engine.eval_mode():
            output = engine.infer_batch(batch)["model_output"]
        results.append((output["log_probs"].values(), output[MU].values()))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("cut", ["a latent", "an id"])
def test_a_count_that_differs_names_the_sample(rollout, cut):
    path, model, found = rollout
    batch = as_batch(path, model, found)
    batch["uid"] = NonTensorStack(*(NonTensorData(f"s{i}") for i in range(len(found))))
    which = next(i for i, (_, out) in enumerate(found) if len(out.latents[0]))
    latents = rows(batch["latents"])
    latents[which] = latents[which][1:] if cut == "a latent" else torch.cat([latents[which]] * 2)
    batch["latents"] = torch.nested.as_nested_tensor(latents, layout=torch.jagged)
    engine = make_engine(path)
    tu.assign_non_tensor(batch, use_remove_padding=False)
    with (
        engine.eval_mode(),
        pytest.raises(ValueError, match=rf"sample s{which}: its response has \d+ <\|latent\|> ids"),
    ):
        engine.infer_batch(batch)


def test_ulysses_is_refused(rollouts):
    with pytest.raises(ConfigError, match="ulysses_sequence_parallel_size: latents need 1"):
        make_engine(rollouts["own_budget"][0], packed=True, ulysses_sequence_parallel_size=2)


def test_a_checkpoint_without_latent_tokens_is_refused(rollouts, tmp_path):
    path = rollouts["own_budget"][0]
    shutil.copytree(path, tmp_path / "plain")
    file = tmp_path / "plain" / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("latent_")}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="future-l1 convert"):
        make_engine(tmp_path / "plain")


@pytest.mark.parametrize("arrives", ["ragged in T", "ragged in 4", "dense"])
def test_positions_of_samples_of_one_length(arrives):
    each = [torch.arange(20).reshape(4, 5) + i for i in range(3)]
    positions = {
        "ragged in T": tu.nested_tensor_from_tensor_list(each, ragged_idx=2),
        "ragged in 4": torch.nested.as_nested_tensor(each, layout=torch.jagged),
        "dense": torch.stack(each),
    }[arrives]
    ids = torch.nested.as_nested_tensor([torch.arange(5)] * 3, layout=torch.jagged)
    batch = with_ragged_positions(TensorDict({"input_ids": ids, "position_ids": positions}, batch_size=3))
    chosen = tu.index_select_tensor_dict(batch, [2, 0])["position_ids"].unbind()
    assert [row.tolist() for row in chosen] == [each[2].tolist(), each[0].tolist()]


def untied(path, out):
    """A copy whose lm_head is a weight of its own."""
    model, processor = load(path)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(1).clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    save(model, processor, out, dtype=torch.bfloat16)
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_rows_of_the_latent_tokens(rollouts, tmp_path, tied):
    """And they are in what the rollout gets and in what other tools read, which is in the start checkpoint's dtype."""
    path = rollouts["own_budget"][0] if tied else untied(rollouts["own_budget"][0], tmp_path / "untied")
    with stock_forward():
        model, found = rollouts["own_budget"][1:] if tied else roll_out(path)
    adapters = {"lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora": {"merge": True}}
    engine = make_engine(path, model=adapters)
    deltas = {name: p for name, p in engine.module.named_parameters() if "trainable_tokens_delta" in name}
    assert len(deltas) == (1 if tied else 2) and all(p.shape == (3, 128) for p in deltas.values())
    batch = trainable(as_batch(path, model, found), found, model)
    tu.assign_non_tensor(batch, use_remove_padding=False)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch, loss_function(LaDapoLoss(), SCORING, model.config.latent_id))
        assert all(p.grad.full_tensor().abs().sum(1).min() > 0 for p in deltas.values())
        engine.optimizer_step()
    with engine.eval_mode():
        after = engine.infer_batch(as_batch_for(path, model, found))["model_output"]["log_probs"].values()
    sent = {name: value.clone() for name, value in engine.get_per_tensor_param()[0]}
    assert sent.keys() == model.state_dict().keys()
    fresh = make_engine(path)  # without LoRA, given what the rollout is given
    assert not fresh.module.load_state_dict(as_dtensors(fresh.module, sent)).missing_keys
    with fresh.eval_mode():
        again = fresh.infer_batch(as_batch_for(path, model, found))["model_output"]["log_probs"].values()
    torch.testing.assert_close(again, after, atol=1e-5, rtol=1e-5)
    start, ids = model.state_dict(), list(engine.latent.tokens.ids)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert (sent[name] != start[name]).any(1).nonzero()[:, 0].tolist() == ids
    engine.checkpoint_manager.checkpoint_save_contents.append("hf_model")
    engine.save_checkpoint(str(tmp_path / "actor"))
    written = load(tmp_path / "actor" / "huggingface")[0]
    assert written.dtype == (torch.float32 if tied else torch.bfloat16)
    for name, value in sent.items():
        assert torch.equal(written.state_dict()[name], value.to(written.dtype)), name


def as_batch_for(path, model, found):
    batch = as_batch(path, model, found)
    tu.assign_non_tensor(batch, use_remove_padding=False)
    return batch


def as_dtensors(module, weights):
    from torch.distributed.tensor import distribute_tensor

    return {
        name: distribute_tensor(weights[name], value.device_mesh, value.placements)
        if isinstance(value, DTensor)
        else weights[name]
        for name, value in module.state_dict().items()
    }
