"""Curation by visual gain: a served model that answers by a plan, so that every count is known beforehand."""

import contextlib
import dataclasses
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import time
from functools import partial

import pytest
from http_stand_in import Handler, StandIn, no_key_no_proxy, serving
from PIL import Image

from future_l1_plugin.cli import main
from future_l1_plugin.config import load_recipe
from future_l1_plugin.data import load_records, make_world
from future_l1_plugin.data.curation import curate, select
from future_l1_plugin.data.curation_answers import Curation, Score
from future_l1_plugin.data.curation_recipe import CurationRecipe, Selection
from future_l1_plugin.data.frame_choice import Pool
from future_l1_plugin.data.prompt import twiff_prompt
from future_l1_plugin.data.rollouts import Attempt, LocalAnswerer, content_of, stable_hash
from future_l1_plugin.endpoint.errors import EndpointError
from future_l1_plugin.errors import CheckpointError, ConfigError, DataError, EnvironmentMismatch
from future_l1_plugin.model.engine import Decoding, TransformersEngine, load_any
from future_l1_plugin.report.curation import plot_curation

N = 4
KILLS = 6  # 20 were run, too; each costs a start of the program, four seconds
FILES = ("scores.jsonl", "sft.jsonl", "random.jsonl", "rl_8.jsonl", "summary.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), test=16, train=32, seed=0, progress=False)


def plan(number: int) -> tuple[int, int]:
    """(p_t, p_v) of the record with this number, of N."""
    return number % (N + 1), (number * 3 + number // 5) % (N + 1)


class Served(StandIn):
    """A model that knows the answers, and gives as many right ones as `plan` says; also a judge."""

    def __init__(self, records):
        self.truth = {record.question.split("Where")[1]: (i, record) for i, record in enumerate(records)}
        self.asked, self.judged, self.delay, self.broken = [], 0, 0.0, 0
        self.wordy = False  # right answers in other words, which no rule decides
        super().__init__(Model)


class Model(Handler):
    def do_POST(self):
        body = self.body()
        time.sleep(self.server.delay)
        with self.server.lock:
            broken, self.server.broken = self.server.broken > 0, max(0, self.server.broken - 1)
        if broken:
            return self.send(503, {"error": {"message": "away for a moment"}})
        content = body["messages"][0]["content"]
        self.say(self.verdict(content) if isinstance(content, str) else self.answer(content, body))

    def verdict(self, prompt):
        with self.server.lock:
            self.server.judged += 1
        return json.dumps({"correct": "indeed" in prompt})

    def answer(self, content, body):
        question = "".join(part.get("text", "") for part in content)
        number, record = next(v for k, v in self.server.truth.items() if k.split("\nPut")[0] in question)
        images = sum(part["type"] == "image_url" for part in content)
        visual = images == len(record.image) + len(record.reasoning_image)
        assert visual or images == len(record.image)
        sample = [stable_hash(0, i) for i in range(N)].index(body["seed"])
        with self.server.lock:
            self.server.asked.append((record.id, visual, sample))
        right = sample < plan(number)[visual]
        if self.server.wordy:
            return f"<answer>{'indeed so' if right else 'by no means'}</answer>"
        return f"Let me see. <answer>{record.answer if right else 'nowhere'}</answer>"


@pytest.fixture
def server(world, monkeypatch):
    no_key_no_proxy(monkeypatch)
    with serving(Served(load_records(world.sft, world.videos))) as served:
        yield served


@pytest.fixture
def recipe(world, server, tmp_path):
    """Makes recipes for the served model."""

    def make(*overrides, output="out"):
        endpoint = {"base_url": server.url, "model": "m", "max_concurrency": 4, "backoff_s": 0.01, "max_backoff_s": 0.1}
        values = {
            "output": str(tmp_path / output),
            "data": {"records": str(world.sft), "videos": str(world.videos)},
            "rollouts": {"engine": "endpoint", "n": N, "max_new_tokens": 32},
            "endpoint": endpoint,
            "select": {"most_text": 2, "least_gain": 1, "size": 8, "rl_sizes": [4, 8, 1000]},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(values))
        return load_recipe(file, CurationRecipe, overrides)

    return make


def contents(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


# -- counts and files --------------------------------------------------------------------------------------------------


def test_counts_files_and_summary_are_those_of_the_plan(world, recipe, tmp_path):
    found = curate(recipe())
    records = load_records(world.sft, world.videos)
    assert [(s.text, s.visual) for s in found.scores] == [plan(i) for i in range(len(records))]
    kept = [i for i in range(len(records)) if plan(i)[0] <= 2 and plan(i)[1] - plan(i)[0] >= 1]
    gains = sorted((plan(i)[1] - plan(i)[0] for i in kept), reverse=True)[:8]
    sft = load_records(tmp_path / "out" / "sft.jsonl", world.videos)
    assert [record.extras["gain"] for record in sft] == gains
    number = {record.id: i for i, record in enumerate(records)}
    for record in sft:
        text, visual = plan(number[record.id])
        assert record.extras[f"correct_in_{N}_base"] == text and record.extras[f"correct_in_{N}_hint"] == visual
        assert dataclasses.replace(record, extras={}) == records[number[record.id]]
    assert found.summary["selected"] == {"sft": 8, "random": 8, "rl": [4, 8]}
    assert found.summary["notes"] == [
        f"rl_1000.jsonl: not written, {len(records) - 8} records are left that have the format"
    ]
    mean = sum(plan(i)[0] for i in range(len(records))) / (N * len(records))
    assert found.summary["accuracy"]["text"] == pytest.approx(mean, abs=1e-4)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found.summary


def scores(*pairs: tuple[int, int]) -> list[Score]:
    from future_l1_plugin.data.records import Frame, Text, TwiffRecord

    reasoning = (Text("it moves"), Frame(5), Text("so"))
    return [
        Score(TwiffRecord(f"r{i}", "v.mp4", "<image>\nWhere?", [1], reasoning, "there"), *pair)
        for i, pair in enumerate(pairs)
    ]


def test_the_rule_by_hand():
    made = scores((0, 8), (6, 8), (7, 8), (6, 7), (2, 1), (0, 2), (4, 8))
    taken = select(made, Selection(size=3, rl_sizes=[2, 4]))
    assert [(s.text, s.visual) for s in taken.sft[:2]] == [(0, 8), (4, 8)]
    assert taken.sft[2].gain == 2 and len(taken.random) == 3  # one of two with a gain of 2
    others = {s.record.id for s in made} - {s.record.id for s in taken.sft}
    assert {s.record.id for s in taken.rl[4]} == others and taken.rl[2] == taken.rl[4][:2]
    assert taken == select(list(reversed(made)), Selection(size=3, rl_sizes=[2, 4]))  # order of records is no matter
    assert len(select(made, Selection(size=9)).sft) == 4  # all that pass
    none = select(scores((7, 8), (0, 1)), Selection(rl_sizes=[]))
    assert none.sft == none.random == [] and "0 records pass" in none.notes[0]


def test_records_without_the_format_are_not_for_rl():
    good, bad = scores((8, 8), (8, 8))
    bad = dataclasses.replace(bad, record=dataclasses.replace(bad.record, reasoning=bad.record.reasoning[:2]))
    assert select([good, bad], Selection(rl_sizes=[1, 2])).rl == {1: [good]}  # a span must be followed by a thought


def test_the_random_control_is_drawn_from_all_records_alike():
    made = scores(*[(0, 8)] * 20, *[(8, 8)] * 20)
    drawn = [select(made, Selection(size=10, rl_sizes=[], seed=seed)).random for seed in range(40)]
    share = sum(s.gain == 0 for group in drawn for s in group) / 400
    assert 0.4 < share < 0.6


def test_records_that_ask_the_same_share_their_answers(world, recipe, tmp_path):
    rows = json.loads(world.sft.read_text())
    rows.append({**rows[3], "id": "asks the same"})
    (tmp_path / "twice.json").write_text(json.dumps(rows))
    found = curate(recipe(f"data.records={tmp_path / 'twice.json'}"))
    assert [(s.text, s.visual) for s in (found.scores[3], found.scores[-1])] == [plan(3)] * 2


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_future_frames_stand_behind_those_of_the_question(world):
    record = next(r for r in load_records(world.sft, world.videos) if len(r.reasoning_image) == 2)
    shown = content_of(twiff_prompt(record, "images", future=True))
    assert [p["type"] for p in shown].count("image_url") == len(record.image) + 2
    text = "".join(p.get("text", "*") for p in shown)
    labels = re.findall(r"frame_(\d+)\n\*", text)
    assert list(map(int, labels)) == record.image + record.reasoning_image
    assert text.index("frame_" + labels[-1]) < text.index("Where")
    clip = twiff_prompt(record, "video", future=True)
    assert clip.frames == Pool((*record.image, *record.reasoning_image)) and "<image>" not in clip.question
    assert twiff_prompt(record, "video").question == clip.question


def test_pixels_reach_the_endpoint_unchanged(world):
    import base64
    import io

    import numpy as np

    from future_l1_plugin.data import read_frames

    record = load_records(world.sft, world.videos)[0]
    parts = [p for p in content_of(twiff_prompt(record, "images")) if p["type"] == "image_url"]
    frames = read_frames(record.video, pool=record.image).frames
    for part, frame in zip(parts, frames, strict=True):
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), frame)


def test_an_instruction_is_added_only_where_the_question_has_none(recipe):
    curation = Curation(recipe("rollouts.instruction=' Be brief.'"))
    _, _, attempt = next(curation.attempts(curation.records))
    assert "Be brief" not in attempt.prompt.question
    record = dataclasses.replace(curation.records[0], question="<image>\nWhere does it go?")
    _, _, attempt = next(curation.attempts([record]))
    assert attempt.prompt.question.endswith("Where does it go? Be brief.")


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_asks_nothing_and_another_selection_costs_nothing(recipe, server, tmp_path):
    curate(recipe())
    asked, before = len(server.asked), contents(tmp_path / "out")
    curate(recipe())
    assert len(server.asked) == asked and contents(tmp_path / "out") == before
    assert len(curate(recipe("select.size=4")).selected.sft) == 4
    assert len(server.asked) == asked
    curate(recipe("rollouts.seed=0", "rollouts.max_new_tokens=33"))  # other answers
    assert len(server.asked) == 2 * asked


def test_shards_make_what_one_run_makes(recipe, server, tmp_path):
    curate(recipe())
    asked = len(server.asked)
    assert curate(recipe(output="shared"), (1, 3)) is None
    assert curate(recipe(output="elsewhere"), (2, 3)) is None and curate(recipe(output="elsewhere"), (3, 3)) is None
    with pytest.raises(DataError, match="answers are missing"):
        curate(recipe(output="shared"), only_select=True)
    for file in (tmp_path / "elsewhere").glob("rollouts*.jsonl"):
        shutil.copy(file, tmp_path / "shared")
    curate(recipe(output="shared"), only_select=True)
    assert len(server.asked) == 2 * asked
    assert contents(tmp_path / "shared") == contents(tmp_path / "out")


def test_an_endpoint_that_is_away_for_a_while(recipe, server, tmp_path):
    curate(recipe())
    server.broken = 30
    curate(recipe("endpoint.max_retries=40", output="again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_an_endpoint_that_is_gone_stops_the_run_and_keeps_what_came(recipe, server, tmp_path):
    curate(recipe())
    once = len(server.asked)
    answers = [0]

    def dies_after_forty(handler, content, body, answer=Model.answer):
        answers[0] += 1
        if answers[0] == 40:
            server.broken = 10**6
        return answer(handler, content, body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "answer", dies_after_forty)
        with pytest.raises(EndpointError, match=r"20 requests in a row got no reply.*HTTP 503"):
            curate(recipe("endpoint.max_retries=0", output="again"))
    server.broken = 0
    kept = len((tmp_path / "again" / "rollouts.jsonl").read_text().splitlines())
    assert 40 <= kept < once
    curate(recipe(output="again"))
    assert len(server.asked) <= 2 * once + 8 and contents(tmp_path / "again") == contents(tmp_path / "out")


def test_killed_again_and_again_it_ends_as_an_unbroken_run(recipe, server, tmp_path):
    curate(recipe())
    once = len(server.asked)
    other = recipe(output="killed")
    from future_l1_plugin.config import save_recipe

    save_recipe(other, tmp_path / "killed.yaml")
    server.delay = 0.02
    command = [sys.executable, "-m", "future_l1_plugin.cli", "curate", str(tmp_path / "killed.yaml")]
    journal = tmp_path / "killed" / "rollouts.jsonl"
    rng, killed = random.Random(0), 0
    while killed < KILLS:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # From here on by its own progress: starting up takes longer than the whole work of this test.
        before, until = journal.stat().st_size if journal.exists() else 0, rng.randrange(1, 2500)
        while process.poll() is None and (not journal.exists() or journal.stat().st_size < before + until):
            time.sleep(0.001)
        process.kill()
        process.wait()
        killed += 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "out")
    assert len(server.asked) <= 2 * once + KILLS * 8  # only what was under way at a kill is asked again


# -- judge -------------------------------------------------------------------------------------------------------------


def test_what_no_rule_decides_goes_to_the_judge_once(recipe, server, tmp_path, monkeypatch):
    server.wordy = True
    free = "future_l1_plugin.data.curation_answers.twiff_prompt"
    monkeypatch.setattr(free, lambda *a: dataclasses.replace(twiff_prompt(*a), options=None, kind="text"))
    found = curate(recipe())
    assert found.summary["undecided_counted_wrong"] == found.summary["answers"] and server.judged == 0
    judge = f"judge={{base_url: '{server.url}', model: j, backoff_s: 0.01}}"
    found = curate(recipe(judge))
    assert [(s.text, s.visual) for s in found.scores] == [plan(i) for i in range(len(found.scores))]
    assert found.summary["undecided_counted_wrong"] == 0
    judged, asked = server.judged, len(server.asked)
    assert judged <= 2 * len(found.scores) * 2  # equal answers to one question are judged once
    curate(recipe(judge))
    assert (server.judged, len(server.asked)) == (judged, asked)
    (tmp_path / "out" / "verdicts.jsonl").unlink()
    with pytest.raises(DataError, match="verdict on an answer to record"):
        curate(recipe(judge), only_select=True)
    server.broken = 10**6
    with pytest.raises(DataError, match="the judge gave no verdict on"):
        curate(recipe(judge[:-1] + ", max_retries: 0, on_failure: drop_group}"))


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def attempts(world):
    prompts = [twiff_prompt(r, "video", future) for r in load_records(world.sft, world.videos)[:2] for future in (0, 1)]
    return [Attempt(f"{i}-{sample}", prompt, sample) for i, prompt in enumerate(prompts) for sample in range(3)]


def transformers(path, seed=0, batch_size=4):
    """An answerer in this process."""
    engine = TransformersEngine(partial(load_any, str(path), "cpu"))
    return LocalAnswerer(engine, str(path), "auto", Decoding(8, temperature=1.0), seed, batch_size)


def run(answerer, attempts, stored, most=10**9):
    """Store answers until there are `most`, as a kill would have it."""

    class Killed(Exception):
        pass

    def store(pairs):
        for attempt, answer in pairs:
            if len(stored) == most:
                raise Killed
            stored[attempt.key] = answer

    with contextlib.suppress(Killed):
        assert answerer.run(attempts, lambda attempt: attempt.key in stored, store) == []
    return stored


def test_a_batch_that_was_half_stored_is_made_again_the_same(tiny_path, attempts):
    answerer = transformers(tiny_path)
    whole = run(answerer, attempts, {})
    assert len(whole) == 12 and len(set(whole.values())) > 6
    for most in (1, 6, 9):
        assert run(answerer, attempts, run(answerer, attempts, {}, most)) == whole
    assert run(transformers(tiny_path, seed=1), attempts, {}) != whole


def test_a_checkpoint_without_latents_answers_too(tiny_path, attempts, tmp_path):
    stock = tmp_path / "stock"
    shutil.copytree(tiny_path, stock)
    config = json.loads((stock / "config.json").read_text())
    latent = [key for key in config if "latent" in key or "projection" in key or key == "pool_after_proj"]
    assert "latent_id" in latent
    (stock / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in latent}))
    answerer = transformers(stock, batch_size=6)
    whole = run(answerer, attempts, {})
    assert len(whole) == 12 and run(answerer, attempts, run(answerer, attempts, {}, 7)) == whole
    assert answerer.identity() != transformers(tiny_path).identity()
    with pytest.raises(CheckpointError, match="expected a checkpoint folder or a hub id"):
        run(transformers(tmp_path / "none"), attempts, {})


# -- vLLM: answers are tested in tests/integrations/test_vllm_engines.py ----------------------------------------------


def test_what_an_answer_of_vllm_depends_on(tiny_path, attempts):
    """Neither speed nor memory; and where nothing is missing vLLM is not asked for."""
    from future_l1_plugin.integrations.vllm.engine import VllmEngine

    def answerer(**args):
        path = str(tiny_path)
        return LocalAnswerer(VllmEngine(path, args), path, "auto", Decoding(8, temperature=1.0), seed=0)

    assert answerer(max_num_seqs=4).identity() == answerer(tensor_parallel_size=2).identity()
    assert answerer(quantization="fp8").identity() != answerer().identity()
    assert answerer().run(attempts, lambda attempt: True, print) == []
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(EnvironmentMismatch, match="vllm is not installed"):
            answerer().run(attempts, lambda attempt: False, print)


# -- command and bad input ---------------------------------------------------------------------------------------------


def test_the_command_prints_and_draws(recipe, tmp_path, capsys):
    from future_l1_plugin.config import save_recipe

    save_recipe(recipe(), tmp_path / "r.yaml")
    assert main(["curate", str(tmp_path / "r.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "sft.jsonl" in printed and "without the future frames" in printed and "rl_1000.jsonl: not written" in printed
    width = Image.open(tmp_path / "out" / "curation.png").size[0]
    assert main(["curate", str(tmp_path / "r.yaml"), "--shard", "1/2"]) == 0
    assert "shard 1/2 is done" in capsys.readouterr().out
    curated = curate(recipe())
    kinds = [{"meta_data": {"classification": kind}} for kind in ("sport", "cooking")]
    mixed = [
        dataclasses.replace(s, record=dataclasses.replace(s.record, extras=kinds[i % 2]))
        for i, s in enumerate(curated.scores)
    ]
    plot_curation(dataclasses.replace(curated, scores=mixed), N, tmp_path)
    assert Image.open(tmp_path / "curation.png").size[0] > width  # one more panel, for the classes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollouts.engine=sglang"], "expected one of hf, vllm, endpoint"),
        (["rollouts.engine=hf"], "hf.model must be given"),
        (["rollouts.engine=vllm"], "vllm.model must be given"),
        (["vllm.arg={}"], "unknown key `vllm.arg`"),
        (["rollouts.temperature=0"], "greedy answers are all alike"),
        (["rollouts.n=0"], "rollouts.n: expected at least 1"),
        (["select.least_gain=0"], "select.least_gain: expected at least 1"),
        (["endpoint=null"], "endpoint must be given"),
        (["endpoint.temperature=0.5"], "set rollouts.temperature instead"),
        (["endpoint.modle=m"], "unknown key `modle`"),
        (["judge={modle: j}"], "unknown key `modle`"),
        (["selct.size=3"], "unknown key `selct`"),
    ],
)
def test_wrong_settings_name_the_key(recipe, overrides, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        recipe(*overrides)


def test_wrong_use(recipe, world, tmp_path, capsys):
    with pytest.raises(ConfigError, match="expected I/N with 1 <= I <= N"):
        Curation(recipe(), (3, 2))
    with pytest.raises(ConfigError, match="takes no frames of a video"):
        curate(recipe("data.question_media=video"))
    rows = json.loads(world.sft.read_text())
    for row in rows:
        row["reasoning_image"] = []
        row["conversations"][1]["value"] = row["conversations"][1]["value"].replace("<image>", "")
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="no record has frames in both"):
        Curation(recipe(f"data.records={tmp_path / 'plain.json'}"))
    from future_l1_plugin.config import save_recipe

    save_recipe(recipe(), tmp_path / "r.yaml")
    assert main(["curate", str(tmp_path / "r.yaml"), "--shard", "two"]) == 2
    assert "--shard two: expected I/N" in capsys.readouterr().err


def test_shipped_recipes_parse(repository):
    full = load_recipe(repository / "recipes" / "curate.yaml", CurationRecipe, [])
    assert (full.rollouts.n, full.select.most_text, full.select.least_gain, full.select.size) == (8, 6, 2, 50_000)
    assert full.endpoint_settings().model == "Qwen/Qwen3-VL-8B-Instruct"
    micro = load_recipe(repository / "recipes" / "curate_micro.yaml", CurationRecipe)
    assert micro.rollouts.engine == "hf" and micro.endpoint is None
