"""Paired differences by hand, and two folders of lmms-eval's files side by side."""

import json
import math

import numpy as np
import pytest

from future_l1_plugin import cli
from future_l1_plugin.errors import DataError
from future_l1_plugin.evaluation.compare import Sample, compare, paired
from future_l1_plugin.evaluation.statistics import clustered_stderr


def samples(marks, videos="abcdefgh"):
    return [
        Sample(i, "hop1", mark == "1", "", video=video)
        for i, (mark, video) in enumerate(zip(marks, videos, strict=False))
    ]


def test_paired_by_hand():
    found = paired(samples("1110"), samples("1001"))  # 0, 1, 1, -1
    assert (found.n, found.difference, found.gained, found.lost) == (4, 0.25, 2, 1)
    # Mean 1/4, variance (1/16 + 9/16 + 9/16 + 25/16) / 3 = 11/12, over 4 questions.
    assert found.stderr == pytest.approx(math.sqrt(11 / 48))
    assert found.interval == pytest.approx((0.25 - 1.959964 * found.stderr, 0.25 + 1.959964 * found.stderr))
    # The two middle ones share a video: 2 * 3/4 * 3/4 / 16 is added.
    shared = paired(samples("1110", "abbc"), samples("1001", "abbc"))
    assert shared.stderr == pytest.approx(math.sqrt(11 / 48 + 9 / 128))
    assert paired(samples("1"), samples("0")).interval is None


def test_the_clustered_error_is_lmms_eval_s():
    from lmms_eval.api.metrics import clustered_stderr as theirs

    rng = np.random.default_rng(0)
    values, clusters = rng.integers(0, 2, 50).astype(float).tolist(), [str(c) for c in rng.integers(0, 9, 50)]
    assert clustered_stderr(values, clusters) == pytest.approx(theirs(values, clusters))


def write_run(folder, marks, frames=32, data="d0", told=True, prompt="Where?", versions="1"):
    (folder / "model").mkdir(parents=True)
    model = {"frames": frames, "pixels": {}, "prompt": {"template": "t"}, "decoding": {"dtype": "auto"}}
    provenance = {"data": {"hash": data}, "model": model, "versions": {"torch": versions}}
    config = {
        "generation_kwargs": {"temperature": 0},
        "metadata": {"future_l1": provenance} if told else {"version": 1},
    }
    (folder / "model" / "1_results.json").write_text(json.dumps({"configs": {"futurebench": config}, "results": {}}))
    rows = [
        {
            "doc_id": i,
            "doc_hash": str(i),
            "input": prompt,
            "filtered_resps": "x",
            "future_acc": {
                "score": float(mark),
                "question_type": "hop1" if i < 2 else "hop2",
                "id": f"q{i}",
                "video": f"v{i}",
                "prediction": "A" if mark == "1" else None,
            },
        }
        for i, mark in enumerate(marks)
    ]
    (folder / "model" / "1_samples_futurebench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_two_folders(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", "1001"), write_run(tmp_path / "b", "1110", versions="2")
    found = compare(a, b)
    assert (found.all.difference, found.all.gained, found.all.lost) == (0.25, 2, 1)
    assert {kind: pair.difference for kind, pair in found.by_type.items()} == {"hop1": 0.5, "hop2": 0.0}
    assert [(x.id, x.correct, y.correct) for x, y in found.flips] == [
        ("q1", False, True),
        ("q2", False, True),
        ("q3", True, False),
    ]
    assert found.notes == ['versions: {"torch": "1"} and {"torch": "2"}']
    assert cli.main(["compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    assert "all: B minus A +25.0 ± 47.9 points, 95% interval -68.8 to +118.8" in printed
    assert "only B is right in 2, only A in 1" in printed
    assert "  q3 (hop2): A A, B no answer: A is right" in printed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"frames": 16}, "frames: 32 and 16"),
        ({"data": "d1"}, 'data: "d0" and "d1"'),
        ({"prompt": "When?"}, "prompts: 4 questions differ, the first is number 0"),
        ({"told": False}, "frames: 32 and not said"),
        ({"marks": "111"}, "questions: 4 and 3, 3 of them in both"),
    ],
)
def test_what_was_not_asked_the_same_is_refused(tmp_path, capsys, change, why):
    a, b = write_run(tmp_path / "a", "1001"), write_run(tmp_path / "b", **{"marks": "1110", **change})
    with pytest.raises(DataError, match=f"not asked the same.*(?s:.*){why}"):
        compare(a, b)
    assert cli.main(["compare", str(a), str(b)]) == 2
    assert why in capsys.readouterr().err
    assert cli.main(["compare", str(a), str(b), "--anyway"]) == 0
    assert f"NOT COMPARABLE: {why}" in capsys.readouterr().out
