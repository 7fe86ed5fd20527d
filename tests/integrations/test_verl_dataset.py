"""Prompts in verl: found by its own loader, carried by its own transport, encoded in another process."""

import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from future_l1_plugin.data import frame_cache, make_world
from future_l1_plugin.data.prompt import RlPrompt, encode_prompt
from future_l1_plugin.data.rl import load_prompts
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.integrations.verl import dataset as module
from future_l1_plugin.integrations.verl.dataset import LatentRLDataset, PromptSettings, even_out, prompt_settings

pytest.importorskip("verl.trainer.ppo", reason="needs upstream verl")

KEYS = {
    "raw_prompt",
    "data_source",
    "reward_model",
    "extra_info",
    "index",
    "agent_name",
    "rl_prompt",
    "rl_limits",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=16, seed=0, progress=False)


@pytest.fixture(scope="module")
def processor(tiny_path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_path)


@pytest.fixture(autouse=True)
def empty_cache():
    module._frame_cache.cache_clear()


def data_config(world, section=None, **changes):
    """verl's own defaults of the section `data`, as a recipe would change them."""
    from importlib.resources import files

    defaults = OmegaConf.load(str(files("verl") / "trainer" / "config" / "data" / "legacy_data.yaml"))
    ours = {
        "tool_config_path": None,
        "max_prompt_length": 512,
        "custom_cls": {"path": "pkg://future_l1_plugin.integrations.verl.dataset", "name": "LatentRLDataset"},
        "future_l1": {"video_root": str(world.videos), "question_media": "video", **(section or {})},
    }
    return OmegaConf.merge(defaults, ours, changes)


def made(world, files=None, max_samples=-1, section=None, **changes):
    config = data_config(world, section, **changes)
    files = OmegaConf.create([str(world.sft), str(world.futurebench)]) if files is None else files
    return LatentRLDataset(data_files=files, tokenizer=None, processor=None, config=config, max_samples=max_samples)


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    """TwiFF, FutureBench and plain prompts: some with options, some without; with and without video."""
    folder = tmp_path_factory.mktemp("mixed")
    plain = folder / "plain.json"
    plain.write_text(json.dumps([{"id": f"p{i}", "question": f"{i} + 1?", "answer": i + 1} for i in range(3)]))
    return made(world, [str(world.sft), str(plain), str(world.futurebench)])


def test_verl_finds_the_class_and_makes_it(world, processor):
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils.dataset.rl_dataset import get_dataset_class

    config = data_config(world)
    assert get_dataset_class(config) is LatentRLDataset
    train = create_rl_dataset([str(world.sft)], config, processor.tokenizer, processor, is_train=True, max_samples=-1)
    val = create_rl_dataset(str(world.futurebench), config, processor.tokenizer, processor, is_train=False)
    assert [type(d) for d in (train, val)] == [LatentRLDataset] * 2
    assert (len(train), len(val)) == (16, 16)
    assert {train[i]["data_source"] for i in range(16)} == {"twiff"}
    assert {val[i]["data_source"] for i in range(16)} == {f"futurebench/hop{n}" for n in (1, 2, 3, 5)}


def test_a_row(world):
    row = made(world)[17]
    item = json.loads(world.futurebench.read_text())[1]
    assert set(row) == KEYS
    question = row["raw_prompt"][0]["content"][1]["text"]
    assert row["raw_prompt"] == [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]},
    ]
    assert question.startswith(item["qa"]["Question"] + "\nA. ")
    assert row["data_source"] == "futurebench/" + item["question_type"]
    assert row["reward_model"] == {"style": "rule", "ground_truth": item["qa"]["Answer"]}
    assert row["extra_info"] == {"index": 17, "id": item["id"]}
    assert row["index"] == 17
    assert row["rl_limits"] == {"max_prompt_length": 512, "frame_cache_mb": 256}
    assert RlPrompt.from_dict(row["rl_prompt"]).id == item["id"]
    assert json.loads(json.dumps(row)) == row  # nothing but JSON values


def test_the_agent_loop_is_the_one_that_is_registered():
    from future_l1_plugin.integrations.verl.names import AGENT_LOOP

    assert module.AGENT_NAME == AGENT_LOOP


def test_negative_and_far_indices(world):
    rows = made(world)
    assert rows[-1] == rows[31]
    with pytest.raises(IndexError):
        rows[32]


# ---- verl's transport -----------------------------------------------------------------------------------------------


def batch_of(dataset, **loader):
    """A batch as verl's trainer makes it: loader, collate_fn, uids, TensorDict."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.rl_dataset import collate_fn

    rows = next(iter(StatefulDataLoader(dataset, batch_size=len(dataset), collate_fn=collate_fn, **loader)))
    rows["uid"] = np.array([str(i) for i in range(len(dataset))], dtype=object)
    return tu.get_tensordict(rows)


def rows_of(batch):
    """Rows of a TensorDict as verl's agent loop worker takes them apart."""
    from tensordict.tensorclass import NonTensorData, NonTensorStack

    out = []
    for i in range(len(batch)):
        row = {}
        for key, value in batch.items():
            assert isinstance(value, NonTensorStack | NonTensorData), key
            row[key] = value[i].data if isinstance(value, NonTensorStack) else value.data
        assert row.pop("uid") == str(row["index"])
        out.append(row)
    return out


def test_rows_survive_collating_and_chunking(mixed):
    from verl.utils import tensordict_utils as tu

    expected = [mixed[i] for i in range(len(mixed))]
    batch = batch_of(mixed)
    assert batch.batch_size == (35,)
    assert rows_of(batch) == expected
    chunks = batch.chunk(4)  # what the agent loop manager does
    assert [row for chunk in chunks for row in rows_of(chunk)] == expected
    assert [row for chunk in tu.chunk_tensordict(batch, 5) for row in rows_of(chunk)] == expected
    single = batch.chunk(35)  # gen_batch_size 1, joined again: DAPO's refill
    assert rows_of(tu.concat_tensordict(list(single))) == expected
    assert rows_of(pickle.loads(pickle.dumps(batch))) == expected  # Ray
    assert rows_of(tu.index_select_tensor_dict(batch, [34, 0, 18])) == [expected[i] for i in (34, 0, 18)]


def through_transfer_queue(batch):
    """Put and get of TransferQueue's default storage without its processes: select, send, store, send back, pack."""
    from tensordict import TensorDict
    from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager as Manager
    from transfer_queue.storage.simple_storage import StorageUnitData
    from transfer_queue.utils.zmq_utils import ZMQMessage, ZMQRequestType

    def sent(data):
        message = ZMQMessage.create(ZMQRequestType.PUT_DATA, "here", {"data": data}, "there")
        return ZMQMessage.deserialize([bytearray(frame) for frame in message.serialize()]).body["data"]

    unit, keys, names = StorageUnitData(), list(range(len(batch))), list(batch.keys())
    for half in (keys[::2], keys[1::2]):  # as if there were two units
        unit.put_data(sent({name: Manager._select_by_positions(batch[name], half) for name in names}), half)
    back = sent(unit.get_data(names, keys))
    return TensorDict({name: Manager._pack_field_values(values) for name, values in back.items()}, [len(batch)])


def test_rows_survive_transfer_queue(mixed):
    """As fields of prompts, and as fields of finished trajectories."""
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    expected = [mixed[i] for i in range(len(mixed))]
    assert rows_of(through_transfer_queue(batch_of(mixed))) == expected
    rows = [{**row, "responses": torch.arange(i + 1)} for i, row in enumerate(expected)]
    back = through_transfer_queue(list_of_dict_to_tensordict(rows))
    assert [len(ids) for ids in back["responses"].unbind()] == list(range(1, 36))
    for key in KEYS:
        assert list(back[key]) == [row[key] for row in expected], key


def test_loader_workers_give_the_same_rows(mixed):
    assert rows_of(batch_of(mixed, num_workers=2)) == [mixed[i] for i in range(len(mixed))]


def test_a_loader_goes_on_where_it_stopped(world):
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo.utils import create_rl_sampler
    from verl.utils.dataset.rl_dataset import collate_fn

    def loader():
        dataset = made(world, shuffle=True, seed=3)
        sampler = create_rl_sampler(data_config(world, shuffle=True, seed=3), dataset)
        return StatefulDataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=collate_fn)

    whole = [list(batch["index"]) for batch in loader()]
    order = [int(index) for batch in whole for index in batch]
    assert sorted(order) == list(range(32)) != order
    first = loader()
    stream = iter(first)
    begun = [list(next(stream)["index"]) for _ in range(3)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = loader()
    second.load_state_dict(state)
    second.dataset.resume_dataset_state()
    assert begun + [list(batch["index"]) for batch in second] == whole


def test_a_pickled_dataset_is_whole(mixed):
    copy = pickle.loads(pickle.dumps(mixed))
    assert [copy[i] for i in range(len(copy))] == [mixed[i] for i in range(len(mixed))]


# ---- encoding -------------------------------------------------------------------------------------------------------


def test_encode_gives_what_the_prompt_gives(world, mixed, processor):
    for row in rows_of(batch_of(mixed))[::5]:
        encoded = LatentRLDataset.encode(row, processor)
        expected = encode_prompt(RlPrompt.from_dict(row["rl_prompt"]), processor)
        assert encoded.prompt_ids == expected.prompt_ids
        assert set(encoded.inputs) == set(expected.inputs)
        assert all(torch.equal(encoded.inputs[name], expected.inputs[name]) for name in expected.inputs)


def test_rollouts_of_a_prompt_decode_its_clip_once(mixed, processor, monkeypatch):
    calls, read = [], frame_cache.read_frames
    monkeypatch.setattr(frame_cache, "read_frames", lambda *args, **how: calls.append(args) or read(*args, **how))
    barrier = threading.Barrier(8)

    def rollout(_):
        barrier.wait()
        return LatentRLDataset.encode(mixed[0], processor).inputs["pixel_values_videos"]

    with ThreadPoolExecutor(8) as pool:
        pixels = list(pool.map(rollout, range(8)))
    assert len(calls) == 1
    assert all(torch.equal(pixels[0], other) for other in pixels)


def test_without_a_cache_every_call_decodes(world, processor, monkeypatch):
    from future_l1_plugin.data import prompt

    calls, read = [], prompt.read_frames
    monkeypatch.setattr(prompt, "read_frames", lambda *args, **kwargs: calls.append(args) or read(*args, **kwargs))
    rows = made(world, section={"frame_cache_mb": 0})
    for _ in range(2):
        LatentRLDataset.encode(rows[0], processor)
    assert len(calls) == 2


def test_a_prompt_that_is_too_long_is_named(world, processor):
    exact = len(LatentRLDataset.encode(made(world)[0], processor).prompt_ids)
    LatentRLDataset.encode(made(world, max_prompt_length=exact)[0], processor)
    row = made(world, max_prompt_length=exact - 1)[0]
    message = rf"prompt micro-train-00000: {exact} tokens, data.max_prompt_length is {exact - 1}\. Raise it "
    with pytest.raises(DataError, match=message):
        LatentRLDataset.encode(row, processor)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_settings_of_all_kinds(world):
    assert prompt_settings({}) == PromptSettings()
    section = {"video_root": {"a/b.json": "videos"}, "num_frames": "${data.n}", "on_bad": "skip", "frame_cache_mb": 1}
    config = OmegaConf.create({"data": {"n": 8, "future_l1": section}})
    expected = PromptSettings({"a/b.json": "videos"}, "images", 8, "skip", 1)
    assert prompt_settings(config.data) == expected
    assert prompt_settings({"future_l1": {**section, "num_frames": 8}}) == expected  # a plain dict


def test_one_root_for_each_file(world, tmp_path):
    roots = {str(world.sft): str(world.videos), str(world.futurebench): str(world.videos)}
    rows = made(world, section={"video_root": None}, future_l1={"video_root": roots})
    assert len(rows) == 32
    with pytest.raises(ConfigError, match=r"video_root: .*futurebench.json is not in it"):
        made(
            world,
            section={"video_root": None},
            future_l1={"video_root": {str(world.sft): "x"}},
            files=str(world.futurebench),
        )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"frames": 8}, r"data.future_l1: unknown key `frames`\..* Valid keys: video_root, "),
        ({"num_frame": 8}, r"unknown key `num_frame`\. Did you mean `num_frames`\?"),
        ({"num_frames": "many"}, r"data.future_l1: `num_frames`: .*many"),
        ({"num_frames": 0}, r"data.future_l1: num_frames: expected at least 1, found 0"),
        ({"question_media": "gif"}, r"data.future_l1: question_media: expected images or video, found 'gif'"),
        ({"on_bad": "warn"}, r"data.future_l1: on_bad: expected raise or skip, found 'warn'"),
        ({"frame_cache_mb": -1}, r"data.future_l1: frame_cache_mb: expected 0 \(keep nothing\) or more, found -1"),
        ({"video_root": 3}, r"data.future_l1: video_root: expected a folder, or a mapping .*, found 3"),
        ({"video_root": {"a.json": 3}}, r"data.future_l1: video_root.a.json: expected a folder, found 3"),
    ],
)
def test_bad_settings(section, message):
    with pytest.raises(ConfigError, match=message):
        prompt_settings(OmegaConf.create({"future_l1": section}))
    with pytest.raises(ConfigError, match="expected a section"):
        prompt_settings({"future_l1": "videos"})


@pytest.mark.parametrize(
    "changes",
    [
        {"filter_overlong_prompts": True},
        {"truncation": "left"},
        {"apply_chat_template_kwargs": {"enable_thinking": False}},
        {"mm_processor_kwargs": {"fps": 2}},
    ],
)
def test_settings_of_verls_dataset_that_would_be_ignored_are_refused(world, changes):
    (key,) = changes
    with pytest.raises(
        ConfigError, match=rf"data.{key}: .* would have no effect: LatentRLDataset reads .* Remove the key"
    ):
        made(world, **changes)


def test_no_files(world):
    for nothing in (None, []):
        with pytest.raises(ConfigError, match="expected a file or a list of files, found nothing"):
            LatentRLDataset(nothing, None, data_config(world))


def test_max_samples(world):
    everything = [p.id for p in made(world).prompts]
    assert [p.id for p in made(world, max_samples=5, shuffle=False).prompts] == everything[:5]
    assert len(made(world, max_samples=100)) == 32
    drawn = [[p.id for p in made(world, max_samples=5, shuffle=True, seed=s).prompts] for s in (1, 1, 2, None, None)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == drawn[4]  # a resumed run draws the same
    assert all(len(set(ids)) == 5 and set(ids) <= set(everything) for ids in drawn)


def test_what_is_left_out_is_counted_and_named(world, tmp_path, caplog):
    rows = json.loads(world.sft.read_text())
    rows[3]["video"] = "train/gone.mp4"
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="1 of 16 prompts are bad"):
        made(world, [str(file)])
    kept = made(world, [str(file)], section={"on_bad": "skip"})
    assert len(kept) == 15
    assert "left out 1 of 16 prompts" in caplog.text
    assert "micro-train-00003): " in caplog.text
    assert [p.id for p in kept.prompts] == [
        p.id for p in load_prompts(world.sft, world.videos) if p.id != "micro-train-00003"
    ]


def test_the_module_needs_no_verl():
    """The reader of prompts and the dataset load in a process without verl (and import none)."""
    code = "import sys, future_l1_plugin.integrations.verl.dataset; print([m for m in sys.modules if m == 'verl'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(("count", "size", "sizes"), [(9, 4, [3, 3, 3]), (8, 4, [4, 4]), (3, 128, [3]), (5, 4, [3, 2])])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_a_validation_are_of_about_one_size(count, size, sizes, workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(list(range(count)), batch_size=size, shuffle=True, num_workers=workers)
    even_out(loader)
    found = [batch.tolist() for batch in loader]
    assert [len(batch) for batch in found] == sizes
    assert sorted(number for batch in found for number in batch) == list(range(count))
