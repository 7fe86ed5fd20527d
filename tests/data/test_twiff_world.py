"""The micro TwiFF-Bench: the held-out questions of a world, with their pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from future_l1_plugin.cli import main
from future_l1_plugin.data import make_world
from future_l1_plugin.data.physics import ASKS
from future_l1_plugin.data.scenes import render
from future_l1_plugin.data.twiff_world import make_twiffbench
from future_l1_plugin.data.world_questions import held_out_questions
from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.twiffbench import load_items


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=0, seed=3, progress=False)


@pytest.fixture(scope="module")
def folder(world):
    return make_twiffbench(world.root, 6)


def test_items_are_the_worlds_questions(world, folder, tmp_path):
    items = load_items(folder, tmp_path)
    asked = json.loads(world.futurebench.read_text())
    assert [item.id for item in items] == [entry["id"] for entry in asked[:6]]
    for item, entry in zip(items, asked, strict=False):
        ask = ASKS[entry["question_type"]]
        assert entry["qa"]["Question"] in item.question
        assert item.answer == entry["qa"]["Options"][entry["qa"]["Answer"]]
        assert item.classification == entry["meta"]["mechanic"]
        assert (len(item.question_images), len(item.chain_images)) == (len(ask.seen), len(ask.between))
        assert item.chain.endswith(f"it is at {item.answer}")
        numbers = [step + 1 for step in ask.seen]
        assert item.question.startswith("".join(f"frame_{number}\n<image>\n" for number in numbers))
    assert not list(tmp_path.iterdir()), "local pictures stay where they are"


def test_pictures_show_the_scene(folder, tmp_path):
    for item, question in zip(load_items(folder, tmp_path), held_out_questions(3, 6), strict=True):
        steps = [*question.ask.seen, *question.ask.between]
        for step, file in zip(steps, [*item.question_images, *item.chain_images], strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(file)), render(question.scene, step))


def test_a_broken_off_one_is_completed_and_the_rest_left_alone(world, folder):
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*.png")}
    text = (folder / "test.jsonl").read_bytes()
    first, second, *_ = sorted(before)
    first.unlink()
    second.write_bytes(b"half")
    (folder / "test.jsonl").unlink()
    assert make_twiffbench(world.root, 6) == folder
    assert (folder / "test.jsonl").read_bytes() == text
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*.png")}
    assert {file: data for file, (data, _) in after.items()} == {file: data for file, (data, _) in before.items()}
    assert {file for file in before if before[file] != after[file]} == {first, second}


def test_the_command_and_its_errors(world, tmp_path, capsys):
    command = ["world", str(tmp_path / "w"), "--test", "16", "--train", "0", "--twiffbench"]
    assert main([*command, "2"]) == 0
    assert len((tmp_path / "w" / "twiffbench" / "test.jsonl").read_text().splitlines()) == 2
    assert main([*command, "17"]) == 2
    assert "16 test questions; expected version 1, and 1 to 16" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"world.json: expected a finished micro world.*future-l1 world"):
        make_twiffbench(tmp_path / "nowhere", 2)
