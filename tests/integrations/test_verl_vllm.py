"""verl's rollout backend `latent_vllm`: a whole run, as a user types it, on Ray with the CPU build of vLLM."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")
pytestmark = pytest.mark.vllm

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = [
    "actor_rollout_ref.rollout.name=latent_vllm",
    "actor_rollout_ref.rollout.enforce_eager=True",
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",  # the CPU build has none
    "actor_rollout_ref.rollout.max_model_len=320",
    "actor_rollout_ref.rollout.max_num_seqs=8",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm={block_size: 32, kv_cache_memory_bytes: 33554432}",
    "data.train_batch_size=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=1",  # two updates a step
    "actor_rollout_ref.rollout.n=4",
    "data.val_max_samples=4",
    "data.max_response_length=40",
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "trainer.save_freq=-1",
    "groups.low=0.0",  # a random model is never right
    "groups.high=1.0",
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with two worlds and a latent checkpoint with a head, which opens spans."""
    import torch

    from future_l1_plugin.data import make_world
    from future_l1_plugin.model import LatentConfig, load, make_tiny, save
    from future_l1_plugin.model.checkpoint import attach_head

    out = tmp_path_factory.mktemp("runs")
    make_world(out / "rl_world", test=16, train=0, perception=0, seed=1)
    make_world(out / "world", test=4, train=0, perception=0, seed=0)
    make_tiny(out / "tiny", seed=0)
    model, processor = load(out / "tiny", force_initial_latent_mode=True)
    latent = LatentConfig.from_hf(model.config)
    latent.use_projection_head, latent.projection_head_type = True, "lvr"
    latent.to_hf(model.config)
    torch.manual_seed(1)
    attach_head(model, latent)
    save(model, processor, out / "latent" / "final")
    return out


def test_two_steps_agree_with_the_actor(out, tmp_path):
    """After the first step the engine has weights that were sent to it: a large step shows whether they arrived."""
    (tmp_path / "my_rewards.py").write_text("def odd(sample):\n    return float(sample.response_ids.sum() % 2)\n")
    command = [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(REPOSITORY / "recipes")),
        *("--config-name", "la_dapo_micro", f"out={out}", f"hydra.run.dir={out}/hydra", *RECIPE),
        "rewards=[{term: accuracy, weight: 0},{import_path: 'my_rewards:odd', weight: 1}]",
        "actor_rollout_ref.actor.optim.lr=1e-3",
    ]
    path = os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))
    environment = os.environ | {"PYTHONPATH": path, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    lines = (out / "la_dapo" / "metrics.jsonl").read_text().splitlines()
    metrics = {row["step"]: row["data"] for row in map(json.loads, lines)}
    for step in (1, 2):
        data = metrics[step]
        assert data["latent/responses_with_span"] == 1
        assert data["actor/grad_norm"] > 0
        assert data["rollout_gap/text_max"] <= 1e-3
        assert data["rollout_gap/latent_max"] <= 1e-3
        assert data["actor/text/ratio_gap_first_max"] <= 1e-3
        assert data["actor/latent/ratio_gap_first_max"] <= 1e-3
        assert data["rollout/engines_per_group"] == 1
        assert data["pixels/prompts"] == 2


def seams():
    """What we override or call of verl's vLLM backend: (owner, name, parameters)."""
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension as Extension
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
    from vllm.v1.engine.input_processor import InputProcessor

    return [
        (InputProcessor, "inject_into_mm_cache", "self mm_hashes mm_kwargs"),
        (vLLMReplica, "_get_server_name_prefix", "self"),
        (vLLMHttpServer, "_apply_quantization", "self"),
        (vLLMHttpServer, "_preprocess_engine_kwargs", "self engine_kwargs"),
        (vLLMHttpServer, "_get_worker_extension_cls", "self"),
        (vLLMHttpServer, "_park_until_admitted", "self request_id"),
        (Extension, "monkey_patch_model", "self vocab_size banned_token_ids"),
    ]


def test_verl_s_seams_are_where_they_were():
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    for owner, name, parameters in seams():
        assert hasattr(owner, name), f"verl moved {owner.__name__}.{name}"
        assert list(inspect.signature(getattr(owner, name)).parameters) == parameters.split(), name
    for where, line in (
        (vLLMReplica.__init__, "self.server_class = ray.remote(vLLMHttpServer)"),
        (vLLMHttpServer._park_until_admitted, "self._admitting += 1"),
        (vLLMHttpServer.generate, "self._admitting -= 1"),
        (vLLMHttpServer.launch_server, "**engine_kwargs,"),
    ):
        assert line in inspect.getsource(where), f"verl changed {where.__qualname__}: no {line!r}"
