"""lmms-eval as a host: the model, the task and the patch that registers the task, on an unmodified lmms-eval."""

import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from made import opening_checkpoint
from PIL import Image

from future_l1_plugin.data.futurebench import ANSWER_IN_TAGS
from future_l1_plugin.errors import CheckpointError, ConfigError, DataError, EnvironmentMismatch
from future_l1_plugin.evaluation.results import read_samples
from future_l1_plugin.integrations.lmms_eval import Metric, read_results
from future_l1_plugin.integrations.lmms_eval.settings import Generation
from future_l1_plugin.journal import checkpoint_mark
from future_l1_plugin.paths import lmms_tasks_dir
from future_l1_plugin.rewards import option_letter

OPTIONS = {"A": "a1", "B": "b2", "C": "c3", "D": "d4"}
FRAMES = {"one": 1, "three": 3, "seven": 7, "forty": 40}  # clips and how many frames they have
METRICS = ["future_acc", "hop1_acc", "hop2_acc", "hop3_acc", "interpolation_acc", "macro_acc", "parse_failure_rate"]


# ---- a small benchmark on disk --------------------------------------------------------------------------------------


def write_clip(path: Path, frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for t in range(frames):
            picture = np.zeros((64, 64, 3), dtype=np.uint8)
            picture[10 + t % 40 : 20 + t % 40, 2 * t % 50 : 2 * t % 50 + 10] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def item(name: str, question_type: str = "hop1", clip: str = "seven", answer: str = "A") -> dict:
    return {
        "id": name,
        "video_path": f"V1-33K/video_dataset/clips/{clip}.mp4",
        "question_type": question_type,
        "qa": {"Question": f"Where will {name} be?", "Options": OPTIONS, "Answer": answer},
    }


ITEMS = [
    item(f"q{i}", ("hop1", "hop2", "hop3", "hop5")[i % 4], sorted(FRAMES)[i // 2 % 4], "ABCD"[i // 4 % 4])
    for i in range(12)
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A video root with the four clips."""
    root = tmp_path_factory.mktemp("videos")
    (root / "clips").mkdir()
    for name, frames in FRAMES.items():
        write_clip(root / "clips" / f"{name}.mp4", frames)
    return root


@pytest.fixture
def benchmark(videos, tmp_path, monkeypatch) -> Path:
    """FUTUREBENCH_* set to a file of 12 items; returns the file."""
    data = tmp_path / "futurebench.json"
    data.write_text(json.dumps(ITEMS))
    monkeypatch.setenv("FUTUREBENCH_DATA", str(data))
    monkeypatch.setenv("FUTUREBENCH_VIDEO_DIR", str(videos))
    return data


@pytest.fixture(scope="module")
def checkpoint(tiny_path, tmp_path_factory) -> Path:
    """The tiny checkpoint, made to begin each response with a latent span of at most 3."""
    folder = tmp_path_factory.mktemp("checkpoint") / "begins-latent"
    return opening_checkpoint(tiny_path, folder, loose_latent_budget=3)


@pytest.fixture(scope="module")
def utils():
    """lmms_tasks/futurebench/utils.py, loaded as lmms-eval loads it."""
    spec = importlib.util.spec_from_file_location("futurebench_utils", lmms_tasks_dir() / "futurebench" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the real command -----------------------------------------------------------------------------------------------


SAMPLING = "max_new_tokens=20,temperature=1.0"  # greedy texts of a random model are all alike


#: How often an evaluation is killed. By hand, for a thorough check: KILLS=10.
KILLS = int(os.environ.get("KILLS", "2"))
#: Two processes; --multi_gpu asks for torch's launcher, without a GPU they talk through gloo.
TWO = "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no --main_process_port=0"


def start(folder: Path, checkpoint: Path, out: str, launcher: str = "") -> subprocess.Popen:
    """Start `lmms-eval --model future_l1 --tasks futurebench` in `folder`, one sample at a time, sampling tokens."""
    assert any(e.name == "future_l1" for e in importlib.metadata.entry_points(group="lmms_eval.models")), (
        "the package is not installed in this environment: run `make setup`"
    )
    command = [sys.executable, *launcher.split(), "-m", "lmms_eval", "--model", "future_l1", "--tasks", "futurebench"]
    command += ["--model_args", f"pretrained={checkpoint},max_num_frames=4,responses={out}.jsonl"]
    command += ["--gen_kwargs", SAMPLING, "--output_path", out, "--log_samples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    log = open(folder / f"{out}.log", "a")  # noqa: SIM115 (the process keeps it)
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def evaluate(model_args: str, gen_kwargs: str | None = None) -> dict:
    """The same in this process, without the tasks of lmms-eval itself."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(lmms_tasks_dir()), include_defaults=False, model_name="future_l1")
    return simple_evaluate(
        model="future_l1", model_args=model_args, tasks=["futurebench"], task_manager=tasks, gen_kwargs=gen_kwargs
    )


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def says_what_it_depends_on(config: dict, checkpoint: Path) -> None:
    told = config["metadata"]["future_l1"]
    assert told["data"]["items"] == len(ITEMS) and len(told["data"]["hash"]) == 32
    model = told["model"]
    assert model["checkpoint"] == str(checkpoint) and len(model["hash"]) == 32
    assert model["frames"] == 4 and model["pixels"]["min"] is None and len(model["pixels"]["video"]) == 2
    assert len(model["prompt"]["template"]) == 32
    assert model["decoding"]["budget"] == {"limit": 3, "exact": False}
    assert told["versions"]["lmms-eval"] == "0.7.3"
    assert config["generation_kwargs"]["max_new_tokens"] == 20


def counts_of(samples: list[dict]) -> list[dict]:
    """Token counts without the time that was taken."""
    return [{name: n for name, n in s["token_counts"][0].items() if name != "seconds"} for s in samples]


@pytest.mark.slow
def test_a_run_goes_on_after_kills_in_two_processes_and_ends_like_an_unbroken_one(benchmark, tmp_path, checkpoint):
    kept, cut = tmp_path / "broken.jsonl", ""
    for kill in range(1, KILLS + 1):
        wanted = max(1, len(ITEMS) * kill // (KILLS + 2))  # later ones leave enough for two processes
        broken = start(tmp_path, checkpoint, "broken")
        deadline = time.time() + 120
        while len(lines(kept)) < wanted and broken.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        broken.send_signal(signal.SIGKILL)
        broken.wait()
        before = lines(kept)
        log = (tmp_path / "broken.log").read_text()
        assert wanted <= len(before), f"killed too early: {len(before)} responses\n{log[-3000:]}"
        assert not list((tmp_path / "broken").rglob("*_results.json")), "killed too late"
        assert before[: cut.count("\n")] == cut.splitlines()[:-1], "earlier responses were touched"
        cut = "\n".join(before[:-1]) + "\n" + before[-1][: len(before[-1]) // 2]  # as if killed while writing
        kept.write_text(cut)

    again = start(tmp_path, checkpoint, "broken", f"-m accelerate.commands.launch {TWO}")
    unbroken = evaluate(f"pretrained={checkpoint},max_num_frames=4,responses={tmp_path / 'unbroken.jsonl'}", SAMPLING)
    assert again.wait(240) == 0, (tmp_path / "broken.log").read_text()[-3000:]

    after = lines(kept)
    second = lines(tmp_path / "broken.rank1.jsonl")
    assert second, "one process did all the work"
    rows = [json.loads(line) for line in [*after, *second] if line.endswith("}")]
    assert after[: len(cut.splitlines())] == cut.splitlines(), "earlier responses were touched"
    assert len(rows) == len({row["key"] for row in rows}) == len(ITEMS), "a response was generated twice or is missing"
    assert "broken line" in (tmp_path / "broken.log").read_text()

    file = next((tmp_path / "broken").rglob("*_results.json"))
    whole = json.loads(file.read_text())
    says_what_it_depends_on(whole["configs"]["futurebench"], checkpoint)
    assert whole["throughput"]["total_gen_tokens"] > 0
    written = whole["results"]["futurebench"]
    for metric in METRICS:
        assert isinstance(written[f"{metric},none"], float), f"{metric} is missing from results.json"
        kind = "stderr" if metric == "macro_acc" else "stderr_clustered"
        assert math.isfinite(written[f"{metric}_{kind},none"]), f"results.json has no standard error of {metric}"
    assert written == unbroken["results"]["futurebench"]

    samples, others = read_samples(tmp_path / "broken"), unbroken["samples"]["futurebench"]
    assert [[s["filtered_resps"]] for s in samples] == [s["filtered_resps"] for s in others]
    assert counts_of(samples) == counts_of(others)
    assert all(s["token_counts"][0]["seconds"] > 0 for s in samples), "a response read again lost its time"
    texts = [s["filtered_resps"] for s in samples]
    assert len(set(texts)) > len(texts) // 2  # the comparison above means something
    for sample in samples:
        text = sample["filtered_resps"]
        assert text.startswith("<|latent_start|>"), "special tokens are lost"
        assert sample["token_counts"][0]["reasoning_tokens"] == text.count("<|latent|>")
        assert sample["input"].endswith(ANSWER_IN_TAGS)
    right = [float(option_letter(s["filtered_resps"], OPTIONS) == s["target"]) for s in samples]
    assert read_results(tmp_path / "broken")["future_acc"].value == pytest.approx(sum(right) / len(right))


# ---- the entry point and the patch ----------------------------------------------------------------------------------


def test_registering_is_light_and_the_tasks_follow():
    code = (
        "import json, sys\n"
        "import lmms_eval.models as models\n"
        "light = not {'torch', 'transformers', 'lmms_eval.tasks'} & set(sys.modules)\n"
        "from lmms_eval.tasks import TaskManager\n"
        "index = TaskManager(include_defaults=False).task_index\n"
        "path = models.MODEL_REGISTRY_V2.resolve('future_l1').class_path\n"
        "print(json.dumps({'light': light, 'tasks': sorted(index), 'class': path}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["light"], "listing models imported torch, transformers or the task manager"
    assert "futurebench" in seen["tasks"]
    assert seen["class"] == "future_l1_plugin.integrations.lmms_eval.adapter.FutureL1"


def test_the_task_patch_is_still_needed():
    """Fails once lmms-eval has futurebench itself or a way to register tasks: then the patch must go."""
    import lmms_eval.__main__
    import lmms_eval.tasks

    own = Path(lmms_eval.tasks.__file__).parent
    texts = [file.read_text(errors="replace") for file in own.rglob("*.yaml")]
    assert len(texts) > 500
    assert not any(re.search(r"^task: *[\"']?futurebench\b", text, re.MULTILINE) for text in texts), (
        "lmms-eval has a task futurebench of its own, which now hides ours"
    )
    assert "entry_points" not in inspect.getsource(lmms_eval.tasks), "lmms-eval has an entry point for tasks: use it"
    source = inspect.getsource(lmms_eval.__main__.cli_evaluate_single)
    assert source.index("TaskManager(") < source.index("LMMS_EVAL_PLUGINS"), "LMMS_EVAL_PLUGINS now works for tasks"
    unpatched = inspect.unwrap(lmms_eval.tasks.TaskManager.initialize_tasks)
    manager = lmms_eval.tasks.TaskManager(include_defaults=False)
    assert "futurebench" not in unpatched(manager, include_defaults=False)


def test_the_task_patch_is_applied_once_and_can_be_switched_off(monkeypatch):
    from lmms_eval.tasks import TaskManager

    from future_l1_plugin.integrations.lmms_eval.registry import manifests
    from future_l1_plugin.patches import lmms_eval_tasks

    monkeypatch.setattr(TaskManager, "initialize_tasks", inspect.unwrap(TaskManager.initialize_tasks))
    monkeypatch.setenv("FUTURE_L1_LMMS_TASKS", "off")
    assert lmms_eval_tasks.apply() is False
    assert "futurebench" not in TaskManager(include_defaults=False).task_index
    assert "futurebench" in TaskManager(include_defaults=False, include_path=str(lmms_tasks_dir())).task_index
    monkeypatch.delenv("FUTURE_L1_LMMS_TASKS")
    assert [manifest.model_id for manifest in manifests()] == ["future_l1"]
    once = TaskManager.initialize_tasks
    manifests()
    assert TaskManager.initialize_tasks is once
    assert "futurebench" in TaskManager(include_defaults=False).task_index


def test_the_task_patch_refuses_what_it_does_not_know(monkeypatch):
    from future_l1_plugin.patches import lmms_eval_tasks

    class TaskManager:
        def initialize_tasks(self, include_path=None):
            return {}

    with pytest.raises(EnvironmentMismatch, match=r"initialize_tasks takes .*'include_path'.*--include_path"):
        lmms_eval_tasks.patch(SimpleNamespace(TaskManager=TaskManager))
    with pytest.raises(EnvironmentMismatch, match=r"has no TaskManager.initialize_tasks"):
        lmms_eval_tasks.patch(SimpleNamespace())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.0")
    with pytest.raises(EnvironmentMismatch, match=r"lmms-eval 0.8.0.*pip install"):
        lmms_eval_tasks.apply()


def test_tasks_named_by_the_user_win():
    from future_l1_plugin.patches import lmms_eval_tasks

    class TaskManager:
        def initialize_tasks(self, include_path=None, include_defaults=True):
            return include_path

    lmms_eval_tasks.patch(SimpleNamespace(TaskManager=TaskManager))
    ours = str(lmms_tasks_dir())
    assert TaskManager().initialize_tasks() == [ours]
    assert TaskManager().initialize_tasks("mine") == ["mine", ours]
    assert TaskManager().initialize_tasks(include_path=["mine", "yours"]) == ["mine", "yours", ours]


# ---- the task: data -------------------------------------------------------------------------------------------------


def test_missing_videos_are_named_before_a_model_is_loaded(benchmark, videos, tmp_path, monkeypatch, checkpoint):
    from future_l1_plugin.integrations.lmms_eval import adapter

    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(adapter, "load", never)
    root = tmp_path / "root"
    (root / "clips").mkdir(parents=True)
    (root / "clips" / "forty.mp4").write_bytes((videos / "clips" / "forty.mp4").read_bytes())
    (root / "clips" / "one.mp4").write_bytes(b"")
    monkeypatch.setenv("FUTUREBENCH_VIDEO_DIR", str(root))
    with pytest.raises(DataError) as error:
        evaluate(f"pretrained={checkpoint},responses={tmp_path / 'r.jsonl'}")
    message = str(error.value)
    assert message.startswith("3 of 4 videos are missing. Set FUTUREBENCH_VIDEO_DIR")
    assert f"{root}/clips/three.mp4 (id 'q6')" in message
    assert f"{root}/clips/one.mp4 is empty (id 'q2')" in message


def test_many_missing_videos_are_counted_and_the_first_shown(utils, tmp_path, monkeypatch):
    monkeypatch.setenv("FUTUREBENCH_VIDEO_DIR", str(tmp_path))
    docs = [item(f"q{i}", clip=f"clip{i}") for i in range(25)]
    with pytest.raises(DataError) as error:
        utils.check_videos(docs)
    assert str(error.value).startswith("25 of 25 videos are missing")
    assert "clip9.mp4" in str(error.value) and "clip10.mp4" not in str(error.value)
    assert str(error.value).endswith("and 15 more")
    monkeypatch.delenv("FUTUREBENCH_VIDEO_DIR")
    with pytest.raises(ConfigError, match="FUTUREBENCH_VIDEO_DIR is not set"):
        utils.check_videos(docs)


def test_malformed_items_stop_the_run_by_name(benchmark, checkpoint, tmp_path):
    benchmark.write_text(json.dumps([*ITEMS, {**item("odd"), "question_type": "hop9"}]))
    with pytest.raises(DataError, match=r"\(id odd\): question_type"):
        evaluate(f"pretrained={checkpoint},responses={tmp_path / 'r.jsonl'}")


def test_items_come_from_json_and_jsonl(utils, benchmark, tmp_path, monkeypatch):
    whole = utils.prepare().read_text()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [f"q{i}" for i in range(12)]
    extra = [{**entry, "id": i, "meta": i} for i, entry in enumerate(ITEMS)]  # numbers as ids, fields beyond the schema
    jsonl = tmp_path / "items.jsonl"
    jsonl.write_text("\n".join(json.dumps(entry) for entry in extra) + "\n\n")
    monkeypatch.setenv("FUTUREBENCH_DATA", str(jsonl))
    docs = [json.loads(line) for line in utils.prepare().read_text().splitlines()]
    assert docs[3] == {**ITEMS[3], "id": "3"}
    monkeypatch.setenv("FUTUREBENCH_DATA", str(tmp_path / "nowhere.json"))
    with pytest.raises(DataError, match=r"FUTUREBENCH_DATA=.*nowhere.json: no such file"):
        utils.read_docs()


def test_without_a_local_file_the_hub_is_asked(utils, monkeypatch):
    """Offline, as in all tests, the error says what to do."""
    monkeypatch.delenv("FUTUREBENCH_DATA", raising=False)
    with pytest.raises(DataError, match=r"haonan3/V1-33K/futurebench.json: cannot be fetched.*Set FUTUREBENCH_DATA"):
        utils.read_docs()


# ---- the task: prompt and scores ------------------------------------------------------------------------------------


def task_for(model_name: str, chat: bool):
    from lmms_eval.tasks import TaskManager, get_task_dict

    tasks = TaskManager(include_path=str(lmms_tasks_dir()), include_defaults=False, model_name=model_name)
    return get_task_dict(["futurebench"], tasks, "chat" if chat else "simple")["futurebench"]


def test_one_task_for_every_model(benchmark, videos):
    ours, other = task_for("future_l1", chat=True), task_for("qwen3_vl", chat=False)
    doc = ours.test_docs()[0]
    question = "Where will q0 be?\nA. a1\nB. b2\nC. c3\nD. d4"
    assert ours.doc_to_text(doc) == question + ANSWER_IN_TAGS
    assert other.doc_to_text(doc) == question + "\nAnswer with the option's letter from the given choices directly."
    assert ours.config.generation_kwargs["max_new_tokens"] == 2048
    assert other.config.generation_kwargs["max_new_tokens"] == 16
    for task in (ours, other):
        assert Generation.from_task(task.config.generation_kwargs).temperature == 0
        assert task.doc_to_visual(doc) == [f"{videos}/clips/forty.mp4"]
        assert task.doc_to_target(doc) == "A"
    (turn,) = ours.doc_to_messages(doc)
    assert [part["type"] for part in turn["content"]] == ["video", "text"]


def test_options_inside_the_question_are_not_repeated(utils):
    question = "Which? A) a1 B) b2 C) c3 D) d4"
    doc = item("q") | {"qa": {"Question": question, "Options": OPTIONS, "Answer": "A"}}
    assert utils.doc_to_text(doc, {"pre_prompt": "Look. ", "post_prompt": " Now."}) == f"Look. {question} Now."


def scored(utils, outcomes: list[tuple[str, str, str | None, str]]) -> dict[str, list[dict]]:
    """Records by metric of items (question type, right letter, answered letter, clip)."""
    records: dict[str, list[dict]] = {}
    for i, (question_type, right, answered, clip) in enumerate(outcomes):
        response = "no idea" if answered is None else f"<reason>x</reason><answer>{answered}</answer>"
        doc = item(f"q{i}", question_type, clip, right)
        for metric, record in utils.process_results(doc, [response]).items():
            records.setdefault(metric, []).append(record)
    return records


def test_scores_by_hand(utils):
    """hop1: 3 of 4; hop2: 1 of 2; hop3: 0 of 1; interpolation: 1 of 1. One answer of eight cannot be read."""
    records = scored(
        utils,
        [
            ("hop1", "A", "A", "u"),
            ("hop1", "B", "(b)", "u"),
            ("hop1", "C", "Option C", "v"),
            ("hop1", "D", "A", "w"),
            ("hop2", "A", "A", "u"),
            ("hop2", "B", None, "v"),
            ("hop3", "A", "B", "w"),
            ("hop5", "D", "D", "w"),
        ],
    )
    values = {metric: utils.mean_score(records[metric]) for metric in METRICS if metric != "macro_acc"}
    assert values == {
        "future_acc": 5 / 8,
        "hop1_acc": 3 / 4,
        "hop2_acc": 1 / 2,
        "hop3_acc": 0.0,
        "interpolation_acc": 1.0,
        "parse_failure_rate": 1 / 8,
    }
    assert utils.macro_mean(records["macro_acc"]) == (3 / 4 + 1 / 2 + 0 + 1) / 4 == 0.5625
    assert all(len(entries) == 8 for entries in records.values()), "lmms-eval would report a wrong number of samples"
    assert utils.macro_stderr(records["macro_acc_stderr"]) == "N/A"  # hop3 and interpolation have one item each


def test_the_paper_s_split_by_hand(utils):
    """1,056 items. Right are 100 of 173, 120 of 193, 90 of 201 and 400 of 489; every tenth wrong one says nothing."""
    sizes = {"hop1": (173, 100), "hop2": (193, 120), "hop3": (201, 90), "hop5": (489, 400)}
    wrong = ["B"] * 9 + [None]
    outcomes = [
        (kind, "A", "A" if i < right else wrong[(i - right) % 10], f"{kind} {i // 3}")
        for kind, (size, right) in sizes.items()
        for i in range(size)
    ]
    records = scored(utils, outcomes)
    assert len(records["future_acc"]) == 1056
    means = {metric: utils.mean_score(records[metric]) for metric in METRICS if metric != "macro_acc"}
    assert means["future_acc"] == 710 / 1056
    assert [means[f"{hop}_acc"] for hop in ("hop1", "hop2", "hop3")] == [100 / 173, 120 / 193, 90 / 201]
    assert means["interpolation_acc"] == 400 / 489
    assert means["parse_failure_rate"] == (7 + 7 + 11 + 8) / 1056  # of 73, 73, 111 and 89 wrong ones
    # 0.5780347 + 0.6217617 + 0.4477612 + 0.8179959 = 2.4655535, over 4; the micro average is 0.6723485
    assert utils.macro_mean(records["macro_acc"]) == pytest.approx(0.6163884, abs=1e-7)
    assert means["future_acc"] == pytest.approx(0.6723485, abs=1e-7)


def test_an_answer_of_two_letters_is_none(utils):
    records = scored(utils, [("hop1", "A", "A or B", "u"), ("hop1", "A", "A", "u")])  # and two questions about a clip
    assert records["future_acc"][0]["prediction"] is None
    assert [r["score"] for r in records["future_acc"]] == [0.0, 1.0]
    assert [r["score"] for r in records["parse_failure_rate"]] == [1.0, 0.0]
    assert {r["video"] for r in records["future_acc"]} == {"V1-33K/video_dataset/clips/u.mp4"}  # one cluster


def test_macro_standard_error_by_hand(utils):
    # hop1: 1, 0 (mean 1/2, s^2 = 1/2); hop2: 1, 1, 0 (mean 2/3, s^2 = 1/3). Every item its own video:
    # Var = (1/2 / 2 + 1/3 / 3) / 2^2 = (1/4 + 1/9) / 4 = 13/144
    outcomes = [("hop1", "A"), ("hop1", "B"), ("hop2", "A"), ("hop2", "A"), ("hop2", "B")]
    apart = scored(utils, [(kind, "A", answer, str(i)) for i, (kind, answer) in enumerate(outcomes)])
    assert utils.macro_mean(apart["macro_acc"]) == pytest.approx(7 / 12)
    assert utils.macro_stderr(apart["macro_acc_stderr"]) == pytest.approx(math.sqrt(13) / 12)
    # The first item of each type shares a video: errors 1/2 / 2 / 2 = 1/8 and 1/3 / 3 / 2 = 1/18,
    # so 2 * 1/8 * 1/18 = 1/72 is added.
    clips = zip(outcomes, "uvuwx", strict=True)
    shared = scored(utils, [(kind, "A", answer, clip) for (kind, answer), clip in clips])
    assert utils.macro_stderr(shared["macro_acc_stderr"]) == pytest.approx(math.sqrt(13 / 144 + 1 / 72))


def test_lmms_eval_makes_the_standard_errors(utils, benchmark):
    """Through lmms-eval's own aggregation: means over the items of the hop, CLT and clustered errors."""
    from lmms_eval.evaluator_utils import TaskOutput, consolidate_results

    output = TaskOutput.from_taskdict("futurebench", task_for("future_l1", chat=True))
    outcomes = [("hop1", "A", "A", "u"), ("hop1", "A", "B", "u"), ("hop1", "A", "A", "v"), ("hop5", "A", "A", "v")]
    for metric, records in scored(utils, outcomes).items():
        output.sample_metrics[metric, "none"] = records
    output.calculate_aggregate_metric(bootstrap_iters=100)
    output.calculate_clt_aggregate_metric()
    results, *_ = consolidate_results([output])
    values = results["futurebench"]
    assert values["samples"] == 4
    assert values["hop1_acc,none"] == pytest.approx(2 / 3)
    assert values["hop1_acc_stderr_clt,none"] == pytest.approx(1 / 3)  # sqrt(1/3 / 3)
    # u holds errors 1/3 and -2/3: CLT^2 + 2 * (1/3)(-2/3) / 3^2 = 1/9 - 4/81 = 5/81
    assert values["hop1_acc_stderr_clustered,none"] == pytest.approx(math.sqrt(5) / 9)
    assert values["hop2_acc,none"] == "N/A" and values["hop2_acc_stderr_clt,none"] == "N/A"
    assert values["macro_acc,none"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["macro_acc_stderr,none"] == "N/A"  # one interpolation item


def test_read_results(tmp_path):
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"no \*_results.json"):
        read_results(tmp_path)
    numbers = {
        "alias": "futurebench",
        "samples": 4,
        "future_acc,none": 0.5,
        "future_acc_stderr,none": "N/A",
        "future_acc_stderr_clt,none": 0.25,
        "future_acc_stderr_clustered,none": 0.2,
        "hop1_acc,none": 0.5,
        "hop1_acc_stderr_clt,none": 0.3,
        "hop1_acc_stderr_clustered,none": "N/A",
        "macro_acc,none": 0.5,
        "macro_acc_stderr,none": 0.1,
        "macro_acc_stderr_stderr,none": "N/A",
        "hop2_acc,none": "N/A",
    }
    (folder / "1_results.json").write_text(json.dumps({"results": {"futurebench": numbers}}))
    assert read_results(tmp_path) == {
        "future_acc": Metric(0.5, 0.2),
        "hop1_acc": Metric(0.5, 0.3),
        "macro_acc": Metric(0.5, 0.1),
        "hop2_acc": Metric(None, None),
    }
    with pytest.raises(DataError, match="no results of task 'twiffbench', found futurebench"):
        read_results(tmp_path, "twiffbench")


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": ["\n\n"], "do_sample": False}, Generation()),
        ({"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n\n"]}, Generation(16)),
        ({"temperature": 0.7, "do_sample": False}, Generation(temperature=0.7)),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, Generation(temperature=0.7, top_p=0.9, top_k=5)),
        ({"do_sample": True}, Generation(temperature=1.0)),
        ({"until": "STOP", "num_beams": 1, "top_p": None}, Generation(until=("STOP",))),
        ({"image_aspect_ratio": "pad"}, Generation()),
    ],
)
def test_generation_settings(given, expected):
    assert Generation.from_task(given) == expected


def test_generation_settings_that_would_be_ignored_are_errors():
    with pytest.raises(ConfigError, match=r"\['max_tokens'\].*max_new_tokens"):
        Generation.from_task({"max_tokens": 5})
    with pytest.raises(ConfigError, match="no beam search"):
        Generation.from_task({"num_beams": 4})


def make(checkpoint: Path, tmp_path: Path, more: str = "", **command_line):
    from future_l1_plugin.integrations.lmms_eval.adapter import FutureL1

    arguments = f"pretrained={checkpoint},responses={tmp_path / 'responses.jsonl'},max_num_frames=8,device=cpu"
    return FutureL1.create_from_arg_string(f"{arguments},{more}" if more else arguments, command_line)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ("batchsize=4", r"unknown \['batchsize'\]; known are pretrained, engine, device, dtype"),
        ("batch_size=auto", "batch_size: expected a whole number of at least 1, found 'auto'"),
        ("dtype=half", "dtype: expected one of auto, float32"),
        ("max_num_frames=0", "max_num_frames: expected a whole number of at least 1, found 0"),
        ("min_pixels=4096,max_pixels=1024", "min_pixels=4096 is above max_pixels=1024"),
        ("resume=yes", "resume: expected True or False, found 'yes'"),
        ("infer_latent_multiplier=0", "infer_latent_multiplier: expected a number above 0"),
        ("policy_kwargs=kappa", "policy_kwargs: expected JSON"),
        ("engine=sglang", "engine: expected one of hf, vllm, found 'sglang'"),
        (
            "engine=vllm,batch_size=8",
            "engine=vllm takes no device, batch_size, which engine=hf does: vLLM has",
        ),
        ('vllm_args={"max_num_seqs": 8}', "engine=hf takes no vllm_args, which engine=vllm does"),
    ],
)
def test_bad_model_arguments(checkpoint, tmp_path, more, error):
    with pytest.raises(ConfigError, match=error):
        make(checkpoint, tmp_path, more)


def test_vllm_wants_one_process_and_to_be_there(checkpoint, monkeypatch):
    from future_l1_plugin.integrations.lmms_eval.adapter import FutureL1

    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(EnvironmentMismatch, match=r"vllm is not installed\.\nRun: .*pip install"):
            FutureL1(str(checkpoint), engine="vllm")
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(ConfigError, match=r"expected one process, found 2\. .*tensor_parallel_size"):
        FutureL1(str(checkpoint), engine="vllm")


def test_batch_size_and_device_from_either_place(checkpoint, tmp_path):
    assert make(checkpoint, tmp_path, "batch_size=4", batch_size=1, device=None).batch_size == 4
    assert make(checkpoint, tmp_path, batch_size="3", device="cpu").batch_size == 3
    with pytest.raises(ConfigError, match=r"--batch_size 3 and --model_args batch_size=4 differ"):
        make(checkpoint, tmp_path, "batch_size=4", batch_size="3")
    with pytest.raises(ConfigError, match="max_batch_size"):
        make(checkpoint, tmp_path, max_batch_size=8)


def test_a_checkpoint_without_latents_is_refused_at_once(tmp_path):
    from future_l1_plugin.model import make_tiny

    with pytest.raises(CheckpointError, match="latent"):
        make(make_tiny(tmp_path / "plain", latent=False), tmp_path)
    with pytest.raises(CheckpointError, match=r"pretrained=.*nowhere: expected a folder"):
        make(tmp_path / "nowhere", tmp_path)


def requests_for(model, docs: list[list[dict]], settings: dict | None = None) -> list:
    """Requests as lmms-eval makes them for chat models; a doc is the content of its user turn."""
    from lmms_eval.api.instance import Instance

    model.task_dict["t"] = {"test": docs}
    return [
        Instance(
            request_type="generate_until",
            arguments=(
                str(doc),
                lambda doc: [{"role": "user", "content": doc}],
                {"max_new_tokens": 10, "until": ["\n\n"], **(settings or {})},
                i,
                "t",
                "test",
            ),
            idx=0,
            metadata={"task": "t", "doc_id": i, "repeats": 1},
        )
        for i, doc in enumerate(docs)
    ]


@pytest.fixture(scope="module")
def mixed_docs(videos, tmp_path_factory) -> list[list[dict]]:
    """Videos of 1, 3, 7 and 40 frames, a picture in memory, one on disk, two at once, and text alone."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    picture.save(file)
    clips = [{"type": "video", "url": str(videos / "clips" / f"{name}.mp4")} for name in FRAMES]
    text = {"type": "text", "text": "Where will it be?"}
    images = [{"type": "image", "url": picture}, {"type": "image", "url": str(file)}]
    return [*([clip, text] for clip in clips), [images[0], text], [images[1], text], [*images, clips[1], text], [text]]


def test_a_batch_answers_like_single_requests(checkpoint, tmp_path, mixed_docs):
    batched = make(checkpoint, tmp_path, "batch_size=8,resume=False")
    together = batched.generate_until(requests_for(batched, mixed_docs))
    single = make(checkpoint, tmp_path, "batch_size=1,resume=False")
    apart = single.generate_until(requests_for(single, mixed_docs))
    assert [r.text for r in together] == [r.text for r in apart]
    assert [r.token_counts for r in together] == [r.token_counts for r in apart]
    assert together[4].text == together[5].text  # the same picture from memory and from disk
    for result in together:
        assert result.text.startswith("<|latent_start|>" + "<|latent|>" * result.token_counts.reasoning_tokens)
        assert result.token_counts.output_tokens <= 10


def test_the_first_latents_do_not_depend_on_the_batch(checkpoint, tmp_path, mixed_docs):
    """Greedy text of a random model varies little; its latents vary with every input."""
    from future_l1_plugin.model import generate
    from future_l1_plugin.model.batch import left_padded

    model = make(checkpoint, tmp_path)
    inputs = [model._build([{"role": "user", "content": doc}]) for doc in mixed_docs]
    together = generate(model._engine.model, left_padded(inputs, 0, "cpu"), max_new_tokens=4).latents
    for one, latents in zip(inputs, together, strict=True):
        (alone,) = generate(model._engine.model, one, max_new_tokens=4).latents
        torch.testing.assert_close(latents, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[3], atol=1e-3)


def test_frames_and_pixels_are_bounded(checkpoint, tmp_path, mixed_docs):
    def grids(more: str) -> list[list[int]]:
        model = make(checkpoint, tmp_path, more)
        inputs = [model._build([{"role": "user", "content": doc}]) for doc in mixed_docs[:5]]
        return [(sample.get("video_grid_thw", sample.get("image_grid_thw")))[0].tolist() for sample in inputs]

    # Patches of 16 pixels; two frames make one step in time, an odd frame is repeated.
    assert grids("") == [[1, 4, 4], [2, 4, 4], [4, 4, 4], [4, 4, 4], [1, 4, 6]]
    assert grids("max_num_frames=2") == [[1, 4, 4], [1, 4, 4], [1, 4, 4], [1, 4, 4], [1, 4, 6]]
    assert grids("max_pixels=1024") == [[1, 2, 2], [2, 2, 2], [4, 2, 2], [4, 2, 2], [1, 2, 2]]
    assert grids("min_pixels=16384") == [[1, 8, 8], [2, 8, 8], [4, 8, 8], [4, 8, 8], [1, 8, 10]]


def test_the_system_prompt(checkpoint, tmp_path, mixed_docs):
    def prompt(more: str) -> str:
        model = make(checkpoint, tmp_path, more)
        ids = model._build([{"role": "user", "content": mixed_docs[-1]}])["input_ids"][0]
        return model._build.processor.tokenizer.decode(ids)

    plain = "<|im_start|>user\nWhere will it be?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt("") == plain  # the tiny checkpoint's template has none
    assert prompt("system_prompt=Be brief.") == "<|im_start|>system\nBe brief.<|im_end|>\n" + plain
    (tmp_path / "prompt.txt").write_text("Think, then speak.\n")
    assert prompt(f"system_prompt={tmp_path / 'prompt.txt'}").startswith("<|im_start|>system\nThink, then speak.<|im")
    assert prompt("system_prompt=") == plain


def test_a_stop_string_cuts_the_text_but_not_the_injected_one(checkpoint, tmp_path, mixed_docs):
    model = make(checkpoint, tmp_path)
    (whole,) = model.generate_until(requests_for(model, mixed_docs[-1:]))
    assert "<|latent_end|>" in whole.text
    (cut,) = model.generate_until(requests_for(model, mixed_docs[-1:], {"until": ["<|latent_end|>"]}))
    assert cut.text == whole.text.split("<|latent_end|>")[0]


def test_a_response_is_used_again_only_for_the_same_question(checkpoint, tmp_path, mixed_docs, monkeypatch):
    from future_l1_plugin.model.engine import Answer, TransformersEngine

    generated = []

    def answers(self, batches, requests):
        for batch in batches:
            generated.append(len(batch))
            yield [(instance, Answer("x", [1], prompt_tokens=1)) for instance in batch]

    monkeypatch.setattr(TransformersEngine, "answers", answers)

    def run(folder: Path = checkpoint, more: str = "", docs=mixed_docs[:2], settings: dict | None = None) -> int:
        generated.clear()
        model = make(folder, tmp_path, more)
        model.generate_until(requests_for(model, docs, settings))
        return sum(generated)

    assert run() == 2
    assert run() == 0
    assert run(more="batch_size=2") == 0
    assert run(docs=mixed_docs[:3]) == 1
    assert run(settings={"max_new_tokens": 11}) == 2
    assert run(more="max_num_frames=4") == 2
    assert run(more="system_prompt=Be brief.") == 2
    assert run(more="loose_latent_budget=2") == 2
    assert run(docs=[[mixed_docs[0][0], {"type": "text", "text": "And then?"}], mixed_docs[1]]) == 1
    assert run(more="resume=False") == 2
    assert run(settings={"temperature": 1.0}) == 2
    assert run(settings={"temperature": 1.0}) == 0
    before = checkpoint_mark(checkpoint)
    os.utime(checkpoint / "model.safetensors")  # trained again into the same folder
    assert checkpoint_mark(checkpoint) != before
    assert run() == 2


def test_samples_with_bad_videos_are_listed_after_the_good_ones(checkpoint, tmp_path, mixed_docs):
    clip = Path(mixed_docs[3][0]["url"])
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:600])
    bad = [[{"type": "video", "url": str(tmp_path / "cut.mp4")}, mixed_docs[0][1]]]
    docs = [mixed_docs[0], *bad, mixed_docs[1]]
    model = make(checkpoint, tmp_path, "batch_size=2")
    with pytest.raises(DataError, match=r"(?s)1 samples have .*skip_bad=True.*  t, test 1: .*cut.mp4"):
        model.generate_until(requests_for(model, docs))
    assert {json.loads(line)["doc_id"] for line in lines(tmp_path / "responses.jsonl")} == {0, 2}
    lenient = make(checkpoint, tmp_path, "batch_size=2,skip_bad=True")
    results = lenient.generate_until(requests_for(lenient, docs))
    assert [bool(result.text) for result in results] == [True, False, True]


def test_what_it_does_not_do_is_said(checkpoint, tmp_path, mixed_docs):
    model = make(checkpoint, tmp_path)
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="multi-round"):
        model.generate_until_multi_round([])
    part = {"url": mixed_docs[0][0]["url"], "video_start": 0}
    with pytest.raises(ConfigError, match="takes a video as the path of its file, found dict"):
        model.generate_until(requests_for(model, [[{"type": "video", "url": part}]]))
