"""Every form of SFT in two processes over gloo gives the run of one: one start of two "machines" with one process each.

Records differ: every second one shows nothing, so ranks have unlike batches.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from future_l1_plugin.data import make_world
from future_l1_plugin.integrations.sft.nodes import Nodes
from future_l1_plugin.integrations.sft.run import main
from future_l1_plugin.model import convert, make_tiny

SCRIPT = Path(__file__).with_name("sft_two_processes.py")
OWN = ("latent.own_share=1.0", "latent.own_passes=1")
#: Has a latent head; keys. Between them: every form, images and video, also what goes beside it.
FORMS = {
    "full": (False, ("data.question_media=video",)),
    "full, head": (True, ()),
    "lora": (False, ("train.lora.rank=4",)),
    "lora, head": (True, ("train.lora.rank=4", *OWN)),
    "own latents": (False, (*OWN, "train.train_vision=true")),
    "text only": (False, ("data.spans=false", "data.on_bad=skip")),
    "checkpointing": (True, ("train.gradient_checkpointing=true", *OWN)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[str]]:
    """Arguments of each form but its output: two steps of four samples, a sample a pass."""
    folder = tmp_path_factory.mktemp("runs")
    world = make_world(folder / "world", test=0, train=8, seed=0, progress=False)
    records = json.loads(world.sft.read_text())
    (folder / "like.json").write_text(json.dumps(records))
    for record in records[::2]:
        record["image"], record["reasoning_image"] = [], []
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "")
    (folder / "unlike.json").write_text(json.dumps(records))
    for record in records[1::4]:  # the header is whole, the frames are not
        clip = bytearray((world.videos / record["video"]).read_bytes())
        where = clip.index(b"mdat") + 4
        size = int.from_bytes(clip[where - 8 : where - 4], "big") - 8
        clip[where : where + size] = bytes(size)
        record["video"] = str(folder / f"{record['id']}.mp4")
        Path(record["video"]).write_bytes(clip)
    (folder / "broken.json").write_text(json.dumps(records))
    base = make_tiny(folder / "base", latent=False)
    convert(base, folder / "plain")
    convert(base, folder / "head", use_projection_head=True, projection_head_type="lvr")
    recipe = {
        "model": "-",
        "output": "-",
        "data": {"records": str(folder / "unlike.json"), "videos": str(world.videos), "max_length": 1024, "workers": 0},
        "train": {"max_steps": 2, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "max_grad_norm": 0.5},
        "eval": {"every": 2, "prompts": 3, "max_new_tokens": 8},
        "log": {"every": 1, "save_every": 0, "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    found = {}
    for name, (head, keys) in FORMS.items():
        found[name] = [str(folder / "run.yaml"), f"model={folder / ('head' if head else 'plain')}", *keys]
        if "data.question_media=video" in keys:  # a question without frames cannot be shown as one
            found[name] += [f"{section}.records={folder / 'like.json'}" for section in ("data", "eval")]
        if "data.on_bad=skip" in keys:
            found[name].append(f"data.records={folder / 'broken.json'}")
    return found


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory) -> Path:
    """A folder with the output of each form, trained in two processes on two "machines"."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "runs.json").write_text(json.dumps([[*keys, f"output={folder / name}"] for name, keys in runs.items()]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        started = []
        for rank in range(2):
            command = [sys.executable, *Nodes(2, rank, "127.0.0.1", port).torchrun(1), str(SCRIPT), "runs.json"]
            log = stack.enter_context((folder / f"{rank}.log").open("w"))
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            started.append(
                subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
            )
        try:
            codes = [process.wait(timeout=300) for process in started]
        finally:
            for process in started:
                if process.poll() is None:  # ranks that wait for each other
                    os.killpg(process.pid, signal.SIGKILL)
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    return folder


def losses(output: Path) -> list[tuple[float, float, int]]:
    """Both losses of each step, and how many records had failed by then, in whichever process."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["ce_loss"], row["latent_loss"], row.get("failed_records", 0)) for row in rows if "loss" in row]


def evaluated(output: Path) -> dict[str, float]:
    """Losses of the held-out records, and the spans in answers: three prompts, shared by the processes."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    ends = ("eval_loss", "eval_ce_loss", "eval_latent_loss", "per_response", "empty_spans", "per_span")
    return {key: value for row in rows for key, value in row.items() if key.endswith(ends)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_two_processes_give_the_run_of_one(runs, two, tmp_path, name):
    assert main([*runs[name], f"output={tmp_path / 'one'}"]) == 0
    one, both = losses(tmp_path / "one"), losses(two / name)
    assert len(one) == len(both) == 2
    for step, values in enumerate(one):
        assert both[step] == pytest.approx(values, abs=1e-4), f"step {step + 1}"
    assert (one[-1][-1] > 1) == ("data.on_bad=skip" in FORMS[name][1])
    answers = evaluated(tmp_path / "one")
    assert len(answers) == {"full": 6, "text only": 0}.get(name, 3)
    assert evaluated(two / name) == pytest.approx(answers, abs=1e-4)
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "one", two / name))
    assert first.keys() == second.keys()
    assert any("projection_head" in key for key in first) == FORMS[name][0]
    far = {key: float((first[key] - second[key]).abs().max()) for key in first}
    assert max(far.values()) < 1e-4, max(far, key=far.get)
    start = load_file(Path(runs[name][1].removeprefix("model=")) / "model.safetensors")
    assert not all(torch.equal(first[key], start[key]) for key in first)  # it trained
