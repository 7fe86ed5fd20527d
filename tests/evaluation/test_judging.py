"""`future-l1 judge` against the rule-based judge of scripts/, a real HTTP server, with faults put in its way."""

import importlib.util
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from http_stand_in import StandIn, no_key_no_proxy, serving

from future_l1_plugin.cli import main
from future_l1_plugin.data import make_world
from future_l1_plugin.data.twiff_world import make_twiffbench
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.evaluation import judging
from future_l1_plugin.evaluation.judging import agreement, metrics, too_many
from future_l1_plugin.evaluation.twiffbench import judge_message, load_items

N = 48
QUICK = {"timeout_s": 30.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "max_retries": 6, "max_concurrency": 8}


# ---- answers and servers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro_judge(repository):
    spec = importlib.util.spec_from_file_location("micro_judge", repository / "scripts" / "micro_judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"), test=N, train=0, progress=False)
    return load_items(make_twiffbench(world.root, N), world.root / "pictures")


def response(i: int, item) -> str:
    """Told are 0 to 4 of the seen cells; two answers of three are right."""
    seen = item.chain.split(":")[2].split("\n")[0].split(",")
    return f"<reason>the shape:{','.join(seen[: i % 5])}</reason><answer>{item.answer if i % 3 else 'zz'}</answer>"


def expected(i: int) -> tuple[float, float]:
    return 5 * (i % 5) / 4, 5.0 if i % 3 else 0.0


@pytest.fixture
def run(items, tmp_path) -> Path:
    """What lmms-eval leaves: results and samples of 48 answers."""
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    (folder / "1_results.json").write_text(json.dumps({"results": {"twiffbench": {}}}))
    samples = [
        {"doc_id": i, "judged": {"item": asdict(item), "response": response(i, item)}} for i, item in enumerate(items)
    ]
    (folder / "1_samples_twiffbench.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


@pytest.fixture
def server(micro_judge, monkeypatch):
    """The micro judge. `server.fault(number, prompt)` names the method that answers a request in place of its rules."""
    no_key_no_proxy(monkeypatch)

    class Handler(micro_judge.Handler):
        def reply(self, body):
            with served.lock:
                served.requests.append(body["model"])
                number = len(served.requests)
            prompt = "".join(part.get("text", "") for part in body["messages"][0]["content"])
            name = served.fault(number, prompt)
            getattr(self, name)(body) if name else super().reply(body)

        def stall(self, body):
            served.released.wait(20)
            self.close_connection = True

        def late(self, body):
            time.sleep(0.1)
            super().reply(body)

        def busy(self, body):
            self.send(429, '{"error": {"message": "slow down"}}')

        def broken(self, body):
            self.send(500, '{"error": {"message": "oops"}}')

        def refused(self, body):
            self.send(401, '{"error": {"message": "the key expired"}}')

        def not_json(self, body):
            self.send(200, "<html>proxy</html>")

        def no_object(self, body):
            self.say("I would give it four points.")

        def out_of_range(self, body):
            self.say('{"cot": 7, "answer": 3}')

        def contradicts(self, body):
            self.say('{"cot": 1, "answer": 3} or rather {"cot": 2, "answer": 3}')

        def empty(self, body):
            self.say("")

        def chinese(self, body):
            self.say("推理得四分，答案得三分。")

        def shifted(self, body):
            scores = micro_judge.judge("".join(part.get("text", "") for part in body["messages"][0]["content"]))
            self.say(json.dumps({"cot": scores["cot"] / 2, "answer": 5 - scores["answer"]}))

    with serving(StandIn(Handler)) as served:
        served.requests, served.fault = [], lambda number, prompt: None
        yield served


@pytest.fixture
def yaml(server, tmp_path):
    """Writes a file of judge settings."""

    def write(model: str = "m", **settings) -> str:
        file = tmp_path / f"{model}.yaml"
        file.write_text(json.dumps({"base_url": server.url, "model": model, **QUICK, **settings}))
        return str(file)

    return write


def judged(run: Path) -> dict:
    return json.loads((run / "1_twiffbench_judged.json").read_text())


def kept(run: Path) -> list[dict]:
    file = run / "1_twiffbench_judgements.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- scores, faults, resumption -------------------------------------------------------------------------------------


FAULTS = (
    *("stall", "busy", "broken", "not_json", "no_object", "out_of_range"),
    *("contradicts", "empty", "chinese", "late"),
)


def test_scores_and_files_and_that_faults_change_none(run, yaml, server, capsys):
    assert main(["judge", str(run.parent), "--judge", yaml()]) == 0
    clean = (run / "1_twiffbench_judged.json").read_bytes()
    found = judged(run)["judges"]["m"]
    assert len(server.requests) == N == found["n"] == found["judged"] and found["failures"] == {}
    assert found["cot"]["mean"] == pytest.approx(sum(expected(i)[0] for i in range(N)) / N)
    assert found["answer"]["mean"] == pytest.approx(sum(expected(i)[1] for i in range(N)) / N)
    assert found["average"]["mean"] == pytest.approx((found["cot"]["mean"] + found["answer"]["mean"]) / 2)
    assert sum(group["n"] for group in found["by_class"].values()) == N and len(found["by_class"]) > 2
    assert f"{found['average']['mean']:.2f} ±" in capsys.readouterr().out

    (run / "1_twiffbench_judgements.jsonl").unlink()
    server.requests.clear()
    server.fault = lambda number, prompt: FAULTS[number // 5 % len(FAULTS)] if number % 5 == 0 else None
    assert main(["judge", str(run.parent), "--judge", yaml(timeout_s=2.0)]) == 0
    assert len(server.requests) > N * 1.1
    assert (run / "1_twiffbench_judged.json").read_bytes() == clean


def test_only_what_failed_is_judged_again(run, yaml, server, items, capsys):
    questions = [items[i].question.split("<image>\n")[-1] for i in (3, 20)]
    server.fault = lambda number, prompt: "no_object" if any(text in prompt for text in questions) else None
    assert main(["judge", str(run.parent), "--judge", yaml(max_retries=1)]) == 1
    found, printed = judged(run)["judges"]["m"], " ".join(capsys.readouterr().out.split())
    assert set(found["failures"]) == {items[3].id, items[20].id}
    assert "found it 0 times" in found["failures"][items[3].id]
    assert (found["n"], found["judged"]) == (N, N - 2) and found["judge_failure_rate"] == pytest.approx(2 / N)
    rest = [expected(i)[0] for i in range(N) if i not in (3, 20)]
    assert found["cot"]["mean"] == pytest.approx(sum(rest) / len(rest))
    assert "m: 2 items have no scores and are in no mean; more than 1%: the run has FAILED" in printed
    assert f"{items[20].id}: sample" in printed

    server.requests.clear()
    server.fault = lambda number, prompt: None
    assert main(["judge", str(run.parent), "--judge", yaml()]) == 0
    assert len(server.requests) == 2 and judged(run)["judges"]["m"]["failures"] == {}
    assert main(["judge", str(run.parent), "--judge", yaml()]) == 0
    assert len(server.requests) == 2, "a finished run asks for nothing"


def test_a_judge_that_is_gone_stops_the_run_and_loses_nothing(run, yaml, server, capsys):
    server.fault = lambda number, prompt: "broken" if number > 20 else None
    samples = (run / "1_samples_twiffbench.jsonl").read_bytes()
    assert main(["judge", str(run.parent), "--judge", yaml(max_retries=1)]) == 2
    error = capsys.readouterr().err
    assert "20 answers in a row got no scores; the last: sample micro-test-" in error and "HTTP 500" in error
    assert (run / "1_samples_twiffbench.jsonl").read_bytes() == samples
    assert len(kept(run)) == 20 and not (run / "1_twiffbench_judged.json").exists()
    with open(run / "1_twiffbench_judgements.jsonl", "ab") as file:
        file.write(b'{"key": "cut o')  # as if killed while writing
    server.requests.clear()
    server.fault = lambda number, prompt: None
    assert main(["judge", str(run.parent), "--judge", yaml()]) == 0
    assert len(server.requests) == N - 20


def test_an_expired_key_stops_at_once(run, yaml, server, capsys):
    server.fault = lambda number, prompt: "refused" if number > 10 else None
    assert main(["judge", str(run.parent), "--judge", yaml()]) == 2
    error = capsys.readouterr().err
    assert "the key expired" in error and "Put a valid one into api_key_file" in error
    at_once = QUICK["max_concurrency"]
    assert len(server.requests) <= 10 + 2 * at_once
    assert 10 - at_once <= len(rows := kept(run)) <= 10  # those under way at that moment are asked for again
    server.requests.clear()
    server.fault = lambda number, prompt: None
    assert main(["judge", str(run.parent), "--judge", yaml()]) == 0
    assert len(server.requests) == N - len(rows)


def test_two_judges_and_their_agreement(run, yaml, server, capsys):
    server.fault = lambda number, prompt: "shifted" if server.requests[number - 1] == "strict" else None
    assert main(["judge", str(run.parent), "--judge", yaml("kind"), "--judge", yaml("strict")]) == 0
    found = judged(run)
    kind, strict = found["judges"]["kind"], found["judges"]["strict"]
    assert strict["cot"]["mean"] == pytest.approx(kind["cot"]["mean"] / 2, abs=0.01)
    agreed = found["agreement"]["kind | strict"]
    assert agreed["n"] == N
    assert agreed["cot"]["pearson"] == pytest.approx(1.0) and agreed["answer"]["pearson"] == pytest.approx(-1.0)
    assert agreed["answer"] == {"pearson": pytest.approx(-1.0), "mean_abs_difference": 5.0, "within_1": 0.0}
    assert agreed["cot"]["within_1"] == pytest.approx(sum(expected(i)[0] / 2 <= 1 for i in range(N)) / N)
    assert "kind | strict, cot: Pearson 1.00" in capsys.readouterr().out
    server.requests.clear()
    assert main(["judge", str(run.parent), "--judge", yaml("kind")]) == 0
    assert server.requests == [], "each judge's scores are kept"


# ---- wrong calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected either --judge YAML"),
        (["--judge", "a.yaml", "--model", "m"], "expected either --judge YAML"),
        (["--judge", "a.yaml", "--base-url", "http://x/v1"], "expected either --judge YAML"),
        (["--judge", "absent.yaml"], "absent.yaml: no such recipe"),
        (["--model", "m"], "wants a key"),
    ],
)
def test_wrong_flags(run, flags, message, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["judge", str(run.parent), *flags]) == 2
    assert message in capsys.readouterr().err


def test_wrong_settings_and_folders(run, yaml, tmp_path, capsys):
    file = yaml("m", modell="x")
    assert main(["judge", str(run.parent), "--judge", file]) == 2
    assert "unknown key `modell`" in capsys.readouterr().err
    assert main(["judge", str(run.parent), "--judge", yaml("m"), "--judge", yaml("m")]) == 2
    assert "judges with different models, found m, m" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["judge", str(tmp_path / "empty"), "--judge", yaml("m")]) == 2
    assert "no *_results.json" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="found none"):
        judging.judge_run(run, [])


def test_a_picture_that_is_gone_is_named(run, yaml):
    file = run / "1_samples_twiffbench.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    samples[5]["judged"]["item"]["chain_images"][0] += ".gone"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    with pytest.raises(DataError, match=r"\.png\.gone: a picture that lmms-eval saw is gone"):
        judging.judge_run(run, [judging.load_recipe(yaml(), judging.EndpointSettings)])


# ---- numbers by hand ------------------------------------------------------------------------------------------------


def scored(cot: float, answer: float, video: str, classification: str = "", **more) -> dict:
    return {"id": video, "video": video, "classification": classification, "cot": cot, "answer": answer, **more}


def test_metrics_by_hand():
    failed = {"id": "f", "video": "w", "classification": "b", "failure": "away"}
    found = metrics([scored(1, 2, "u", "a"), scored(4, 2, "v", "a"), scored(1, 5, "v", "b"), failed])
    assert (found["n"], found["judged"], found["judge_failure_rate"]) == (4, 3, 0.25)
    assert found["failures"] == {"f": "away"}
    # cot 1, 4, 1: mean 2, errors -1, 2, -1, s^2 = 3, and v holds 2 and -1: 3/3 + 2 * 2 * -1 / 9 = 5/9
    assert found["cot"] == {"mean": 2.0, "stderr": pytest.approx(math.sqrt(5) / 3)}
    assert found["answer"]["mean"] == 3.0 and found["average"]["mean"] == 2.5
    assert found["by_class"]["b"] == {
        "n": 2,
        "judged": 1,
        "judge_failure_rate": 0.5,
        "cot": {"mean": 1, "stderr": None},
        "answer": {"mean": 5, "stderr": None},
        "average": {"mean": 3.0, "stderr": None},
    }
    assert metrics([failed])["cot"] == {"mean": None, "stderr": None}


def test_agreement_by_hand():
    ours = [scored(0, 3, "u"), scored(2, 3, "v"), scored(4, 3, "w"), scored(5, 5, "x")]
    theirs = [scored(1, 3, "u"), scored(2, 4, "v"), scored(3, 5, "w"), {"id": "x", "failure": "away"}]
    found = agreement(ours, theirs)
    assert found == {
        "n": 3,
        "cot": {"pearson": pytest.approx(1.0), "mean_abs_difference": pytest.approx(2 / 3), "within_1": 1.0},
        "answer": {"pearson": None, "mean_abs_difference": 1.0, "within_1": pytest.approx(2 / 3)},
    }
    assert agreement([], []) == {"n": 0}


def test_more_than_one_percent_is_too_many():
    assert not too_many(0, 5) and not too_many(10, 1000)
    assert too_many(11, 1000) and too_many(1, 99)


def test_the_rules_of_the_micro_judge(micro_judge, items):
    item = items[0]
    wrong = next(text for text in ("aw", "bx") if text != item.answer)
    letter = next(line[0] for line in item.question.splitlines() if line.endswith(f". {item.answer}"))
    cases = {
        f"<answer>{item.answer}</answer>": 5.0,
        f"<answer>{letter}</answer>": 5.0,
        f"<answer>It is at {item.answer}.</answer>": 5.0,
        f"<answer>{wrong}</answer>": 0.0,
        "<answer>A or B</answer>": 0.0,
        f"it is at {item.answer}": 0.0,
        "": 0.0,
    }
    for text, score in cases.items():
        prompt = "".join(part for part in judge_message(item, text) if isinstance(part, str))
        assert micro_judge.judge(prompt) == {"cot": 0.0, "answer": score}, text
