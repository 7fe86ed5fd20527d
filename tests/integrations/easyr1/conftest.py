"""EasyR1 on a CPU: the shipped recipe made small, for the micro base and world, and one worker over gloo."""

import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "easyr1" / "la_dapo.yaml"
RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture(scope="session")
def one_rank():
    with pytest.MonkeyPatch.context() as patch:
        # With more ranks it would agree with them, on CUDA, on a number of micro-batches.
        patch.setattr("verl.utils.seqlen_balancing.dist", SimpleNamespace(is_initialized=lambda: False))
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    from future_l1_plugin.model.tiny import copy_micro_base

    return copy_micro_base(tmp_path_factory.mktemp("easyr1") / "base")


@pytest.fixture(scope="session")
def headed(base, tmp_path_factory):
    """The micro base with a latent head and an lm_head of its own, as Qwen3-VL-8B has one."""
    from future_l1_plugin.integrations.easyr1.model import latent_class
    from future_l1_plugin.model import LatentConfig
    from future_l1_plugin.model.backbone import QWEN3_VL
    from future_l1_plugin.model.checkpoint import attach_head

    path = tmp_path_factory.mktemp("easyr1") / "headed"
    model = latent_class(QWEN3_VL).from_pretrained(base, dtype=torch.float32)
    latent = LatentConfig.from_hf(model.config)
    latent.use_projection_head, latent.projection_head_type = True, "lvr"
    latent.to_hf(model.config)
    torch.manual_seed(1)
    attach_head(model, latent)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(1.1 * model.lm_head.weight.detach())
    model.save_pretrained(path)
    for file in [*base.glob("*.json"), base / "chat_template.jinja"]:
        if not (path / file.name).exists():
            shutil.copy(file, path)
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    from future_l1_plugin.data import make_world

    return make_world(tmp_path_factory.mktemp("easyr1") / "world", test=4, train=4, progress=False)


@pytest.fixture(scope="session")
def arguments(base, world, tmp_path_factory):
    """The command line: the shipped recipe, as small as the micro base."""
    roles = [
        f"worker.{role}.fsdp={{mp_param_dtype: fp32, torch_dtype: fp32, enable_rank0_init: false}}"
        for role in ("actor", "ref")
    ]
    return [
        f"config={RECIPE}",
        f"data={{train_files: [{world.futurebench}], val_files: [{world.futurebench}], num_workers: 0}}",
        "data.shuffle=false",
        "data={rollout_batch_size: 2, val_batch_size: 8, max_prompt_length: 256, max_response_length: 24}",
        f"worker.actor.model={{model_path: {base}, enable_gradient_checkpointing: false}}",
        "worker.actor={global_batch_size: 2, micro_batch_size_per_device_for_update: 2}",
        "worker.actor={padding_free: false, dynamic_batching: false, use_torch_compile: false}",
        "worker.actor.optim={lr: 1.0e-3, weight_decay: 0.0}",
        "worker.actor.offload={offload_params: false, offload_optimizer: false}",
        "worker.ref.offload.offload_params=false",
        *roles,
        "worker.rollout={n: 4, dtype: fp32, batch_size: 6, temperature: 1.0, top_p: 1.0}",
        "trainer={n_gpus_per_node: 1, max_steps: 2, logger: [file]}",
        "trainer={val_before_train: false, val_freq: -1, save_freq: -1}",
        f"trainer.save_checkpoint_path={tmp_path_factory.mktemp('easyr1') / 'out'}",
    ]


@pytest.fixture(scope="session")
def make_config(arguments):
    """Overrides as on the command line -> the configuration."""
    from future_l1_plugin.integrations.easyr1.config import load_config

    return lambda *overrides: load_config([*arguments, *overrides])


@pytest.fixture(scope="session")
def make_worker(one_rank):
    """Configuration -> EasyR1's worker with its models, in this process."""
    from future_l1_plugin.integrations.easyr1.worker import LatentFSDPWorker

    def make(config):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in RANK.items():
                patch.setenv(name, value)
            worker = LatentFSDPWorker(deepcopy(config.worker), "actor_rollout_ref")
        worker.init_model()
        return worker

    return make


@pytest.fixture(scope="session")
def worker(make_worker, make_config):
    return make_worker(make_config())


@pytest.fixture
def decoded(worker, monkeypatch):
    """What the rollout decoded. Spans are opened for the micro base, which never opens one by itself."""
    kept, decode = [], worker.rollout.decode

    def open_spans(ids, scores):  # the log-probabilities that come back know nothing of it
        scores[:, worker.model_config.latent_start_id] += 1e4 * (ids.shape[1] % 6 == 0)
        return scores

    def recording(prompts, sampling):
        kept.append(decode(prompts, sampling | {"logits_processor": [open_spans]}))
        return kept[-1]

    monkeypatch.setattr(worker.rollout, "decode", recording)
    return kept
