"""Pixels on their way from the encoder to engine and actor: once a prompt, half the bytes, nothing left behind."""

import asyncio
import gc
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl")

import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack, TensorDict

from future_l1_plugin.data.prompt import EncodedPrompt
from future_l1_plugin.errors import DataError
from future_l1_plugin.integrations.verl import pixels
from future_l1_plugin.integrations.verl.agent_loop import LatentAgentLoop, LatentAgentLoopWorker


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def keeper():
    found = pixels.keeper()
    yield found
    ray.get(found.clear.remote())


def encoded(seed=0, rows=8):
    values = torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))
    grid = torch.tensor([[1, 2, rows // 2]])
    ids = torch.tensor([[1, 2, 3]])
    tokens = {"input_ids": ids, "attention_mask": ids.sign(), "mm_token_type_ids": torch.tensor([[0, 2, 2]])}
    return EncodedPrompt({**tokens, "pixel_values_videos": values, "video_grid_thw": grid})


def batch(*rows):
    rows = NonTensorStack(*(NonTensorData(row) for row in rows))
    return TensorDict({"input_ids": torch.zeros(len(rows), 3), "multi_modal_inputs": rows}, batch_size=len(rows))


def test_siblings_get_their_pixels_back_from_one_object(keeper):
    shared = [pixels.share(uid, encoded(i), torch.float32, False, True) for i, uid in enumerate(("p", "q"))]
    assert set(shared[0].inputs) == {"video_grid_thw", "mm_token_type_ids", pixels.PROMPT}
    text = {}
    rows = [shared[0].inputs, shared[1].inputs, shared[0].inputs, text]
    sent = batch(*rows)
    found = [getattr(row, "data", row) for row in list(pixels.restored(sent)["multi_modal_inputs"])]
    for row, seed in zip(found[:3], (0, 1, 0), strict=True):
        assert torch.equal(row["pixel_values_videos"], encoded(seed).inputs["pixel_values_videos"])
        assert torch.equal(row["video_grid_thw"], torch.tensor([[1, 2, 4]]))
        assert pixels.PROMPT not in row
    assert found[3] == {}
    assert found[0]["pixel_values_videos"].data_ptr() == found[2]["pixel_values_videos"].data_ptr(), "a copy"
    kept = [getattr(row, "data", row) for row in list(sent["multi_modal_inputs"])]
    assert all("pixel_values_videos" not in row for row in kept), "the batch itself stays small"


def test_rows_that_bring_their_own_pixels_stay_as_they_are():
    sent = batch(encoded().inputs)
    assert pixels.restored(sent) is sent


def test_what_is_dropped_is_gone_and_missed_by_name(keeper):
    inputs = [pixels.share(uid, encoded(), torch.float32, False, True).inputs for uid in ("p", "q")]
    ray.get(keeper.drop.remote(["p"]))
    with pytest.raises(DataError, match="prompt p: its pixels are gone, 1 of 2 prompts have none"):
        pixels.restored(batch(*inputs))
    assert ray.get(keeper.clear.remote()) == {"pixels/prompts": 1, "pixels/gib": (8 * 12 * 4 + 3 * 8) / 2**30}
    assert ray.get(keeper.clear.remote())["pixels/prompts"] == 0


def test_validation_leaves_nothing_with_the_keeper(keeper):
    shared = pixels.share("v", encoded(), torch.bfloat16, True, False)
    given, hashes = pixels.opened(ray.get(shared.pixels))
    assert given["pixel_values_videos"].dtype == torch.bfloat16
    assert torch.equal(given["pixel_values_videos"], encoded().inputs["pixel_values_videos"].bfloat16())
    assert [len(name) for name in hashes["video"]] == [64]
    assert ray.get(keeper.get.remote(["v"])) == [None]


@pytest.mark.parametrize(
    ("rollout", "actor", "ref", "expected"),
    [
        ("bfloat16", None, None, torch.bfloat16),  # the full recipe: verl's own default is bf16
        ("bfloat16", {"param_dtype": "bf16"}, {"param_dtype": "bf16"}, torch.bfloat16),
        ("float32", {"param_dtype": "fp32"}, {"param_dtype": "fp32"}, torch.float32),  # the micro recipe
        ("bfloat16", {"param_dtype": "fp32"}, None, torch.float32),
        ("bfloat16", None, {"param_dtype": "fp32"}, torch.float32),
        ("float16", None, None, torch.float32),
    ],
)
def test_pixels_are_bf16_where_every_model_is(rollout, actor, ref, expected):
    engines = {name: {"fsdp_config": {"mixed_precision": value}} for name, value in (("actor", actor), ("ref", ref))}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"dtype": rollout}, **engines}})
    assert pixels.pixel_dtype(config) == expected


def test_bf16_pixels_give_a_bf16_model_what_float32_ones_give(tiny_path):
    """Bit for bit: the first thing that the vision tower does with pixels is to cast them."""
    from future_l1_plugin.model import load

    model, processor = load(tiny_path, dtype=torch.bfloat16)
    frames = torch.randint(0, 255, (4, 64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = processor.video_processor(videos=[frames.permute(0, 3, 1, 2)], return_tensors="pt", do_sample_frames=False)
    values = given["pixel_values_videos"]
    with torch.no_grad():
        full = model.model.visual(values.to(model.dtype), grid_thw=given["video_grid_thw"])
        sent = model.model.get_video_features(values.bfloat16(), given["video_grid_thw"])
        direct = model.model.get_video_features(values, given["video_grid_thw"])
    for a, b in zip(sent.pooler_output, direct.pooler_output, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.cat(list(sent.pooler_output)), full.pooler_output)


class Dataset:
    @classmethod
    def encode(cls, row, processor):
        cls.calls += 1
        return encoded()


def test_an_agent_loop_keeps_nothing_of_a_group_that_has_ended(keeper, monkeypatch):
    """50 steps of 4 prompts with 3 sessions, through verl's own `_run_prompt`: one encoding a prompt, nothing left, as
    much as after 5. A fourth of the groups fails."""
    rollout = {"dtype": "float32", "name": "latent_hf", "n": 3}
    engines = {"actor": {"fsdp_config": {}}, "ref": {"fsdp_config": {}}}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout, **engines}})
    Dataset.calls, tags = 0, {}

    async def put_tag(key, partition_id, tag):
        tags.setdefault(key, {}).update(tag)

    async def session(self, sampling_params, trajectory, **kwargs):
        loop = LatentAgentLoop.__new__(LatentAgentLoop)
        loop.dataset_cls, loop.processor, loop.config = Dataset, None, config
        loop.rollout_config = SimpleNamespace(name="latent_hf")
        # In no variable: pytest's log keeps the frames of what fails below.
        assert (await loop._encode(kwargs, keep=True)).inputs[pixels.PROMPT] == kwargs["uid"]
        if kwargs["uid"].endswith("x3"):
            raise ValueError("this one fails")

    monkeypatch.setattr(tq, "async_kv_put", put_tag)
    monkeypatch.setattr(LatentAgentLoopWorker, "_run_agent_loop", session)
    worker = LatentAgentLoopWorker.__new__(LatentAgentLoopWorker)
    worker.config = config

    def held():
        gc.collect()
        return sum(isinstance(thing, EncodedPrompt | pixels.SharedPrompt) for thing in gc.get_objects())

    async def run():
        counts = []
        for step in range(50):
            prompts = [{"uid": f"{step}x{i}"} for i in range(4)]
            await asyncio.gather(*(worker._run_prompt(prompt, {}, {"validate": False}) for prompt in prompts))
            dropped = await keeper.clear.remote()
            assert dropped["pixels/prompts"] == 4
            if step in (4, 49):
                counts.append((len(LatentAgentLoop._encoded), held()))
        return counts

    assert asyncio.run(run()) == [(0, 0), (0, 0)]
    assert Dataset.calls == 200
    assert [tags[f"7x{i}"]["status"] for i in range(4)] == ["finished"] * 3 + ["failure"]
