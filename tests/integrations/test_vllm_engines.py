"""Evaluation and curation by vLLM against the same by transformers, on the micro world and the CPU build."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from future_l1_plugin.config import load_recipe
from future_l1_plugin.data import make_world
from future_l1_plugin.data.curation_answers import Curation
from future_l1_plugin.data.curation_recipe import CurationRecipe
from future_l1_plugin.errors import ConfigError
from future_l1_plugin.integrations.vllm.engine import VllmEngine
from future_l1_plugin.model import convert, load, save
from future_l1_plugin.model.tiny import MICRO_BASE
from future_l1_plugin.paths import lmms_tasks_dir

pytestmark = pytest.mark.vllm

ARGS = {
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 3,  # fewer than are asked
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "kv_cache_memory_bytes": 32 << 20,
    "limit_mm_per_prompt": {"image": 8, "video": 1},
}


QUESTIONS, ANSWERS = 8, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=2, perception=0, seed=0, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The micro base, made latent: each response begins with a span of 3, drawn through a head."""
    keys = {"use_projection_head": True, "projection_head_type": "lvr", "projection_hidden_dim": 64}
    keys |= {"force_initial_latent_mode": True, "loose_latent_budget": 3}
    folder = tmp_path_factory.mktemp("micro")
    model, processor = load(convert(MICRO_BASE, folder / "half", system_prompt="", **keys), dtype="float32")
    save(model, processor, folder / "latent")
    return folder / "latent"


@pytest.fixture(scope="module")
def starts(checkpoint):
    """How often vLLM was asked to start. It does so once, in this process, for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        asked, llm = [], []
        start = vllm.LLM

        def once(**args):
            asked.append(args)
            llm.extend([] if llm else [start(**args)])
            return llm[0]

        patch.setattr(vllm, "LLM", once)
        patch.setattr(VllmEngine, "close", lambda self: None)
        yield asked
        if llm:
            llm[0].llm_engine.engine_core.shutdown()


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(starts, checkpoint, world, tmp_path, monkeypatch):
    """Runs futurebench through lmms-eval's evaluator."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("FUTUREBENCH_DATA", str(world.futurebench))
    monkeypatch.setenv("FUTUREBENCH_VIDEO_DIR", str(world.videos))
    tasks = TaskManager(include_path=str(lmms_tasks_dir()), include_defaults=False, model_name="future_l1")

    def run(engine, gen_kwargs="max_new_tokens=12", **more):
        arguments = {"pretrained": str(checkpoint), "responses": str(tmp_path / f"{engine}.jsonl"), "engine": engine}
        return simple_evaluate(
            model="future_l1",
            model_args=",".join(f"{name}={value}" for name, value in (arguments | more).items()),
            tasks=["futurebench"],
            task_manager=tasks,
            gen_kwargs=gen_kwargs,
            limit=QUESTIONS,
        )

    return run


def counted(found):
    """(doc_id, text, input, output, latent tokens) of every sample."""
    kinds = ("input_tokens", "output_tokens", "reasoning_tokens")
    samples = sorted(found["samples"]["futurebench"], key=lambda sample: sample["doc_id"])
    return [(s["doc_id"], s["resps"], *(s["token_counts"][0][kind] for kind in kinds)) for s in samples]


def test_an_evaluation_gives_the_same_answers(evaluate, starts, tmp_path):
    with_hf = evaluate("hf", batch_size=8, device="cpu", loose_latent_budget=2)
    with_vllm = evaluate("vllm", vllm_args=json.dumps(ARGS), loose_latent_budget=2)
    assert counted(with_vllm) == counted(with_hf)
    assert len({str(row[1]) for row in counted(with_vllm)}) > 1 and {row[4] for row in counted(with_vllm)} == {2}
    for name, value in with_hf["results"]["futurebench"].items():
        assert with_vllm["results"]["futurebench"][name] == value or "stderr" in name
    told = with_vllm["configs"]["futurebench"]["metadata"]["future_l1"]["model"]["decoding"]
    assert told["engine"]["name"] == "vllm" and "max_num_seqs" not in told["engine"]["args"]
    assert told["dtype"] == "auto" and starts[-1]["dtype"] == "float32"
    before, file = len(starts), tmp_path / "vllm.jsonl"
    kept = file.read_text()
    evaluate("vllm", vllm_args=json.dumps(ARGS | {"max_num_seqs": 2}), loose_latent_budget=2)
    assert len(starts) == before and file.read_text() == kept  # a finished run asks nothing
    file.write_text("".join(kept.splitlines(keepends=True)[:5]))
    again = evaluate("vllm", vllm_args=json.dumps(ARGS), loose_latent_budget=2)
    assert counted(again) == counted(with_vllm)
    assert sorted(row["doc_id"] for row in map(json.loads, file.read_text().splitlines())) == list(range(QUESTIONS))


def test_a_run_that_is_killed_early_keeps_its_answers(evaluate, checkpoint, tmp_path, monkeypatch):
    """With kill -9 when its first answer is there. vLLM's own process ends with it and gives the device back."""
    kept, args = tmp_path / "vllm.jsonl", json.dumps(ARGS | {"max_num_seqs": 1})
    command = [sys.executable, "-m", "lmms_eval", "--model", "future_l1", "--tasks", "futurebench", "--limit", "8"]
    command += ["--model_args", f"pretrained={checkpoint},responses={kept},engine=vllm,vllm_args={args}"]
    command += ["--gen_kwargs", "max_new_tokens=12", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
        deadline = time.time() + 240
        while not (kept.exists() and kept.read_text().count("\n")) and time.time() < deadline and run.poll() is None:
            time.sleep(0.02)
        children = children_of(run.pid)
        run.send_signal(signal.SIGKILL)
        run.wait()
    before = kept.read_text().splitlines() if kept.exists() else []
    assert 1 <= len(before) < QUESTIONS, (tmp_path / "log").read_text()[-3000:]
    assert children, "vLLM has no process of its own here"
    deadline = time.time() + 60
    while any(map(alive, children)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children)), "vLLM outlives the run that was killed, and keeps its memory"

    asked, make = [], VllmEngine._request
    monkeypatch.setattr(VllmEngine, "_request", lambda *given: asked.append(given[1].name) or make(*given))
    evaluate("vllm", vllm_args=json.dumps(ARGS))
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert kept.read_text().splitlines()[: len(before)] == before
    assert sorted(row["doc_id"] for row in rows) == list(range(QUESTIONS)) and len(asked) == QUESTIONS - len(before)


def children_of(parent):
    """Processes that `parent` started, but for multiprocessing's own helpers, which end by themselves."""
    ids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    commands = {int(i): Path(f"/proc/{i}/cmdline").read_text().replace("\0", " ") for i in ids}
    return [i for i, command in commands.items() if "resource_tracker" not in command]


def alive(process):
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_settings_reach_vllm(evaluate, monkeypatch):
    """And the same draws come again, whatever was asked before. (Top-k needs what Triton's interpreter lacks.)"""
    made, make = [], VllmEngine._request
    monkeypatch.setattr(VllmEngine, "_request", lambda *given: made.append(make(*given)) or made[-1])
    more = {"policy": "vmf", "policy_kwargs": '{"mean_cosine": 0.5}', "resume": False, "vllm_args": json.dumps(ARGS)}
    drawn = [counted(evaluate("vllm", "max_new_tokens=8,temperature=0.9", **more)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({str(row[1]) for row in drawn[0]}) > QUESTIONS // 2
    asked = [params for _, params in made]
    assert {(p.temperature, p.top_p, p.top_k, p.max_tokens) for p in asked} == {(0.9, 1.0, 0, 8)}
    assert len({p.seed for p in asked}) == QUESTIONS
    latent = {"latent_policy": "vmf", "latent_mean_cosine": 0.5, "latent_limit": 3, "latent_exact": 0}
    assert all(p.extra_args == latent | {"latent_seed": p.seed, "latent_return": "none"} for p in asked)


def test_what_does_not_fit_is_refused(evaluate):
    with pytest.raises(
        ConfigError,
        match=r"test \d: a prompt of \d+ tokens and an answer of up to 500 do not fit vLLM's max_model_len of 512\.",
    ):
        evaluate("vllm", "max_new_tokens=500", vllm_args=json.dumps(ARGS))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_model_length": 9}, "vLLM has no argument max_model_length. Did you mean max_model_len"),
        ({"scheduler_cls": "x"}, "scheduler_cls is set by latent decoding itself"),
        ({"dtype": "float16"}, "dtype is set outside of them"),
    ],
)
def test_arguments_of_vllm_are_checked_first(evaluate, starts, args, words):
    before = len(starts)
    with pytest.raises(ConfigError, match=words):
        evaluate("vllm", vllm_args=json.dumps(args))
    assert len(starts) == before


# ---- curation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def curation(starts, checkpoint, world, tmp_path):
    """Makes curations of two of the world's records: each is asked with and without future frames, twice."""
    records = tmp_path / "records.json"
    records.write_text(json.dumps(json.loads(world.sft.read_text())[:2]))

    def make(engine, output, *overrides, temperature=1.0):
        values = {
            "output": str(tmp_path / output),
            "data": {"records": str(records), "videos": str(world.videos)},
            "rollouts": {"engine": engine, "n": 2, "max_new_tokens": 10, "temperature": temperature},
            "hf": {"model": str(checkpoint), "device": "cpu"},
            "vllm": {"model": str(checkpoint), "args": ARGS},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(values))
        return Curation(load_recipe(file, CurationRecipe, overrides), progress=False, vllm=VllmEngine)

    return make


def answers(curation):
    curation.run()
    rows = [json.loads(line) for line in (curation.output / "rollouts.jsonl").read_text().splitlines()]
    return {(row["id"], tuple(row["pool"]), row["sample"]): row["answer"] for row in rows}


def test_a_curation_gives_the_same_answers(curation):
    """At a temperature near 0: seeds draw differently from the same probabilities."""
    found = answers(curation("vllm", "vllm", temperature=1e-4))
    assert found == answers(curation("hf", "hf", temperature=1e-4))
    assert len(found) == ANSWERS and len(set(found.values())) > 1


def test_a_curation_that_was_broken_off_goes_on(curation, starts):
    class Killed(Exception):
        pass

    video = "data.question_media=video"
    whole = answers(curation("vllm", "whole", video))
    assert len(set(whole.values())) > 4
    broken, stored = curation("vllm", "broken", video), []
    attempts = [attempt for _, _, attempt in broken.attempts(broken.mine())]

    def store(pairs):
        if len(stored) >= 3:
            raise Killed
        stored.extend(pairs)

    with contextlib.suppress(Killed):
        broken.answerer.run(attempts, lambda attempt: False, store)
    done = {attempt.key: answer for attempt, answer in stored}
    assert 3 <= len(done) < ANSWERS
    broken.answerer.run(
        attempts, lambda attempt: attempt.key in done, lambda pairs: done.update({one.key: a for one, a in pairs})
    )
    assert {(one.prompt.id, one.prompt.frames.numbers, one.sample): done[one.key] for one in attempts} == whole
    before = len(starts)
    assert answers(curation("vllm", "whole", video, "vllm.args.max_num_seqs=1")) == whole and len(starts) == before
