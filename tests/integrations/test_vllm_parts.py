"""The parts of latent decoding in vLLM that need no vLLM."""

import hashlib
import json

import msgspec
import pytest
import torch
from scipy import stats

from future_l1_plugin.errors import CheckpointError, ConfigError
from future_l1_plugin.integrations.vllm import engine_args, overrides, read_config
from future_l1_plugin.integrations.vllm.__main__ import command
from future_l1_plugin.integrations.vllm.allocator import check_allocator
from future_l1_plugin.integrations.vllm.media import media_hashes
from future_l1_plugin.integrations.vllm.noise import draw, uniforms
from future_l1_plugin.integrations.vllm.params import LatentParams
from future_l1_plugin.integrations.vllm.results import Latents, forced_ids, pack, unpack
from future_l1_plugin.integrations.vllm.spans import SpanTable
from future_l1_plugin.latent import LatentTokens, SpanMachine, build_policy
from future_l1_plugin.latent.spans import SpanBudget

TOKENS = LatentTokens(latent=7, start=8, end=9)
LONG = torch.long


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_uniforms_are_uniform_and_independent():
    position = torch.arange(200)
    numbers = uniforms(torch.full_like(position, 3), position, 500)
    assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    # Along a row, along a column, and between the same places of two seeds: correlations of pure chance.
    other = uniforms(torch.full_like(position, 4), position, 500)
    for a, b in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1]), (numbers, other)):
        assert abs(stats.pearsonr(a.flatten().numpy(), b.flatten().numpy())[0]) < 4 / a.numel() ** 0.5


def test_noise_depends_on_seed_and_position_alone():
    policy, mu = build_policy("gaussian", sigma=0.5), torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    seed, position = torch.tensor([5, -(2**63), 2**63 - 1]), torch.tensor([0, 1, 40_000])
    together = draw(policy, mu, seed, position)
    for i in range(3):
        assert torch.equal(draw(policy, mu[i : i + 1], seed[i : i + 1], position[i : i + 1])[0], together[i])
    moved = draw(policy, mu, seed, position + 1)
    assert not torch.isclose(moved, together).any()


@pytest.mark.parametrize("hidden", [9, 64])
def test_draws_follow_the_policy(hidden):
    """Against the law that the policy's own sampler has: mean cosine of vmf, moments and normality of gaussian."""
    n = 4000
    mu = torch.randn(1, hidden, generator=torch.Generator().manual_seed(1)).expand(n, -1) * 3
    seed, position = torch.arange(n) // 100, torch.arange(n) % 100
    vmf = build_policy("vmf", mean_cosine=0.8)
    cosine = torch.cosine_similarity(draw(vmf, mu, seed, position), mu).numpy()
    sampled = torch.cosine_similarity(vmf.sample(mu, torch.Generator().manual_seed(2)), mu).numpy()
    assert stats.ks_2samp(cosine, sampled).pvalue > 1e-3
    noise = (draw(build_policy("gaussian", sigma=0.3), mu, seed, position) - mu) / 0.3
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert (noise.T @ noise / n - torch.eye(hidden)).abs().max() < 0.12
    assert draw(build_policy("deterministic"), mu, seed, position) is mu


@pytest.mark.parametrize("policy", [{"name": "vmf", "mean_cosine": 0.8}, {"name": "gaussian", "sigma": 0.3}])
def test_draws_are_of_the_model_s_dtype(policy):
    """They are fed as they are sent: what is drawn in float32 is rounded once, before both."""
    mu, at = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    for dtype in (torch.bfloat16, torch.float32):
        z = draw(build_policy(**policy), mu.to(dtype), at, at)
        assert z.dtype == dtype
    rounded = draw(build_policy(**policy), mu.bfloat16().float(), at, at).bfloat16()
    assert torch.equal(draw(build_policy(**policy), mu.bfloat16(), at, at), rounded)


# ---- grammar --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force_start", [False, True])
def test_the_table_does_what_one_machine_a_request_does(force_start):
    """Requests of random budgets, in random batches, with steps that do not count, and preempted at random."""
    random = torch.Generator().manual_seed(0)

    def choose(high, size=()):
        return torch.randint(high, size, generator=random)

    requests, rows = 40, 6
    budgets = [SpanBudget(int(choose(4)), exact=bool(choose(2))) for _ in range(requests)]
    machines = [SpanMachine(TOKENS, budget, 1, force_start=force_start) for budget in budgets]
    said: list[list[int]] = [[] for _ in budgets]
    forced: list[list[bool]] = [[] for _ in budgets]
    table, free, seated = SpanTable(TOKENS, rows, "cpu", force_start), list(range(rows)), {}
    for _ in range(1200):
        while free and len(seated) < rows:
            request = int(choose(requests))
            if request not in seated:
                seated[request] = free.pop()
                table.begin(seated[request], budgets[request], said[request])
        batch = [request for request in seated if choose(2)]
        if not batch:
            continue
        at = torch.tensor([seated[request] for request in batch])
        logits = table.forbid(at, torch.zeros(len(batch), 10))
        live = choose(4, (len(batch),)) > 0
        proposal = torch.where(choose(2, (len(batch),)) > 0, 6 + choose(4, (len(batch),)), choose(10, (len(batch),)))
        proposal = torch.where(logits.gather(1, proposal[:, None])[:, 0].isinf(), 1, proposal)
        step = table.step(at, proposal, live)
        for i, request in enumerate(batch):
            if live[i]:
                expected = machines[request].step(proposal[i : i + 1])
                assert [int(part[i]) for part in step] == [int(part) for part in expected]
                assert bool(logits[i, TOKENS.end].isinf()) == (not said[request] or not inside(said[request]))
                said[request].append(int(step.ids[i]))
                forced[request].append(bool(step.forced[i]))
        for request in [r for r in seated if not choose(20)]:
            free.append(seated.pop(request))
    assert sum(map(len, said)) > 1000
    for response, budget, flags in zip(said, budgets, forced, strict=True):
        assert forced_ids(response, TOKENS, budget.limit, force_start).tolist() == flags


def inside(response):
    markers = [token for token in response if token in (TOKENS.start, TOKENS.end)]
    return bool(markers) and markers[-1] == TOKENS.start


# ---- parameters and results -----------------------------------------------------------------------------------------


def test_parameters_of_a_request():
    rule = SpanBudget(8)
    assert LatentParams.parse(None).budget(rule) == rule
    params = LatentParams.parse({"latent_policy": "vmf", "latent_kappa": 50.0, "latent_limit": 3, "latent_exact": 1})
    assert params.budget(rule) == SpanBudget(3, exact=True) and params.build_policy().kappa(16) == 50.0
    other = LatentParams.parse({"latent_policy": "laplace", "latent_scale": 0.5})  # of another package
    assert other.build_policy().scale == 0.5 and other.policy == (("name", "laplace"), ("scale", 0.5))
    assert LatentParams.parse({"somebody_elses": 1}) == LatentParams.parse({})


@pytest.mark.parametrize(
    "given, match",
    [
        ({"latent_sigm": 1.0}, "unknown key 'latent_sigm'"),
        ({"latent_policy": "vmf"}, "exactly one of kappa"),
        (
            {"latent_sigma": 1.0},
            "unknown key 'latent_sigma'; valid keys with policy deterministic: ",
        ),
        ({"latent_policy": "laplace", "latent_sigma": 1.0}, "valid keys with policy laplace: .*, latent_scale"),
        ({"latent_policy": ["vmf"]}, r"expected one of .*, found \['vmf'\]"),
        ({"latent_limit": -1}, "latent_limit: expected a whole number"),
        ({"latent_limit": 2.5}, "latent_limit"),
        ({"latent_seed": "x"}, "latent_seed"),
        ({"latent_exact": 2}, "latent_exact"),
        ({"latent_return": "all"}, "expected one of none, latents, means"),
        ({"latent_form": "json"}, "latent_form: expected one of text, bytes"),
    ],
)
def test_wrong_parameters(given, match):
    with pytest.raises(ConfigError, match=match):
        LatentParams.parse(given)


def through_json(value):
    return json.loads(json.dumps(value))


def through_msgpack(value):
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value))


@pytest.mark.parametrize(("form", "there_and_back"), [("text", through_json), ("bytes", through_msgpack)])
def test_results_survive_the_way_through_http_and_between_processes(form, there_and_back):
    latents = torch.randn(3, 4).bfloat16()
    sent = Latents(latents, torch.tensor([True, False]), means=torch.empty(0, 4))
    params = there_and_back(pack(sent, form))
    got = unpack(params)
    assert torch.equal(got.latents, latents) and got.latents.dtype == torch.bfloat16
    assert got.forced.tolist() == [True, False] and got.means.shape == (0, 4) and got.end_logprobs is None
    for none in (None, {"other": 1}):
        with pytest.raises(ConfigError, match="holds no latents"):
            unpack(none)


def shown(pixels):
    """Two images of 4 and 8 patches, and a video of 8."""
    video = {"pixel_values_videos": pixels[:8], "video_grid_thw": torch.tensor([[2, 2, 2]])}
    return {"pixel_values": pixels[:12], "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4]]), **video}


def test_names_of_pixels_are_those_of_their_bytes():
    pixels = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = media_hashes(shown(pixels))
    # bfloat16 by hand: the upper half of a float32.
    data = (pixels.float().numpy().view("uint32") >> 16).astype("uint16").tobytes()
    wanted = ((b"image [1, 2, 2]", data[:48]), (b"image [1, 2, 4]", data[48:]), (b"video [2, 2, 2]", data[:96]))
    wanted = [hashlib.sha256(what + b" torch.bfloat16" + of).hexdigest() for what, of in wanted]
    assert names == {"image": wanted[:2], "video": wanted[2:]}
    assert media_hashes(shown(pixels.clone())) == names and media_hashes({}) == {}
    apart = torch.cat([pixels, pixels], 1)[:, :6]  # the same values, with gaps between the rows
    assert not apart.is_contiguous() and media_hashes(shown(apart)) == names
    assert not set(media_hashes(shown(pixels.float()))["image"]) & set(names["image"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_grid_thw": torch.tensor([[1, 2, 2]])}, "image_grid_thw tells of 4 patches, pixel_values has 12"),
        ({"video_grid_thw": None}, "expected pixel_values_videos and video_grid_thw together"),
    ],
)
def test_pixels_and_grids_that_do_not_agree(change, match):
    inputs = {name: value for name, value in (shown(torch.zeros(12, 6)) | change).items() if value is not None}
    with pytest.raises(ConfigError, match=match):
        media_hashes(inputs)


def test_engine_args(tiny_path):
    assert engine_args(tiny_path, seed=1)["seed"] == 1
    with pytest.raises(ConfigError, match="scheduler_cls is set by latent decoding itself"):
        engine_args(tiny_path, scheduler_cls="mine")
    with pytest.raises(CheckpointError, match="nowhere: expected a checkpoint folder or a hub id"):
        engine_args("nowhere")


def test_expandable_segments_are_refused_before_vllm_does(tiny_path, monkeypatch):
    command([str(tiny_path)])
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    for start in (lambda: engine_args(tiny_path), lambda: command([str(tiny_path)])):
        with pytest.raises(ConfigError, match=r"Unset it \(unset PYTORCH_CUDA_ALLOC_CONF\), or set enable_sleep_mode"):
            start()
    assert engine_args(tiny_path, enable_sleep_mode=True)["enable_sleep_mode"]
    assert command([str(tiny_path), "--enable-sleep-mode"]).count("--enable-sleep-mode") == 1
    check_allocator(False, environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})
    with pytest.raises(ConfigError, match="set my_key=true"):
        check_allocator(False, "my_key", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


def test_what_only_a_released_class_tells_is_not_lost(tiny_path):
    """Our class takes the place of RICE_Qwen3VL, by whose name the first id of a response is forced."""
    config = read_config(str(tiny_path))
    assert not overrides(config)["force_initial_latent_mode"]
    del config.force_initial_latent_mode
    config.architectures = ["RICE_Qwen3VL"]
    assert overrides(config) == {"architectures": ["FutureL1_Qwen3VL"], "force_initial_latent_mode": True}


def test_the_command_that_serves(tiny_path):
    given = command([str(tiny_path), "--max-model-len", "512"])
    assert given[:3] == ["vllm", "serve", str(tiny_path)] and given[-2:] == ["--max-model-len", "512"]
    ours = dict(zip(given[3:-2:2], given[4:-2:2], strict=True))
    assert json.loads(ours["--hf-overrides"])["architectures"] == ["FutureL1_Qwen3VL"]
    assert ours["--scheduler-cls"] == engine_args(tiny_path)["scheduler_cls"]
