"""verl's rollout backend `latent_hf`: what it returns, how requests become batches, how weights get in."""

import asyncio
import random

import numpy as np
import pytest
import torch
from made import picture

pytest.importorskip("verl")

from omegaconf import OmegaConf
from verl.workers.config import RolloutConfig
from verl.workers.config.rollout import CheckpointEngineConfig

from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.verl import rollout_server
from future_l1_plugin.integrations.verl.rollout import LatentHFAdapter, LatentHFReplica
from future_l1_plugin.integrations.verl.rollout_server import LatentHFServer
from future_l1_plugin.la_dapo import Tempering, continue_log_prob, latent_log_prob
from future_l1_plugin.latent import LatentChannel, build_policy
from future_l1_plugin.model import LatentConfig, attach_head, generate, load, save

VMF = {"name": "vmf", "mean_cosine": 0.9}
DETERMINISTIC = {"name": "deterministic"}
STEPS = 24

runner = asyncio.Runner()
run = runner.run  # one event loop for all calls, as in an actor


@pytest.fixture(scope="module", autouse=True)
def close_runner():
    yield
    runner.close()


@pytest.fixture(scope="module")
def path(tiny_path, tmp_path_factory):
    """The tiny checkpoint, its output head nudged so that rows open spans, end some of them themselves, and stop."""
    model, processor = load(tiny_path, dtype=torch.float32)
    tokens = LatentConfig.from_hf(model.config).tokens
    head = 0.3 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
    for token, weight in ((tokens.start, 4), (tokens.end, 6), (processor.tokenizer.eos_token_id, 3)):
        head[token] *= weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    save(model, processor, out := tmp_path_factory.mktemp("nudged") / "checkpoint")
    return out


def make_server(path, **more) -> LatentHFServer:
    settings = {
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "response_length": STEPS,
        "max_num_seqs": 4,
        "threads": 1,
    }
    return LatentHFServer(path, **(settings | more))


@pytest.fixture(scope="module")
def server(path):
    return make_server(path)


@pytest.fixture(scope="module")
def processor(path):
    return load(path)[1]


def prompt(processor, text, images=(), video=None):
    """What an agent loop has at hand: (prompt_ids, mm_inputs)."""
    content = [{"type": "image"} for _ in images] + ([{"type": "video"}] if video is not None else [])
    content.append({"type": "text", "text": text})
    message = [{"role": "user", "content": content}]
    more = {"images": list(images)} if images else {}
    if video is not None:
        metadata = {"fps": 4.0, "frames_indices": list(range(len(video))), "total_num_frames": len(video)}
        more |= {"videos": [video], "video_metadata": [metadata], "do_sample_frames": False}
    chat = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[chat], return_tensors="pt", **more)
    inputs.pop("video_metadata", None)
    return inputs["input_ids"][0].tolist(), dict(inputs)


@pytest.fixture(scope="module")
def mixed(processor):
    return [
        prompt(processor, "Where is it?"),
        prompt(processor, "What is this thing here, and where will it be 2 steps later?", [picture(0)]),
        prompt(processor, "And now?", [picture(1), picture(2, 32, 96)]),
        prompt(processor, "Where will it be?", video=np.stack([picture(s) for s in (3, 4, 5, 6)])),
        prompt(processor, "Where is it?", [picture(7)], np.stack([picture(s) for s in (8, 9)])),
        prompt(processor, "x", video=np.stack([picture(s, 96, 64) for s in (10, 11, 12)])),
    ]


def wave(position, size, name="w"):
    return {"id": name, "size": size, "position": position}


ALONE = wave(0, 1, "alone")


def sampling(policy=VMF, temperature=1.0, wave=None, tempering="none", seed=0, **more):
    latent = {"policy": policy, "tempering": tempering, "seed": seed, "wave": wave or ALONE}
    usual = {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}  # as verl sends them
    return {"temperature": temperature, **usual, "latent": latent, **more}


async def ask(server, prompts, params, order=None):
    """The answers to all prompts, which come in the given order."""
    tasks = {}
    for i in order or range(len(prompts)):
        ids, inputs = prompts[i]
        tasks[i] = asyncio.create_task(server.generate(ids, params[i], f"request {i}", mm_inputs=inputs))
        await asyncio.sleep(0)
    return await asyncio.gather(*(tasks[i] for i in range(len(prompts))), return_exceptions=True)


def ask_wave(server, prompts, order=None, name="w", **more):
    params = [sampling(wave=wave(i, len(prompts), name), **more) for i in range(len(prompts))]
    return run(ask(server, prompts, params, order))


# What comes back


def test_a_mixed_batch_answers_like_single_prompts(server, path, mixed):
    model, _ = load(path, dtype=torch.float32, attn_implementation="sdpa")
    answers = ask_wave(server, mixed, policy=DETERMINISTIC, temperature=0)
    for (_, inputs), answer in zip(mixed, answers, strict=True):
        alone = generate(model, inputs, max_new_tokens=STEPS)
        assert answer.token_ids == alone.responses[0].tolist()
        assert answer.extra_fields["forced"] == alone.forced[0].long().tolist()
        assert answer.stop_reason == "completed"
        torch.testing.assert_close(answer.extra_fields["latents"], alone.latents[0], atol=1e-4, rtol=0)
    assert len({len(answer.token_ids) for answer in answers}) > 1


@pytest.mark.parametrize(
    "policy, tempering, exact",
    [
        (VMF, "none", False),
        (VMF, "sqrt_dim", True),
        ({"name": "gaussian", "sigma": 0.3}, "dim", False),
        ({"name": "gaussian", "sigma": 0.3}, 0.5, True),
        (DETERMINISTIC, "none", False),
        ({"name": "laplace", "scale": 0.1}, "sqrt_dim", False),  # of another package
    ],
    ids=str,
)
def test_log_probs_equal_a_teacher_forced_pass(server, path, mixed, policy, tempering, exact):
    if exact:
        server = make_server(path, latent_keys={"fixed_latent_budget": True})
    answers = ask_wave(server, mixed, policy=policy, tempering=tempering, temperature=0.8, top_p=0.99)
    model, _ = load(path, dtype=torch.float32, attn_implementation="sdpa")
    tokens, checked = LatentConfig.from_hf(model.config).tokens, 0
    for (_, inputs), answer in zip(mixed, answers, strict=True):
        response, latents = torch.tensor([answer.token_ids]), answer.extra_fields["latents"]
        assert latents.dtype == torch.float32 and latents.shape == (answer.token_ids.count(tokens.latent), 128)
        start = inputs["input_ids"].shape[1]
        replay = inputs | {"input_ids": torch.cat([inputs["input_ids"], response], 1)}
        replay["attention_mask"] = torch.ones_like(replay["input_ids"])
        types = inputs["mm_token_type_ids"]
        replay["mm_token_type_ids"] = torch.cat([types, types.new_zeros(response.shape)], 1)
        with torch.no_grad(), LatentChannel(model, tokens) as channel:
            channel.feed([latents], start)
            logits = model(**replay).logits[0, start - 1 : -1]
        expected = (logits / 0.8).log_softmax(-1).gather(1, response.T)[:, 0].double()
        latent = response[0] == tokens.latent
        density = latent_log_prob(build_policy(**policy), channel.mu, latents, Tempering(tempering))
        if not exact:
            density = density + continue_log_prob(logits[latent], tokens.end, 0.8)
        forced = torch.tensor(answer.extra_fields["forced"]).bool()
        expected[forced] = 0.0
        expected[latent] = density
        torch.testing.assert_close(torch.tensor(answer.log_probs, dtype=torch.float64), expected, atol=1e-4, rtol=0)
        checked += len(latents)
    assert checked > 5


def test_returned_latents_are_those_that_were_fed(path, mixed):
    """In bfloat16, where a float32 copy of z before the cast would differ."""
    keys = {"force_initial_latent_mode": True, "fixed_latent_budget": True}
    server = make_server(path, dtype="bfloat16", latent_keys=keys)
    fed = []
    text = server._model.model.language_model
    text.layers[0].register_forward_pre_hook(lambda module, args: fed.append(args[0][0, -1].float()))
    (answer,) = ask_wave(server, mixed[:1], temperature=0)
    latents = answer.extra_fields["latents"]
    latent_id = server._model.config.latent_id
    # Pass j + 1 is fed what was chosen in pass j; the last choice is never fed.
    chosen = [fed[j + 1] for j, token in enumerate(answer.token_ids[:-1]) if token == latent_id]
    assert len(chosen) >= 4 and torch.equal(latents[: len(chosen)], torch.stack(chosen))


def test_text_alone_brings_empty_latents(server, processor):
    """A response without a span: verl drops a field that is missing on any sample."""
    (answer,) = ask_wave(server, [prompt(processor, "Hm?")], max_tokens=1, temperature=0)
    assert len(answer.token_ids) == len(answer.log_probs) == 1
    assert answer.extra_fields["latents"].shape == (0, 128)
    assert answer.extra_fields["global_steps"] is None


# Waves


def same(a, b):
    return (a.token_ids, a.log_probs) == (b.token_ids, b.log_probs) and torch.equal(
        a.extra_fields["latents"], b.extra_fields["latents"]
    )


def test_a_wave_does_not_depend_on_the_order_of_arrival(server, mixed):
    prompts = [mixed[i] for i in (0, 1, 0, 3, 5, 0, 2, 0, 4, 0)]  # three batches; a group of equal prompts
    first = ask_wave(server, prompts, max_tokens=12)
    for seed in (1, 2):
        order = random.Random(seed).sample(range(len(prompts)), len(prompts))
        again = ask_wave(server, prompts, order, max_tokens=12)
        assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(first[i].log_probs) for i in (0, 2, 5, 7, 9)}) > 2  # a group is not one response five times
    for other in ({"name": "v"}, {"seed": 1}):
        again = ask_wave(server, prompts, max_tokens=12, **other)
        assert sum(same(a, b) for a, b in zip(first, again, strict=True)) <= 2  # some stop at once, by chance


def test_two_waves_do_not_mix(server, mixed):
    async def both():
        params = [sampling(wave=wave(i // 2, 2, "ab"[i % 2])) for i in range(4)]
        return await ask(server, [mixed[0], mixed[1]] * 2, params)

    async def one(name):
        return await ask(server, [mixed["ab".index(name)]] * 2, [sampling(wave=wave(i, 2, name)) for i in range(2)])

    together, a, b = run(both()), run(one("a")), run(one("b"))
    assert all(same(x, y) for x, y in zip(together, (a[0], b[0], a[1], b[1]), strict=True))


def test_a_wave_does_not_wait_for_an_absent_request(server, mixed):
    """A prompt that could not be encoded; the others decode as they do in a wave without its place."""

    async def go():
        params = [sampling(wave=wave(position, 3, "gap")) for position in range(3)]
        params[1]["latent"]["wave"]["absent"] = True
        asked = [server.generate(mixed[0][0], params[0], "r0"), server.generate([], params[1], "r1")]
        return await asyncio.wait_for(asyncio.gather(*asked, server.generate(mixed[0][0], params[2], "r2")), 60)

    first, absent, last = run(go())
    assert (absent.token_ids, absent.stop_reason) == ([], "aborted")
    assert len(first.token_ids) > 0
    assert len(last.token_ids) > 0


def test_an_incomplete_wave_fails_after_its_time(path, mixed):
    server = make_server(path, wave_timeout_s=0.2)
    answers = run(ask(server, mixed[:2], [sampling(wave=wave(i, 5, "step 7")) for i in range(2)]))
    for answer in answers:
        assert isinstance(answer, TimeoutError)
        assert "wave 'step 7': expected 5 requests, 2 came and no other for 0.2 s" in str(answer)
    assert not server._requests


@pytest.mark.parametrize(
    "second, match",
    [
        ({"temperature": 0.5, "wave": wave(1, 3)}, "one setting.*temperature=1.0.*temperature=0.5"),
        ({"seed": 1, "wave": wave(1, 3)}, "one setting.*seed=0.*seed=1"),
        ({"wave": wave(1, 2)}, "one size, found 3 and 2"),
        ({"wave": wave(0, 3)}, "position 0 came twice"),
    ],
)
def test_requests_of_a_wave_must_agree(server, mixed, second, match):
    answers = run(ask(server, mixed[:2], [sampling(wave=wave(0, 3)), sampling(**second)]))
    for answer in answers:
        with pytest.raises(ConfigError, match=match):
            raise answer


# What goes wrong


def test_a_failure_in_decoding_reaches_every_request_of_the_batch(server, mixed, monkeypatch):
    def broken(*args, **kwargs):
        raise IndexError("no such row")

    with monkeypatch.context() as patch:
        patch.setattr(rollout_server, "generate", broken)
        answers = ask_wave(server, mixed)
    assert all(isinstance(answer, RuntimeError) for answer in answers)
    assert {str(a) for a in answers} == {
        f"latent_hf: decoding a batch of {n} failed: IndexError: no such row" for n in (2, 4)
    }
    assert not any(isinstance(answer, Exception) for answer in ask_wave(server, mixed[:1], max_tokens=1))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"repetition_penalty": 1.1}, "no repetition_penalty, found 1.1; leave it at 1.0"),
        ({"stop": ["x"]}, "no stop, found"),
        ({"seed": 3}, "no seed, found 3"),
        ({"temperature": -1}, "temperature: expected 0"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k: expected a whole number"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"latent": None}, "future_l1_latent"),
        ({"latent": {"policy": VMF, "polcy": 1}}, "latent: unknown key 'polcy'"),
        ({"latent": {"policy": {"mean_cosine": 0.9}}}, "latent.policy: expected"),
        ({"latent": {"policy": {"name": "vmf"}}}, "exactly one of kappa"),
        ({"latent": {"policy": VMF, "tempering": "root"}}, "tempering"),
        ({"latent": {"policy": VMF, "wave": {"id": 1, "size": 2}}}, "wave: missing key 'position'"),
        ({"latent": {"policy": VMF, "wave": wave(2, 2)}}, "position: expected less than size 2"),
    ],
    ids=str,
)
def test_wrong_sampling_parameters(server, mixed, change, match):
    params = {**sampling(), **change}
    with pytest.raises(ConfigError, match=match):
        run(server.generate([1, 2], params, "r"))


def test_wrong_inputs(server, mixed):
    ids, inputs = mixed[3]

    def send(ids, inputs, **more):
        return run(server.generate(ids, sampling(), "r 1", mm_inputs=inputs, **more))

    with pytest.raises(ConfigError, match=r"r 1: the prompt has \d+ placeholders for pixel_values_videos, .* bring 0"):
        send(ids, None, video_data=["clip"])
    with pytest.raises(ConfigError, match="r 1: input_ids of mm_inputs differs"):
        send(ids[1:], inputs)
    with pytest.raises(ConfigError, match="r 1: mm_inputs has second_per_grid"):
        send(ids, inputs | {"second_per_grid": torch.ones(1)})
    with pytest.raises(ConfigError, match="r 1: latent_hf does not take audio_data"):
        send(ids, inputs, audio_data=["beep"])
    with pytest.raises(ConfigError, match="at least one token"):
        send([], None)


def test_sleep_and_abort_fail_what_waits(server, mixed):
    async def during(control):
        params = [sampling(wave=wave(i, 5)) for i in range(2)] + [sampling(wave=wave(0, 2, "other"))]
        asking = asyncio.create_task(ask(server, mixed[:3], params))
        await asyncio.sleep(0.01)
        result = await control()
        return result, await asking

    _, answers = run(during(server.sleep))
    assert [str(answer) for answer in answers] == [
        f"request request {i}: the server was put to sleep before it was decoded" for i in range(3)
    ]
    result, answers = run(during(server.abort_all_requests))
    assert result == {"aborted_count": 3, "request_ids": ["request 0", "request 1", "request 2"]}
    assert all("generation was aborted" in str(answer) for answer in answers)

    async def while_stopped():
        ids, _ = mixed[0]
        held = asyncio.create_task(server.generate(ids, sampling(max_tokens=1), "held"))
        await asyncio.sleep(0.05)
        assert not held.done()
        await server.abort_all_requests(reject_request=True)
        with pytest.raises(RuntimeError, match="late: rejected"):
            await server.generate(ids, sampling(), "late")
        await server.resume_generation()
        return await held

    assert len(run(while_stopped()).token_ids) == 1


def test_what_is_being_decoded_ends_before_sleep(server, mixed):
    async def during():
        asking = asyncio.create_task(ask(server, mixed, [sampling(wave=wave(i, 6)) for i in range(6)]))
        while not server._running:
            await asyncio.sleep(0.001)
        running = {request.id for request in server._running}
        await server.sleep()
        await server.wait_for_requests_to_drain()
        return running, await asking

    running, answers = run(during())
    for i, answer in enumerate(answers):
        assert isinstance(answer, RuntimeError) != (f"request {i}" in running)
    assert len(running) == 4


# Weights


def test_new_weights_change_what_is_said(path, tiny_path, mixed):
    server = make_server(path)
    state = {name: weight.clone() for name, weight in server._model.state_dict().items()}
    before = ask_wave(server, mixed)

    async def update(*buckets, steps=None):
        for bucket in buckets:
            await server.load_weights(bucket)
        await server.finish_weights(steps)

    moved = {name: weight + 0.02 * torch.randn_like(weight) for name, weight in state.items()}
    first, *others = moved
    run(update({first: moved[first]}, {name: moved[name].double() for name in others}, steps=4))
    after = ask_wave(server, mixed)
    assert not any(same(a, b) for a, b in zip(before, after, strict=True))
    assert [answer.extra_fields["global_steps"] for answer in after] == [4] * len(mixed)

    with pytest.raises(ConfigError, match=rf"update brought no {first}\."):
        run(update({name: state[name] for name in others}))
    with pytest.raises(RuntimeError, match="half updated"):
        run(server.generate(mixed[0][0], sampling(), "r"))
    with pytest.raises(ConfigError, match=r"model has no base_model.x, y, z and 1 more.*lora.merge"):
        run(update(dict.fromkeys(["base_model.x", "y", "z", "q"], torch.ones(1)) | state))
    with pytest.raises(ConfigError, match=r"expected the shape \(.*\), found \(1,\)"):
        run(update(state | {first: torch.ones(1)}))
    run(update(state, steps=5))
    again = ask_wave(server, mixed)
    assert all(same(a, b) for a, b in zip(before, again, strict=True))

    async def during():
        waiting = asyncio.create_task(server.generate(mixed[0][0], sampling(wave=wave(0, 2)), "r"))
        await asyncio.sleep(0.01)
        try:
            await server.load_weights(state)
        finally:
            await server.sleep()
            await asyncio.gather(waiting, return_exceptions=True)

    with pytest.raises(RuntimeError, match="1 requests wait"):
        run(during())


def test_of_tied_weights_one_is_enough(tiny_path):
    server = make_server(tiny_path)
    state = dict(server._model.state_dict())
    assert state.pop("lm_head.weight").data_ptr() == state["model.language_model.embed_tokens.weight"].data_ptr()

    async def update():
        await server.load_weights(state)
        await server.finish_weights(1)

    run(update())


def test_a_latent_head_is_among_the_weights(tiny_path, tmp_path, mixed):
    model, processor = load(tiny_path)
    latent = LatentConfig.from_hf(model.config)
    latent.use_projection_head, latent.projection_head_type, latent.force_initial_latent_mode = True, "lvr", True
    latent.to_hf(model.config)
    attach_head(model, latent)
    save(model, processor, tmp_path / "checkpoint")
    server = make_server(tmp_path / "checkpoint")
    state = {name: weight.clone() for name, weight in server._model.state_dict().items()}
    head = [name for name in state if "projection_head" in name]

    def first_latent(changed):
        async def update():
            await server.load_weights(state | changed)
            await server.finish_weights(1)

        run(update())
        (answer,) = ask_wave(server, mixed[:1], policy=DETERMINISTIC, temperature=0)
        return answer.extra_fields["latents"][0]

    before, after = first_latent({}), first_latent({name: 2 * state[name] for name in head})
    assert len(head) >= 2 and not torch.allclose(before, after, atol=1e-3)

    async def without_head():
        await server.load_weights({name: state[name] for name in state if name not in head})
        await server.finish_weights(1)

    with pytest.raises(ConfigError, match="brought no projection_head"):
        run(without_head())


@pytest.mark.parametrize(
    "key, value", [("tensor_model_parallel_size", 2), ("data_parallel_size", 2), ("ignore_eos", True)]
)
def test_what_the_backend_does_not_have(key, value):
    settings = {"name": "latent_hf", "tensor_model_parallel_size": 1, key: value}
    replica = LatentHFReplica(0, RolloutConfig(**settings), OmegaConf.create({"path": "x"}))
    with pytest.raises(ConfigError, match=f"{key}: latent_hf has none: expected .*, found {value}"):
        run(replica.launch_servers())


# In Ray


@pytest.fixture(scope="module")
def cluster():
    import ray

    from future_l1_plugin.integrations.verl import plugin  # noqa: F401 (on a machine without a GPU: the CPU platform)

    # Ray runs its workers at niceness 15: beside other work on two cores they would hardly run at all.
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config={"worker_niceness": 0})
    yield ray
    ray.shutdown()


def test_replica_and_adapter(cluster, path, server, mixed, monkeypatch):
    config = RolloutConfig(
        name="latent_hf",
        tensor_model_parallel_size=1,
        dtype="float32",
        response_length=STEPS,
        max_num_seqs=4,
        custom={"threads": 1, "wave_timeout_s": 30},
        checkpoint_engine=CheckpointEngineConfig(update_weights_bucket_megabytes=1),
    )

    @cluster.remote
    class Worker:
        pass

    replica = LatentHFReplica(1, config, OmegaConf.create({"path": str(path), "override_config": {}}))
    replica.workers = [Worker.remote()]
    run(replica.launch_servers())
    handle = replica.server_handle
    assert replica.server_address == "latent_hf_server_1"

    def ask_replica():
        async def go():
            return await asyncio.gather(
                *(
                    handle.generate.remote(
                        request_id=f"r {i}",
                        prompt_ids=ids,
                        sampling_params=sampling(wave=wave(i, len(mixed))),
                        mm_inputs=m,
                    )
                    for i, (ids, m) in enumerate(mixed)
                )
            )

        return run(go())

    first = ask_replica()
    assert all(same(a, b) for a, b in zip(first, ask_wave(server, mixed), strict=True))

    monkeypatch.setenv("RANK", "1")
    adapter = LatentHFAdapter(config=config, model_config=None, device_mesh=None)
    state = dict(server._model.state_dict())
    drained = []

    def weights(leave_out=(), rename=None):
        for name, weight in state.items():
            drained.append(name)
            if name not in leave_out:
                yield (rename or name), (weight * 1.1).bfloat16()

    run(adapter.release())
    run(adapter.update_weights(weights(), global_steps=2, peft_config=None, base_sync_done=True))
    run(adapter.resume(["kv_cache"]))
    second = ask_replica()
    assert not any(same(a, b) for a, b in zip(first, second, strict=True))
    assert second[0].extra_fields["global_steps"] == 2

    with pytest.raises(ConfigError, match=r"update brought no lm_head.weight\."):
        run(adapter.update_weights(weights(leave_out=["lm_head.weight"])))
    drained.clear()
    with pytest.raises(ConfigError, match="model has no nonsense"):
        run(adapter.update_weights(weights(rename="nonsense")))
    assert drained == list(state)
    for wrong in ({"peft_config": object()}, {"wire_format": "delta_flush"}):
        with pytest.raises(ConfigError, match="Set actor_rollout_ref"):
            run(adapter.update_weights(weights(), **wrong))
