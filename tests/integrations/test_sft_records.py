"""Records that cannot be used, in whole SFT runs: found at the start, or replaced, named, counted and bounded later."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from future_l1_plugin.data import make_world
from future_l1_plugin.integrations.sft.run import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=0, train=8, seed=0, progress=False)


@pytest.fixture
def run(tiny_path, world, tmp_path, capsys):
    """Trains 4 steps of 2 records, each seen once; returns (exit code, what was said)."""

    def start(records: list[dict], *overrides: str, name: str = "out") -> tuple[int, str]:
        (tmp_path / "records.json").write_text(json.dumps(records))
        recipe = {
            "model": str(tiny_path),
            "output": str(tmp_path / name),
            "data": {"records": str(tmp_path / "records.json"), "videos": str(world.videos), "workers": 0},
            "train": {"max_steps": 4, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-3},
            "eval": {"prompts": 0},
            "log": {"every": 1, "save_every": 1, "keep": 9, "tensorboard": False},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
        code = main([str(tmp_path / "run.yaml"), "data.max_length=1024", *overrides])
        said = capsys.readouterr()
        return code, said.out + said.err

    return start


def rows(world) -> list[dict]:
    return json.loads(world.sft.read_text())[:8]


def broken(world, row: dict, folder: Path) -> dict:
    """The row with a clip whose header is whole and whose frames are not."""
    clip = bytearray((world.videos / row["video"]).read_bytes())
    where = clip.index(b"mdat") + 4
    size = int.from_bytes(clip[where - 8 : where - 4], "big") - 8
    clip[where : where + size] = bytes(size)
    (folder / "broken.mp4").write_bytes(clip)
    return row | {"video": str(folder / "broken.mp4")}


def metrics(folder: Path) -> list[dict]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_overlong_records_are_listed_at_the_start(run, world, monkeypatch, tmp_path):
    given = rows(world)
    for row in given[:2]:
        row["conversations"][1]["value"] = "word " * 3000 + row["conversations"][1]["value"]
    with monkeypatch.context() as patch:
        patch.setattr("future_l1_plugin.model.load", lambda *_, **__: pytest.fail("the model was loaded"))
        code, said = run(given)
    assert code == 2 and "2 of 8 records cannot be trained on. Fix them, or go on with the other 6" in said
    assert said.count("tokens, data.max_length is 1,024. Raise it; a new run may") == 2
    code, said = run(given, "data.on_bad=skip", "train.max_steps=1")
    assert code == 0 and "left out 2 of 8 records" in said
    assert f"left out: record {given[0]['id']}: " in said and f"left out: record {given[1]['id']}: " in said


def test_a_record_that_fails_in_the_middle_of_a_run(run, world, tmp_path):
    """Do what each error says, and the run goes on, as if it had never stopped."""
    given = rows(world)
    bad = given[BROKEN]["id"]
    given[BROKEN] = broken(world, given[BROKEN], tmp_path)
    code, said = run(given)
    assert code == 2 and f"error: record {bad}: {tmp_path}/broken.mp4: cannot be decoded (" in said
    assert "go on without it by data.on_bad=skip" in said and "Traceback" not in said
    assert list((tmp_path / "out" / "checkpoints").iterdir())  # it did not fail at the start
    code, said = run(given, "data.on_bad=skip", "data.max_failed=0")
    assert code == 2 and "1 records failed in this run, data.max_failed is 0. " in said and "broken.mp4" in said
    code, said = run(given, "data.on_bad=skip", "data.max_failed=1")
    assert code == 0 and "resuming from" in said
    assert said.count("left out, and the next record trained on instead: record " + bad) == 1
    assert f"1 records failed in this run: {bad}" in said
    assert [row.get("failed_records", 0) for row in metrics(tmp_path / "out")][-1] == 1
    code, said = run(given, "data.on_bad=skip", "data.workers=2", name="unbroken")
    assert code == 0
    assert [row["loss"] for row in metrics(tmp_path / "out")] == [row["loss"] for row in metrics(tmp_path / "unbroken")]
    first, second = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("out", "unbroken"))
    assert all(torch.equal(first[name], second[name]) for name in first)


#: A record of the last of the four steps.
BROKEN = 1


def test_the_count_goes_on_with_the_run():
    """Of a resumed run: what its checkpoint holds, what it finds itself, and all of it against the bound."""
    from types import SimpleNamespace

    from future_l1_plugin.data.sft import RecordFailed
    from future_l1_plugin.integrations.sft.failures import FailedRecords

    state, step = SimpleNamespace(stateful_callbacks={}), SimpleNamespace(should_log=False, should_save=True)
    first = FailedRecords(2)
    first.note([("a", "record a: broken"), ("a", "record a: broken"), ("b", "record b: broken")])
    first.on_step_end(None, state, step)
    kept = json.loads(json.dumps(dataclasses.asdict(State(state.stateful_callbacks))))
    again = FailedRecords(2)
    again.on_train_begin(None, SimpleNamespace(**kept), None)
    again.note([("b", "record b: broken")])
    with pytest.raises(RecordFailed, match=r"3 records failed in this run, data.max_failed is 2.*\n  record a: broken"):
        again.note([("c", "record c: broken")])


@dataclasses.dataclass
class State:
    """What transformers writes of its state into a checkpoint, in part."""

    stateful_callbacks: dict
