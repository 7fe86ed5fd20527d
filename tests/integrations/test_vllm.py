"""Latent decoding in vLLM against `model.generate` and teacher-forced passes, on the CPU build.

One engine is as nasty as can be: few blocks, so that requests are preempted; prompts in chunks; prefix caching; the
scheduler a step ahead of the model. What the CPU build lacks is in `tests/vllm_cpu`.
"""

import contextlib
import inspect
import socket
import subprocess
import sys
import time
from collections import Counter
from copy import copy
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from made import picture
from PIL import Image

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm import engine_args, media, read_latents
from future_l1_plugin.integrations.vllm.results import unpack
from future_l1_plugin.latent import LatentChannel
from future_l1_plugin.latent.channel import HEAD_NAME
from future_l1_plugin.model import LatentConfig, attach_head, generate, load, save

pytestmark = pytest.mark.vllm

STEPS = 40
SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 192,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 48,  # prompts come in chunks
    "block_size": 32,  # the CPU build takes no smaller one
    "num_gpu_blocks_override": 13,  # a request needs up to 5: six of them do not fit
    "kv_cache_memory_bytes": 16 << 20,
    "enable_prefix_caching": True,
    "limit_mm_per_prompt": {"image": 2, "video": 1},
    "seed": 0,
}
VMF = {"latent_policy": "vmf", "latent_kappa": 9}
SHARED = "The ball moves to the left, then it falls behind the box, and then it rolls along the belt. "


@pytest.fixture(scope="module")
def vllm():
    """The package, with the engine in this process, so that one can look into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        yield vllm


# ---- checkpoint, prompts, engine ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tiny_path, tmp_path_factory):
    """The tiny checkpoint with a latent head, its output head nudged so that rows open spans, end them both ways, and
    stop."""
    model, processor = load(tiny_path, dtype=torch.float32)
    latent = replace(LatentConfig.from_hf(model.config), use_projection_head=True, projection_hidden_dim=64)
    latent.to_hf(model.config)
    torch.manual_seed(0)
    attach_head(model, latent)
    tokens = latent.tokens
    head = 0.3 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(6))
    for token, weight in ((tokens.start, 4), (tokens.end, 6), (processor.tokenizer.eos_token_id, 2.5)):
        head[token] *= weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    save(model, processor, out := tmp_path_factory.mktemp("nudged") / "checkpoint")
    return out


@pytest.fixture(scope="module")
def reference(path):
    """(model, processor) of transformers."""
    return load(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(vllm, path):
    """The engine, and how often requests were preempted and given their latents back."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from future_l1_plugin.integrations.vllm import scheduler as ours

    seen = Counter()
    with pytest.MonkeyPatch.context() as patch:
        preempt, latents_of = Scheduler._preempt_request, ours.LatentConnector.latents_of

        def counted_preempt(self, *args, **kwargs):
            seen["preempted"] += 1
            return preempt(self, *args, **kwargs)

        def counted_latents(self, request):
            found = latents_of(self, request)
            seen["given back"] += bool(found[0]) and not request.is_finished()
            return found

        patch.setattr(Scheduler, "_preempt_request", counted_preempt)
        patch.setattr(ours.LatentConnector, "latents_of", counted_latents)
        llm = vllm.LLM(**engine_args(path, **SMALL))
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert llm.llm_engine.engine_core.engine_core.batch_queue_size == 2
        yield SimpleNamespace(llm=llm, seen=seen)
        llm.llm_engine.engine_core.shutdown()


def rows():
    """16 of (text, image or None, video or None), of which many open alike."""
    for i in range(16):
        text = SHARED * (i % 8 < 5) + f"Where will it be {i} steps later?"
        video = np.stack([picture(frame) for frame in range(2 + i % 2)])
        yield text, picture(0) if i % 3 == 1 else None, video if i % 3 == 2 else None


def prompt(processor, text, image=None, video=None):
    """The same prompt for vLLM and for transformers."""
    content = [{"type": kind} for kind, given in (("image", image), ("video", video)) if given is not None]
    message = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    chat = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    theirs, ours = {}, {}
    if image is not None:
        theirs["image"], ours["images"] = [Image.fromarray(image)], [image]
    if video is not None:
        about = {"fps": 4.0, "frames_indices": list(range(len(video))), "total_num_frames": len(video)}
        theirs["video"] = [(video, about | {"do_sample_frames": False})]
        ours |= {"videos": [video], "video_metadata": [about], "do_sample_frames": False}
    inputs = processor(text=[chat], return_tensors="pt", **ours)
    inputs.pop("video_metadata", None)
    return {"prompt": chat, "multi_modal_data": theirs} if theirs else {"prompt": chat}, inputs


@pytest.fixture(scope="module")
def mixed(reference):
    return [prompt(reference[1], *row) for row in rows()]


def ask(vllm, engine, prompts, **params):
    """Outputs for prompts of vLLM; `params` hold a value for all, or a list with one for each."""
    settings = [
        vllm.SamplingParams(**{k: v[i] if isinstance(v, list) else v for k, v in params.items()}, logprobs=0)
        for i in range(len(prompts))
    ]
    return engine.llm.generate(prompts, settings, use_tqdm=False)


def logprobs_of(output):
    return torch.tensor([entry[t].logprob for entry, t in zip(output.logprobs, output.token_ids, strict=True)])


# ---- the criteria ---------------------------------------------------------------------------------------------------


def test_greedy_decoding_equals_transformers(vllm, engine, reference, mixed):
    """Every fourth request does without the latent head, beside others that have it."""
    headless = [i % 4 == 3 for i in range(len(mixed))]
    outputs = ask(
        vllm,
        engine,
        [theirs for theirs, _ in mixed],
        temperature=0,
        max_tokens=STEPS,
        extra_args=[{"latent_return": "means", "latent_head": int(not without)} for without in headless],
    )
    for output, (_, inputs), without in zip(outputs, mixed, headless, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            if without:
                patch.delitem(reference[0]._modules, HEAD_NAME)
            wanted = generate(reference[0], inputs, max_new_tokens=STEPS, record_means=True)
        got = read_latents(output)
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
        assert list(output.outputs[0].token_ids) == wanted.responses[0].tolist()
        assert torch.equal(got.forced, wanted.forced[0])
        torch.testing.assert_close(got.latents, wanted.latents[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(got.means, wanted.means[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(got.end_logprobs, wanted.end_logprobs[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(logprobs_of(output.outputs[0]), wanted.logprobs[0], atol=1e-3, rtol=0)
    assert sum(len(read_latents(output).latents) > 0 for output in outputs) >= 14
    assert engine.seen["preempted"] >= 3 and engine.seen["given back"] >= 3
    assert sum(output.num_cached_tokens > 0 for output in outputs) >= 3


def test_a_teacher_forced_pass_reproduces_stochastic_rollouts(vllm, engine, reference, mixed):
    """Six rollouts of one prompt with spans of 40 latents, longer than a block, whose ids are all the same: only the
    latents tell their blocks apart. Three others with a policy of their own share their steps."""
    tokens = LatentConfig.from_hf(reference[0].config).tokens
    before = engine.seen.copy()
    group = {"latent_policy": "vmf", "latent_mean_cosine": 0.7, "latent_limit": 40, "latent_exact": 1}
    others = {"latent_policy": "gaussian", "latent_sigma": 0.2, "latent_return": "means"}
    asked = [mixed[0]] * 6 + mixed[1:4]
    args = [group | {"latent_seed": i} for i in range(6)] + [others | {"latent_seed": i} for i in range(3)]
    started = [{tokens.start: 100.0}] * 6 + [None] * 3  # the group opens spans as soon as it can
    outputs = ask(
        vllm,
        engine,
        [theirs for theirs, _ in asked],
        temperature=0.8,
        seed=list(range(9)),
        max_tokens=46,
        ignore_eos=True,
        logit_bias=started,
        extra_args=args,
    )
    drawn = []
    for output, (_, inputs) in zip(outputs, asked, strict=True):
        response, got = torch.tensor([output.outputs[0].token_ids]), read_latents(output)
        logits, means = teacher_forced(reference[0], tokens, inputs, response, got.latents)
        expected = (logits / 0.8).log_softmax(-1).gather(1, response.T)[:, 0].masked_fill(got.forced, 0.0)
        torch.testing.assert_close(logprobs_of(output.outputs[0]), expected, atol=1e-3, rtol=0)
        if got.means is not None:
            torch.testing.assert_close(got.means, means, atol=1e-3, rtol=0)
        if len(means):
            drawn.append(float(torch.cosine_similarity(got.latents, means).mean()))
    assert all(0.6 < cosine < 0.8 for cosine in drawn[:6]), drawn
    first = [read_latents(output).latents[0] for output in outputs[:6]]
    assert len({tuple(z.tolist()) for z in first}) == 6
    assert all(list(o.outputs[0].token_ids)[1:41] == [tokens.latent] * 40 for o in outputs[:6])
    assert engine.seen["given back"] - before["given back"] >= 2


def teacher_forced(model, tokens, inputs, response, latents):
    """Logits (T, V) that chose the response, Long (1, T), and mu (k, H) of its latents."""
    start, more = inputs["input_ids"].shape[1], dict(inputs)
    more["input_ids"] = torch.cat([inputs["input_ids"], response], 1)
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    types = inputs["mm_token_type_ids"]
    more["mm_token_type_ids"] = torch.cat([types, types.new_zeros(response.shape)], 1)
    with torch.no_grad(), LatentChannel(model, tokens) as channel:
        channel.feed([latents], start)
        return model(**more).logits[0, start - 1 : -1], channel.mu


def test_a_prompt_that_spells_latents_does_not_find_generated_ones(vllm, engine, reference, mixed):
    """The ids of an earlier answer, with 40 latents in it, as a prompt: there they are embeddings like any other."""
    tokens = LatentConfig.from_hf(reference[0].config).tokens
    forty = {"latent_limit": 40, "latent_exact": 1}
    (answer,) = ask(
        vllm,
        engine,
        [mixed[0][0]],
        temperature=0,
        max_tokens=45,
        ignore_eos=True,
        extra_args=forty,
        logit_bias={tokens.start: 100.0},
    )
    ids = answer.prompt_token_ids + list(answer.outputs[0].token_ids)
    assert ids.count(tokens.latent) >= 40 and len(ids) // 32 > len(answer.prompt_token_ids) // 32
    (output,) = ask(vllm, engine, [{"prompt_token_ids": ids}], temperature=0, max_tokens=4)
    assert output.num_cached_tokens == len(answer.prompt_token_ids) // 32 * 32  # the blocks of the earlier prompt alone
    asked = torch.tensor([ids])
    wanted = generate(reference[0], {"input_ids": asked, "attention_mask": torch.ones_like(asked)}, max_new_tokens=4)
    assert list(output.outputs[0].token_ids) == wanted.responses[0].tolist()
    torch.testing.assert_close(logprobs_of(output.outputs[0]), wanted.logprobs[0], atol=1e-3, rtol=0)


def test_prompts_reach_vllm_as_the_processor_made_them(vllm, reference):
    """Two videos and two images in one prompt: each item finds its own placeholders; equal pixels have equal names."""
    from future_l1_plugin.integrations.vllm.inputs import engine_input

    model, processor = reference
    draw = np.random.default_rng(0).integers
    videos = [draw(0, 255, (n, 64, 64, 3), dtype=np.uint8) for n in (4, 2)]
    image = draw(0, 255, (64, 96, 3), dtype=np.uint8)
    content = [{"type": kind} for kind in ("video", "image", "video", "image")] + [{"type": "text", "text": "Why?"}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    about = [{"fps": 4.0, "frames_indices": list(range(len(v))), "total_num_frames": len(v)} for v in videos]
    given = {"images": [image, image], "videos": videos, "video_metadata": about, "do_sample_frames": False}
    inputs = processor(text=[chat], return_tensors="pt", **given)
    ids = inputs["input_ids"][0].tolist()
    prompt = engine_input(ids, inputs, model.config)
    assert prompt["prompt_token_ids"] == ids
    found = []
    for kind, token in (("image", model.config.image_token_id), ("video", model.config.video_token_id)):
        for place in prompt["mm_placeholders"][kind]:
            where = [place.offset + i for i in place.is_embed.nonzero().squeeze(1).tolist()]
            assert {ids[i] for i in where} == {token} and where[-1] == place.offset + place.length - 1
            found += where
    shown = (model.config.image_token_id, model.config.video_token_id)
    assert sorted(found) == [i for i, token in enumerate(ids) if token in shown]
    frames = [item["video_grid_thw"].data[0] for item in prompt["mm_kwargs"]["video"]]
    assert frames == [2, 1] and len(set(prompt["mm_hashes"]["video"])) == 2
    assert len(set(prompt["mm_hashes"]["image"])) == 1
    with pytest.raises(ConfigError, match="placeholders for pixel_values"):
        engine_input(ids[:-60], inputs, model.config)
    names = {"video": ["a", "b"], "image": ["c", "c"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "_name", lambda *item: pytest.fail("pixels were read again"))
        assert engine_input(ids, inputs, model.config, names)["mm_hashes"] == names
        with pytest.raises(ConfigError, match=r"expected names for \{'image': 2, 'video': 2\}, found \{'image': 2\}"):
            engine_input(ids, inputs, model.config, {"image": ["c", "c"]})
    assert prompt["mm_hashes"] == media.media_hashes(inputs)
    assert engine_input([1, 2, 3], {}, model.config)["type"] == "token"


def test_the_readme_s_lines(vllm, engine, path, repository):
    text = (repository / "README.md").read_text().split("## Latents in vLLM")[1]
    code = text.split("```python\n")[1].split("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "LLM", lambda **args: engine.llm)  # one engine is enough
        exec(code.replace("outputs/latent-8b", str(path)), found := {})
    assert len(found["read_latents"](found["out"]).forced) == len(found["out"].outputs[0].token_ids)


# ---- serving --------------------------------------------------------------------------------------------------------


def test_a_server_answers_with_latent_spans(path, reference, tmp_path):
    """The command of the README, in a process of its own, and a chat completion over HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {key.replace("_", "-"): SMALL[key] for key in ("max_model_len", "max_num_seqs", "block_size")}
    command = [sys.executable, "-m", "future_l1_plugin.integrations.vllm", str(path), "--enforce-eager"]
    command += [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", "16777216", "--port", str(port)]
    question = "Where will it be 3 steps later?"
    body = {"model": str(path), "messages": [{"role": "user", "content": question}], "max_tokens": STEPS}
    body |= {"temperature": 0, "skip_special_tokens": False, "vllm_xargs": {"latent_limit": 3, "latent_exact": 1}}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                        break
                time.sleep(0.5)
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=120).json()
        finally:
            server.terminate()
    model, processor = reference
    inputs = prompt(processor, question)[1]
    limits = {"max_latent_token": 3, "fixed_latent_budget": True}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in limits.items():
            patch.setattr(model.config, key, value)
        wanted = generate(model, inputs, max_new_tokens=STEPS)
    assert reply["choices"][0]["message"]["content"] == wanted.text[0].removesuffix(processor.tokenizer.eos_token)
    got = unpack(reply["kv_transfer_params"])
    torch.testing.assert_close(got.latents, wanted.latents[0], atol=1e-4, rtol=0)
    assert len(got.latents) > 0


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, match",
    [
        ({"extra_args": {"latent_policy": "vmf"}}, "exactly one of kappa"),
        ({"extra_args": {"latent_limits": 3}}, "unknown key 'latent_limits'"),
        ({"extra_args": {"_latent_replay": 1}}, "set by the scheduler"),
        ({"n": 2}, "the latents of one response"),
        (
            {"n": 2, "extra_args": {"latent_return": "none", "latent_policy": "vmf", "latent_kappa": 9}},
            "one latent_seed",
        ),
        ({"allowed_token_ids": [[5]]}, "allowed_token_ids: know no latent spans"),
        ({"stop": "box"}, r"stop=\['box'\]: vLLM looks for stop strings outside"),
        ({"stop": [["box"]], "extra_args": {"latent_return": "means"}}, "which loses its latents"),
        ({"repetition_detection": {"max_pattern_size": 2, "min_count": 3}}, "repetition_detection: know no latent"),
    ],
)
def test_a_wrong_request_is_refused_and_the_engine_goes_on(vllm, engine, mixed, params, match):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=match):
        ask(vllm, engine, [mixed[0][0]], **params)
    ask(vllm, engine, [mixed[0][0]], temperature=0, max_tokens=1)


def test_beam_search_is_refused(vllm, engine, mixed):
    """Each of its steps is a request whose prompt ends with ids that were latents."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError, match="how vLLM searches with beams"):
        engine.llm.beam_search([mixed[0][0]], BeamSearchParams(beam_width=2, max_tokens=4))


def test_what_ends_a_response_and_keeps_its_latents(vllm, engine, mixed):
    """Stop strings end it too early where nobody asked for latents; stop ids wherever they are asked for."""
    (whole,) = ask(vllm, engine, [mixed[0][0]], temperature=0, max_tokens=STEPS)
    ids, latents = list(whole.outputs[0].token_ids), read_latents(whole).latents
    end = engine.llm.llm_engine.vllm_config.model_config.hf_config.latent_end_id
    (cut,) = ask(vllm, engine, [mixed[0][0]], temperature=0, max_tokens=STEPS, stop_token_ids=[[end]])
    assert list(cut.outputs[0].token_ids) == ids[: ids.index(end) + 1]
    kept = read_latents(cut).latents
    assert 0 < len(kept) < len(latents)
    torch.testing.assert_close(kept, latents[: len(kept)], atol=1e-5, rtol=0)
    text = whole.outputs[0].text
    word = text[len(text) // 2 :][:3]
    free = {"extra_args": {"latent_return": "none"}, "skip_special_tokens": True}
    (stopped,) = ask(vllm, engine, [mixed[0][0]], temperature=0, max_tokens=STEPS, stop=word, **free)
    assert stopped.outputs[0].stop_reason == word
    assert not stopped.kv_transfer_params


@pytest.mark.parametrize(
    "change, match",
    [
        ({"parallel_config.pipeline_parallel_size": 2}, "pipeline_parallel_size: set it to 1"),
        ({"parallel_config.enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling: set it to False"),
        ({"speculative_config": object()}, "speculative_config: leave it out"),
        ({"kv_transfer_config": None}, "expected LatentConnector"),
        ({"scheduler_config.scheduler_cls": None}, "expected LatentScheduler"),
    ],
)
def test_an_engine_that_cannot_work_is_refused(engine, change, match):
    from future_l1_plugin.integrations.vllm.state import check_supported

    config = copy(engine.llm.llm_engine.vllm_config)
    check_supported(config, has_media=True)
    with pytest.raises(ConfigError, match="limit_mm_per_prompt"):
        check_supported(config, has_media=False)
    for key, value in change.items():
        *parents, name = key.split(".")
        holder = config
        for parent in parents:
            setattr(holder, parent, copy(getattr(holder, parent)))
            holder = getattr(holder, parent)
        object.__setattr__(holder, name, value)
    with pytest.raises(ConfigError, match=match):
        check_supported(config, has_media=True)


def test_the_first_model_runner_is_refused(engine, monkeypatch):
    """It never asks our model for its state, so nothing else would notice."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from future_l1_plugin.integrations.vllm.scheduler import LatentScheduler

    running = engine.llm.llm_engine.engine_core.engine_core.scheduler

    def init(self, second):
        self.connector, self.vllm_config = running.connector, SimpleNamespace(use_v2_model_runner=second)

    monkeypatch.setattr(AsyncScheduler, "__init__", init)
    LatentScheduler(True)
    with pytest.raises(ConfigError, match="found that it chose the first, which would decode without latents"):
        LatentScheduler(False)


def test_vllm_s_memory_profile_sees_what_a_rollout_needs(engine, monkeypatch):
    """Float32 copies of the logits, 0.6 GB each at 1,024 requests: the KV cache gets what profiling leaves."""
    from future_l1_plugin.integrations.vllm import state

    runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    seen = []
    monkeypatch.setattr(state, "logsigmoid", lambda x: seen.append(len(x)) or torch.nn.functional.logsigmoid(x))
    runner._dummy_sampler_run(torch.zeros(5, runner.model_config.get_hidden_size()))
    assert seen == [5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latents_and_means_leave_as_they_were_drawn(vllm, reference, dtype):
    """Bit by bit and in the model's dtype, through both processes and the response's JSON: 16 bits of a bfloat16."""
    import json
    import pickle

    from future_l1_plugin.integrations.vllm.connector import LatentConnector, LatentStep

    connector = LatentConnector.__new__(LatentConnector)
    connector._latent, connector._kept = LatentConfig.from_hf(reference[0].config), {}
    connector._none = torch.empty(0, 8, dtype=dtype)
    z, mu = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for i, position in enumerate((5, 6, 7)):  # a request of 4 ids; beside it one that draws nothing
        both = (torch.tensor([False, True]), torch.tensor([9, position]), torch.stack([z[i] + 1, z[i]]))
        step = LatentStep(["other", "it"], *both, torch.stack([mu[i] + 1, mu[i]]), torch.tensor([-1.0, -2.0]))
        sent = pickle.loads(pickle.dumps(step))
        assert sent.request_ids == ["it"] and sent.latents.dtype == dtype
        connector.keep(sent, {"it": None, "other": None})
    tokens = connector._latent.tokens
    request = SimpleNamespace(
        request_id="it",
        num_prompt_tokens=4,
        output_token_ids=[tokens.start, *[tokens.latent] * 3],
        is_finished=lambda: True,
        sampling_params=SimpleNamespace(extra_args={"latent_return": "means"}),
    )
    sent = json.loads(json.dumps(connector.request_finished(request, ())[1]))
    got = unpack(sent)
    assert got.latents.dtype == got.means.dtype == dtype and got.end_logprobs.dtype == torch.float32
    assert torch.equal(got.latents, z) and torch.equal(got.means, mu)
    assert len(sent["latents"]["latents"]["data"]) == 3 * 8 * dtype.itemsize * 4 // 3
    assert connector._kept == {}


def test_vllm_refuses_expandable_segments_where_we_do(vllm, path, monkeypatch):
    """`check_allocator` goes when this fails: vLLM then takes our connector for what it is, or asks differently."""
    from vllm.config import VllmConfig

    from future_l1_plugin.integrations.vllm.allocator import SETTING, VARIABLE

    monkeypatch.delenv(VARIABLE, raising=False)
    transfer = SimpleNamespace(kv_connector="LatentConnector")
    for sleeps, refused in ((False, True), (True, False)):
        config = SimpleNamespace(
            kv_transfer_config=transfer, model_config=SimpleNamespace(enable_cumem_allocator=sleeps)
        )
        VllmConfig._verify_kv_transfer_compat(config)
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, SETTING)
            with pytest.raises(ValueError, match="expandable_segments") if refused else contextlib.nullcontext():
                VllmConfig._verify_kv_transfer_compat(config)


# ---- the hooks into vLLM --------------------------------------------------------------------------------------------

GPU = "vllm.v1.worker.gpu"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
#: What we call or override: where it is, and parameters that it takes.
CALLED = {
    "ModelRegistry.register_model": ("vllm:ModelRegistry.register_model", "model_arch model_cls"),
    "ModelState.prepare_inputs_embeds": (
        f"{GPU}.model_states.default:DefaultModelState.prepare_inputs_embeds",
        "scheduled_encoder_inputs input_batch req_states",
    ),
    "Sampler.__call__": (f"{GPU}.sample.sampler:Sampler.__call__", "logits input_batch"),
    "Sampler.get_logprobs_dims": (f"{GPU}.sample.sampler:Sampler.get_logprobs_dims", "idx_mapping_np"),
    "NewRequestData.prefill_token_ids": ("vllm.v1.core.sched.output:NewRequestData", "prefill_token_ids"),
    "KVConnectorOutput.kv_connector_worker_meta": ("vllm.v1.outputs:KVConnectorOutput", "kv_connector_worker_meta"),
    "Scheduler.add_request": (f"{SCHEDULER}.add_request", "request"),
    "Scheduler.update_from_output": (f"{SCHEDULER}.update_from_output", "scheduler_output model_runner_output"),
    "LogitsProcessor.validate_params": (
        f"{GPU}.sample.logits_processor:LogitsProcessor.validate_params",
        "sampling_params",
    ),
    "RequestOutput.kv_transfer_params": ("vllm:RequestOutput", "kv_transfer_params"),
}
#: What vLLM does with our parts: where, and how that reads.
RUNNER = f"{GPU}.model_runner:GPUModelRunner"
DONE = {
    "get_model_state_cls": (f"{GPU}.model_states:resolve_model_state_cls", "return model.get_model_state_cls()"),
    "ModelState.add_request": (f"{RUNNER}.add_requests", "self.model_state.add_request(req_index, new_req_data)"),
    "ModelState.custom_sampler": (f"{RUNNER}.load_model", "self.model_state.custom_sampler(self.sampler)"),
    "compute_logits gets the sampled rows": (f"{RUNNER}.sample", "self.model.compute_logits(sample_hidden_states)"),
    "SamplingStates.temperature": (f"{GPU}.sample.states:SamplingStates.__init__", "self.temperature = "),
    "build_connector_worker_meta": (
        f"{GPU}.kv_connector:ActiveKVConnector.post_forward",
        "self.kv_connector.build_connector_worker_meta()",
    ),
    "request_finished_all_groups": (
        f"{SCHEDULER}._connector_finished",
        "self.connector.request_finished_all_groups(",
    ),
    "a preempted request comes back as a new one": (
        f"{SCHEDULER}.schedule",
        "scheduled_new_reqs.extend(scheduled_resumed_reqs)",
    ),
    "a request has no token while it is_prefilling": (
        "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        "req_state.is_prefilling = False",
    ),
    "request_states go by the id that add_request returns": ("vllm:LLMEngine.add_request", "return req_id"),
    "Request._block_hasher": ("vllm.v1.request:Request.update_block_hashes", "self._block_hasher(self)"),
}


def find(hook, where):
    module, _, names = where.partition(":")
    found = import_module(module)
    for name in names.split("."):
        found = getattr(found, name, None)
    assert found is not None, f"vLLM moved the hook {hook!r}: there is no {where}"
    return found


@pytest.mark.parametrize("hook", CALLED)
def test_a_hook_that_we_call_or_override(vllm, hook):
    where, parameters = CALLED[hook]
    missing = set(parameters.split()) - set(inspect.signature(find(hook, where)).parameters)
    assert not missing, f"vLLM changed the hook {hook!r}: {where} takes no {', '.join(sorted(missing))}"


@pytest.mark.parametrize("hook", DONE)
def test_a_hook_that_vllm_calls(vllm, hook):
    where, text = DONE[hook]
    assert text in inspect.getsource(find(hook, where)), f"vLLM changed the hook {hook!r}: {where} lacks {text!r}"
