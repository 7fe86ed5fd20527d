"""What replaces latents, what was recorded of them, and the whole probe through its command and lmms-eval itself."""

import json

import pytest
import torch
from made import opening_checkpoint

from future_l1_plugin import cli
from future_l1_plugin.data import load_records, make_world
from future_l1_plugin.data.sft import SftCollator, SftDataset
from future_l1_plugin.errors import ConfigError, DataError
from future_l1_plugin.evaluation.compare import Sample
from future_l1_plugin.evaluation.interventions import (
    Intervention,
    derangement,
    noised,
    packed,
    recorded_spans,
    replayed,
    split_spans,
    unpacked,
    zeroed,
)
from future_l1_plugin.evaluation.probe import BUDGETS, SPOILT, replacements
from future_l1_plugin.evaluation.probe_latents import by_hop, frame_features, nearest, retrieval
from future_l1_plugin.integrations.lmms_eval.probe import ProbedModel
from future_l1_plugin.latent.tokens import END, LATENT, START, LatentTokens
from future_l1_plugin.model import LatentConfig, load
from future_l1_plugin.model.engine import Answer, TransformersEngine
from future_l1_plugin.model.objective import latent_targets
from future_l1_plugin.model.tiny import MICRO_BASE, copy_micro_base
from future_l1_plugin.paths import lmms_tasks_dir

TOKENS = LatentTokens(7, 8, 9)
QUESTIONS = 4


def span(length: int) -> str:
    return START + LATENT * length + END


# ---- what replaces latents ------------------------------------------------------------------------------------------


def test_replacements_know_row_span_and_position():
    seen = []

    def note(mu, number, position):
        seen.append((number, position))
        return -mu

    policy = Intervention(TOKENS, [note, None])
    mu = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # Row 0: text, start, two latents, end, start, one latent. Row 1 stays in text.
    for token in (1, 8, 7, 7, 9, 8, 7):
        z = policy.sample(mu)
        assert torch.equal(z[1], mu[1])
        policy.see(torch.tensor([token, 1]), torch.tensor([token == 7, False]))
    # Asked before each token but the first two, which no span has begun for.
    assert seen == [(0, 0), (0, 1), (0, 2), (0, 2), (1, 0)]
    assert torch.equal(policy.sample(mu)[0], -mu[0]) and seen[-1] == (1, 1)


def test_zeros_and_noise():
    mu = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert not zeroed(mu, 0, 0).any()
    noise = noised(0, "q")(mu, 0, 0)
    assert float(noise.norm()) == pytest.approx(float(mu.norm()), rel=1e-5)
    assert abs(torch.cosine_similarity(noise, mu, dim=0)) < 0.5
    assert torch.equal(noise, noised(0, "q")(mu, 0, 0))
    others = [noised(1, "q")(mu, 0, 0), noised(0, "r")(mu, 0, 0), noised(0, "q")(mu, 1, 0), noised(0, "q")(mu, 0, 1)]
    assert not any(torch.allclose(noise, other) for other in others)


def test_replay_begins_again_where_the_recording_ends():
    replace = replayed([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])])
    fed = [[float(replace(torch.zeros(1), number, position)) for position in range(3)] for number in range(3)]
    assert fed == [[1, 2, 1], [3, 3, 3], [1, 2, 1]]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_derangements_move_everything(n):
    orders = [derangement(n, seed) for seed in range(20)]
    for order in orders:
        assert sorted(order) == list(range(n)) and all(i != j for i, j in enumerate(order))
    assert n == 2 or len({tuple(order) for order in orders}) > 1
    assert derangement(n, 3) == derangement(n, 3)


def test_who_gets_what():
    recorded = {
        0: [torch.full((2, 1), 0.0), torch.full((2, 1), 1.0)],
        1: [torch.full((2, 1), 2.0)],
        2: [],
        3: [torch.full((2, 1), 3.0)],
    }
    mu = torch.full((1,), 9.0)

    def fed(condition):
        return {doc: replace(mu, 0, 0).item() for doc, replace in replacements(condition, recorded, 0).items()}

    assert fed("shuffled") == {0: 1.0}  # the only response with two spans
    swapped = fed("swapped")
    assert swapped.keys() == {0, 1, 3} and sorted(swapped.values()) == [0, 2, 3]
    assert swapped[0] != 0 and swapped[1] != 2 and swapped[3] != 3
    assert fed("zeroed").keys() == fed("noise").keys() == recorded.keys()
    assert replacements("swapped", {0: recorded[0]}, 0) == {}


# ---- recordings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 3])
def test_recordings_keep_every_bit(dtype, k):
    latents = torch.randn(k, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    back = unpacked(json.loads(json.dumps(packed(latents))))
    assert back.dtype == dtype and torch.equal(back, latents)


def test_spans_of_a_recording():
    latents = torch.arange(3.0)[:, None]
    text = f"a{span(2)}b{span(0)}{START}{LATENT}"  # the last was cut off by the length
    assert [s.tolist() for s in split_spans(text, latents)] == [[[0], [1]], [[2]]]
    assert split_spans("no span", latents[:0]) == []
    with pytest.raises(DataError, match=r"expected 3 latents in the text, found 1.*until"):
        split_spans(span(1), latents)


def test_counts_and_cosines_by_hand():
    def row(doc, text, latents, output_tokens):
        return {"doc_id": doc, "text": text, "latents": packed(torch.tensor(latents)), "output_tokens": output_tokens}

    texts = [f"x{span(1)}{span(2)}", f"x{span(1)}", "x"]
    # Means (1, 0) and (1, 1): cosine 1/sqrt(2).
    rows = [
        row(0, texts[0], [[1.0, 0.0], [2.0, 0.0], [0.0, 2.0]], 10),
        row(1, texts[1], [[1.0, 0.0]], 8),
        row(2, texts[2], torch.empty(0, 2).tolist(), 5),
    ]
    samples = [Sample(i, kind, True, texts[i]) for i, kind in enumerate(("hop1", "hop1", "hop2"))]
    hop1, hop2, every = by_hop(rows, samples)
    assert hop1["adjacent_cosine"] == pytest.approx(2**-0.5) and hop1["two_spans"] == 1
    assert (hop1["responses"], hop1["spans"], hop1["latents"]) == (2, 1.5, 2.0)
    assert hop1["text_tokens"] == ((10 - 3 - 4) + (8 - 1 - 2)) / 2
    assert (hop2["spans"], hop2["text_tokens"], hop2["adjacent_cosine"]) == (0, 5, None)
    assert every["question_type"] == "all" and every["responses"] == 3 and every["spans"] == 1


# ---- future frames in latents ---------------------------------------------------------------------------------------


def test_nearest_by_cosine_and_a_tie_is_no_hit():
    frames = {"a": torch.tensor([10.0, 1.0]), "b": torch.tensor([0.0, 1.0]), "a again": torch.tensor([20.0, 2.0])}
    mean = torch.tensor([1.0, 0.0])
    assert nearest(mean, "a", ["b"], frames) == 1.0
    assert nearest(mean, "b", ["a"], frames) == 0.0
    assert nearest(mean, "a", ["b", "a again"], frames) == 0.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "world", 16, 32, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The micro base, made to begin each response with a latent span of at most 3."""
    return opening_checkpoint(MICRO_BASE, tmp_path_factory.mktemp("checkpoint") / "micro", loose_latent_budget=3)


def test_retrieval_finds_frames_where_they_are(world, checkpoint, monkeypatch):
    """Responses whose latents are the training targets themselves, then those of the last frame that was shown."""
    model, processor = load(checkpoint, dtype=torch.float32)
    config = LatentConfig.from_hf(model.config)
    records = list(load_records(world.sft, world.videos))
    dataset, collator = SftDataset(records), SftCollator(processor, config)

    def future(sample):
        return latent_targets(model, config, collator([sample]))[0]

    def shown(sample):
        last = frame_features(model, processor, config, [sample.question_clip.frames[-1]])[0]
        return last.expand(4 * len(sample.future.frames), -1)

    def answering(latents_of):
        def answer(request):
            sample, prompt = dataset[request.key], processor.tokenizer.decode(request.prompt_ids)
            assert prompt.endswith("<|im_start|>assistant\n"), "the prompt holds its response"
            assert LATENT not in prompt.split("<|im_start|>user")[1]
            latents = latents_of(sample)
            return Answer(span(4) * len(sample.future.frames), [], len(request.prompt_ids), len(latents), 0.0, latents)

        engine = TransformersEngine(lambda: (model, processor))
        monkeypatch.setattr(engine, "_decode", lambda requests: list(map(answer, requests)))
        return engine

    found = retrieval(answering(future), records, pool=8)
    assert found.records == len(records) and found.spans == sum(len(r.reasoning_image) for r in records)
    assert found.pool.value == 1.0 and found.pool_chance == 1 / 8
    # Compression lets a shape that comes back to a cell differ by a pixel: two frames, one feature.
    assert found.same_clip.value > 0.9 and 0.12 < found.same_clip_chance < 0.35

    found = retrieval(answering(shown), records, pool=8)
    assert found.same_clip.value < 0.1 and 0 < found.pool.value < 1  # the scene is right, the time is not
    with pytest.raises(DataError, match="a pool of 500 needs 499 future frames"):
        retrieval(answering(shown), records, pool=500)


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(world, monkeypatch):
    monkeypatch.setenv("FUTUREBENCH_DATA", str(world.futurebench))
    monkeypatch.setenv("FUTUREBENCH_VIDEO_DIR", str(world.videos))


def test_probe_through_lmms_eval(benchmark, world, checkpoint, tmp_path, monkeypatch, capsys):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    out, length = tmp_path / "probe", "max_new_tokens=40"
    command = ["probe", "--model", str(checkpoint), "--limit", str(QUESTIONS), "--batch-size", "2", "--out", str(out)]
    command += ["--gen-kwargs", length, "--records", str(world.sft), "--videos", str(world.videos), "--pool", "4"]
    command += ["--model-args", "dtype=float32"]
    assert cli.main(command) == 0
    assert (out / "probe.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "probe.md").read_text()
    assert table in capsys.readouterr().out and "| left alone |" in table and "(chance 25.0)" in table
    numbers = json.loads((out / "probe.json").read_text())
    conditions = numbers["conditions"]
    assert list(conditions) == ["left alone", *SPOILT, *(f"budget {n}" for n in BUDGETS)]

    # Left alone is lmms-eval's result, to the digit and to the letter.
    tasks = TaskManager(include_path=str(lmms_tasks_dir()), include_defaults=False, model_name="future_l1")
    arguments = f"pretrained={checkpoint},dtype=float32,batch_size=2,responses={tmp_path / 'plain.jsonl'}"
    plain = simple_evaluate(
        model="future_l1",
        model_args=arguments,
        tasks=["futurebench"],
        task_manager=tasks,
        limit=QUESTIONS,
        gen_kwargs=length,
    )
    result, alone = plain["results"]["futurebench"], conditions["left alone"]["accuracy"]
    assert alone["value"] == result["future_acc,none"]
    assert alone["stderr"] == pytest.approx(result["future_acc_stderr_clustered,none"], rel=1e-9)
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    recorded = {row["doc_id"]: row for row in rows if "latents" in row}
    for sample in plain["samples"]["futurebench"]:
        row = recorded[sample["doc_id"]]
        assert row["text"] == sample["filtered_resps"][0]
        assert sum(map(len, recorded_spans(row))) == sample["token_counts"][0]["reasoning_tokens"] > 0

    # Each condition did what it says.
    assert len(rows) == QUESTIONS * len(conditions)
    touched = [conditions[name]["touched"] for name in conditions]
    assert touched[:3] == [None, QUESTIONS, QUESTIONS] and touched[4] == QUESTIONS and touched[5:] == [None] * 5
    latents = [row["latent_tokens"] for row in rows]
    each = [latents[i : i + QUESTIONS] for i in range(0, len(latents), QUESTIONS)]
    assert set(each[5]) == {0} and set(each[6]) <= {1, 2} and max(each[9]) > max(each[0])
    texts = [[row["text"] for row in rows[i : i + QUESTIONS]] for i in range(0, len(rows), QUESTIONS)]
    assert texts[1] != texts[0] and texts[2] != texts[0]  # zeros and noise reach the model

    # A broken-off probe goes on: half a file gives the same numbers, a whole one asks nothing.
    kept = (out / "answers.jsonl").read_text()
    (out / "answers.jsonl").write_text(kept[: len(kept) // 2])
    assert cli.main(command) == 0
    assert json.loads((out / "probe.json").read_text()) == numbers
    monkeypatch.setattr(ProbedModel, "_requests", lambda *args: pytest.fail("a question was asked again"))
    assert cli.main(command) == 0


def test_what_cannot_be_probed(benchmark, checkpoint, tmp_path, capsys):
    plain = copy_micro_base(tmp_path / "plain")
    command = [
        "probe",
        "--model",
        str(plain),
        "--limit",
        "1",
        "--gen-kwargs",
        "max_new_tokens=2",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(command) == 2
    assert "none of its 1 responses has a latent" in capsys.readouterr().err
    assert cli.main([*command[:-3], "temperature=1", "--out", str(tmp_path)]) == 2
    assert "expected greedy decoding" in capsys.readouterr().err
    assert cli.main([*command, "--model-args", "batch_size=4"]) == 2
    assert "batch_size follow from" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="deterministic policy"):
        ProbedModel(pretrained=str(plain), policy="vmf", policy_kwargs='{"kappa": 10}')
    with pytest.raises(ConfigError, match="expected engine=hf"):
        ProbedModel(pretrained=str(plain), engine="vllm")
