"""TwiFF-Bench under lmms-eval: the task, and the whole offline path from the micro world to judged scores."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from future_l1_plugin.cli import main
from future_l1_plugin.data import make_world
from future_l1_plugin.data.twiff_world import make_twiffbench
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.evaluation.results import read_results, read_samples, results_file
from future_l1_plugin.integrations.lmms_eval.settings import Generation
from future_l1_plugin.paths import lmms_tasks_dir

ITEMS = 4
SETTINGS = "max_new_tokens=48"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=0, progress=False)


@pytest.fixture(autouse=True)
def benchmark(world, monkeypatch) -> None:
    """TWIFFBENCH_DATA set to four items, no judge."""
    monkeypatch.setenv("TWIFFBENCH_DATA", str(make_twiffbench(world.root, ITEMS)))
    monkeypatch.delenv("TWIFFBENCH_JUDGE", raising=False)


@pytest.fixture(scope="module")
def utils():
    """lmms_tasks/twiffbench/utils.py, loaded as lmms-eval loads it."""
    spec = importlib.util.spec_from_file_location("twiffbench_utils", lmms_tasks_dir() / "twiffbench" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tasks(model: str = "future_l1"):
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(lmms_tasks_dir()), include_defaults=False, model_name=model)


# ---- the whole path -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory) -> Path:
    """A folder in which the micro base was evaluated by the real command: base/, out/, responses.jsonl."""
    from future_l1_plugin.model.tiny import copy_micro_base

    folder = tmp_path_factory.mktemp("evaluated")
    copy_micro_base(folder / "base")
    command = [sys.executable, "-m", "lmms_eval", "--model", "future_l1", "--tasks", "futurebench,twiffbench"]
    command += ["--model_args", f"pretrained={folder / 'base'},responses={folder / 'responses.jsonl'}"]
    command += ["--batch_size", "4", "--limit", str(ITEMS), "--gen_kwargs", SETTINGS]
    environment = {
        **os.environ,
        "TWIFFBENCH_DATA": str(make_twiffbench(world.root, ITEMS)),
        "FUTUREBENCH_DATA": str(world.futurebench),
        "FUTUREBENCH_VIDEO_DIR": str(world.videos),
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TWIFFBENCH_JUDGE", None)
    done = subprocess.run(
        [*command, "--output_path", str(folder / "out"), "--log_samples"],
        env=environment,
        cwd=folder,
        text=True,
        capture_output=True,
    )
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture
def judge_file(repository, tmp_path, monkeypatch):
    """The settings of the micro judge, served by its script."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = subprocess.Popen(
        [sys.executable, str(repository / "scripts" / "micro_judge.py")], stdout=subprocess.PIPE, text=True
    )
    file = tmp_path / "judge.yaml"
    file.write_text(json.dumps({"base_url": server.stdout.readline().strip(), "model": "micro-judge"}))
    yield file
    server.kill()
    server.wait()


def evaluate(folder: Path) -> dict:
    """The same run in this process, with the answers that are there."""
    from lmms_eval.evaluator import simple_evaluate

    arguments = f"pretrained={folder / 'base'},responses={folder / 'responses.jsonl'}"
    return simple_evaluate(
        model="future_l1", model_args=arguments, tasks=["twiffbench"], task_manager=tasks(), gen_kwargs=SETTINGS
    )


def test_from_the_micro_world_to_judged_scores(evaluated, judge_file, monkeypatch, capsys):
    log = (evaluated / "log").read_text()
    assert list((evaluated / "out").rglob("*_results.json")), log[-3000:]
    assert "answers were NOT judged" in log
    assert read_results(evaluated / "out", "twiffbench")["average"].value is None
    assert read_results(evaluated / "out", "futurebench")["future_acc"].value is not None
    for task in ("twiffbench", "futurebench"):
        told = json.loads(results_file(evaluated / "out").read_text())["configs"][task]["metadata"]["future_l1"]
        assert told["data"]["items"] and told["data"]["hash"] and told["model"]["hash"] and told["versions"]["torch"]
    samples = read_samples(evaluated / "out", "twiffbench")
    assert [sample["judged"]["item"]["id"] for sample in samples] == [f"micro-test-{i:05d}" for i in range(ITEMS)]
    assert [sample["judged"]["response"] for sample in samples] == [sample["filtered_resps"] for sample in samples]

    assert main(["judge", str(evaluated / "out"), "--judge", str(judge_file)]) == 0
    assert "micro-judge" in capsys.readouterr().out
    apart = json.loads(next((evaluated / "out").rglob("*_judged.json")).read_text())["judges"]["micro-judge"]
    assert apart["judged"] == ITEMS and 0 < apart["average"]["mean"] < 5, "the comparison below means something"

    monkeypatch.setenv("TWIFFBENCH_JUDGE", str(judge_file))
    within = evaluate(evaluated)["results"]["twiffbench"]
    assert within["judged,none"] == ITEMS and within["judge_failure_rate,none"] == 0
    for name in ("cot", "answer", "average"):
        assert within[f"{name},none"] == pytest.approx(apart[name]["mean"])
        assert within[f"{name}_stderr_clustered,none"] == pytest.approx(apart[name]["stderr"])
    means = {
        classification: {"n": found["n"], **{name: found[name]["mean"] for name in ("cot", "answer", "average")}}
        for classification, found in apart["by_class"].items()
    }
    assert within["by_class,none"] == means


def test_a_run_whose_judge_is_away_fails_and_keeps_the_answers(evaluated, tmp_path, monkeypatch):
    before = (evaluated / "responses.jsonl").read_bytes()
    assert before.count(b"\n") == 2 * ITEMS
    file = tmp_path / "away.yaml"
    file.write_text(json.dumps({"base_url": "http://127.0.0.1:9/v1", "model": "m", "max_retries": 0}))
    monkeypatch.setenv("TWIFFBENCH_JUDGE", str(file))
    with pytest.raises(DataError) as error:
        evaluate(evaluated)
    message = str(error.value)
    assert "4 of 4 answers got no scores and are in no mean" in message and "the run has failed" in message
    assert all(f"  micro-test-{i:05d}: sample micro-test-{i:05d}: no usable reply" in message for i in range(ITEMS))
    assert (evaluated / "responses.jsonl").read_bytes() == before


# ---- the task -------------------------------------------------------------------------------------------------------


def test_one_task_for_every_model(utils):
    from lmms_eval.tasks import get_task_dict

    ours = get_task_dict(["twiffbench"], tasks(), "chat")["twiffbench"]
    other = get_task_dict(["twiffbench"], tasks("qwen3_vl"), "simple")["twiffbench"]
    doc = ours.test_docs()[0]
    assert [Generation.from_task(task.config.generation_kwargs).max_new_tokens for task in (ours, other)] == [4096] * 2
    assert Generation.from_task(ours.config.generation_kwargs).temperature == 0
    assert ours.doc_to_target(doc) == doc["answer"]
    assert ours.doc_to_text(doc) == doc["question"], "it says itself where the answer goes"
    plain = doc | {"question": "frame_1\n<image>\nframe_2\n<image>\nframe_3<image><image>Where?"}
    assert ours.doc_to_text(plain).endswith("Where?\nThink, then put only the final answer within <answer></answer>.")
    assert "Think step by step" in other.doc_to_text(plain)
    (turn,) = ours.doc_to_messages(plain)
    kinds = [part["type"] for part in turn["content"]]
    assert kinds == ["text", "image", "text", "image", "text", "image", "image", "text"]
    assert [part["url"] for part in turn["content"] if part["type"] == "image"] == doc["question_images"]
    assert turn["content"][2]["text"] == "\nframe_2\n"
    assert [(image.size, image.mode) for image in other.doc_to_visual(doc)] == [((64, 64), "RGB")] * 4


def test_bad_data_and_settings_stop_when_the_task_is_loaded(utils, tmp_path, monkeypatch):
    bad = tmp_path / "bad.yaml"
    bad.write_text("modell: m\n")
    monkeypatch.setenv("TWIFFBENCH_JUDGE", str(bad))
    with pytest.raises(ConfigError, match="unknown key `modell`"):
        _ = utils.dataset_kwargs
    monkeypatch.delenv("TWIFFBENCH_JUDGE")
    assert Path(utils.dataset_kwargs["data_files"]["test"]).read_text().count("\n") == ITEMS
    monkeypatch.setenv("TWIFFBENCH_DATA", str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match=r"(?s)nowhere.jsonl: no such file.*TWIFFBENCH_DATA names it"):
        _ = utils.dataset_kwargs
    monkeypatch.delenv("TWIFFBENCH_DATA")  # then the hub is asked, which no test can reach
    with pytest.raises(DataError, match=r"(?s)Liu-Junhua/TwiFF-Bench.*cannot be downloaded.*set TWIFFBENCH_DATA"):
        _ = utils.dataset_kwargs


def test_few_failures_are_listed_and_left_out(utils, monkeypatch):
    from loguru import logger

    said: list[str] = []
    handler = logger.add(said.append, level="WARNING")
    records = [{"item": {"id": f"q{i}"}, "asked": True, "failure": None} for i in range(100)]
    assert utils.count_judged(records) == 100 and said == []
    records[7]["failure"] = "out of range"
    assert utils.count_judged(records) == 99
    assert "1 of 100 answers got no scores and are in no mean.\n  q7: out of range" in said[0]
    records[8]["failure"] = "away"
    with pytest.raises(DataError, match=r"(?s)2 of 100 answers.*q7: out of range\n  q8: away\n.*more than 1%"):
        utils.count_judged(records)
    logger.remove(handler)
    assert utils.mean_score([{"score": 4.0}, {}, {"score": 1.5}]) == 2.75 and utils.mean_score([{}]) == "N/A"
