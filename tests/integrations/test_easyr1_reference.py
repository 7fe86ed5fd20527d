"""What the verl integration makes of one fixed batch; tests/integrations/easyr1/test_actor.py holds EasyR1 to it.

The two hosts share no environment, so the numbers travel in a file. Here they are held against verl anew;
`python tests/integrations/test_easyr1_reference.py` writes the file.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transfer_queue", reason="needs upstream verl")

from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from future_l1_plugin.integrations.verl.columns import MU, rows
from future_l1_plugin.integrations.verl.engine import LatentEngine
from future_l1_plugin.integrations.verl.loss import loss_function
from future_l1_plugin.la_dapo import LaDapoLoss, LatentScoring
from future_l1_plugin.model.tiny import copy_micro_base

FILE = Path(__file__).with_name("easyr1") / "reference.json"
LATENT_ID, START, END, EOS, WIDTH = 452, 453, 454, 428, 128
POLICY, TEMPERING, TEMPERATURE = {"name": "vmf", "mean_cosine": 0.9}, "sqrt_dim", 0.8
SETTINGS = {"kl_weight": 0.05, "latent_kl_weight": 0.2, "clip_high": 0.28}
BUDGET = 8


def fixed_rows() -> list[dict]:
    """Prompts and responses of different lengths; spans of 0, 3 and 8 latents, the last closed by its budget."""
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> list[int]:
        return torch.randint(0, 400, (n,), generator=generator).tolist()

    found = []
    for prompt, spans, advantage in ((7, [3], 1.2), (5, [], -0.7), (9, [BUDGET, 2], -1.1), (6, [0, 3], 0.6)):
        response, mask = text(2), [1, 1]
        for k in spans:
            response += [START, *[LATENT_ID] * k, END, *text(2)]
            mask += [1, *[1] * k, int(k < BUDGET), 1, 1]
        found.append({"prompt": text(prompt), "response": [*response, EOS], "mask": [*mask, 1], "advantage": advantage})
    return found


def vectors(seed: int, row: dict) -> torch.Tensor:
    """Stand-ins for the latents of a row, or for the reference's mu: (k, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(row["response"].count(LATENT_ID), WIDTH, generator=generator)


def as_batch(found: list[dict], **columns: list[torch.Tensor]) -> TensorDict:
    ids = [torch.tensor(row["prompt"] + row["response"]) for row in found]
    columns |= {
        "input_ids": ids,
        "prompts": [torch.tensor(row["prompt"]) for row in found],
        "responses": [torch.tensor(row["response"]) for row in found],
        "response_mask": [torch.tensor(row["mask"]) for row in found],
        "loss_mask": [torch.tensor(row["mask"]) for row in found],
        "latents": [vectors(i, row) for i, row in enumerate(found)],
    }
    nested = {k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in columns.items()}
    positions = [torch.arange(len(row)).expand(4, -1) for row in ids]
    nested["position_ids"] = tu.nested_tensor_from_tensor_list(positions, ragged_idx=2)
    batch = TensorDict(nested, batch_size=len(found))
    batch["multi_modal_inputs"] = NonTensorStack(*(NonTensorData({}) for _ in found))
    tu.assign_non_tensor(
        batch,
        temperature=TEMPERATURE,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=40,
        use_remove_padding=False,
    )
    return batch


def measure(path: Path) -> dict:
    """Log-probabilities of the batch, and loss and gradient norm of an update, by verl's engine on one rank."""
    engine = LatentEngine(
        model_config=HFModelConfig(
            path=str(path),
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    engine.scoring = LatentScoring.build(POLICY, TEMPERING)
    found = fixed_rows()
    with engine.eval_mode():
        output = engine.infer_batch(as_batch(found))["model_output"]
    log_probs = [full[len(row["prompt"]) - 1 : -1] for full, row in zip(rows(output["log_probs"]), found, strict=True)]
    shift = [0.1 * torch.arange(len(row), dtype=torch.float64).cos() for row in log_probs]
    old = [row + by for row, by in zip(log_probs, shift, strict=True)]
    reference = [row - by for row, by in zip(log_probs, shift, strict=True)]
    advantages = [torch.full((len(row["response"]),), row["advantage"]) for row in found]
    means = [vectors(100 + i, row) for i, row in enumerate(found)]
    batch = as_batch(found, old_log_probs=old, ref_log_prob=reference, advantages=advantages, **{MU: means})
    with engine.train_mode():
        result = engine.forward_backward_batch(batch, loss_function(LaDapoLoss(**SETTINGS), engine.scoring, LATENT_ID))
        squares = [float(p.grad.full_tensor().square().sum()) for p in engine.module.parameters() if p.grad is not None]
    return {
        "policy": POLICY,
        "tempering": TEMPERING,
        "temperature": TEMPERATURE,
        "settings": SETTINGS,
        "rows": [
            row | {"log_probs": lp.tolist(), "old_log_probs": o.tolist(), "ref_log_probs": r.tolist()}
            for row, lp, o, r in zip(found, log_probs, old, reference, strict=True)
        ],
        "loss": float(sum(result["loss"])),
        "grad_norm": math.sqrt(sum(squares)),
    }


@pytest.fixture
def group():
    """One rank over gloo. verl patches classes of transformers for good: they are put back for the other tests."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    stock = {kind: dict(vars(kind)) for kind in vars(modeling_qwen3_vl).values() if isinstance(kind, type)}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()
    for kind, attributes in stock.items():
        for name, value in attributes.items():
            if callable(value) and vars(kind).get(name) is not value:
                setattr(kind, name, value)


def test_the_reference_is_what_verl_gives(group, tmp_path):
    recorded, found = json.loads(FILE.read_text()), measure(copy_micro_base(tmp_path / "model"))
    assert found["loss"] == pytest.approx(recorded["loss"], abs=1e-5)
    assert found["grad_norm"] == pytest.approx(recorded["grad_norm"], rel=1e-4)
    for new, old in zip(found["rows"], recorded["rows"], strict=True):
        assert new["response"] == old["response"]
        assert new["log_probs"] == pytest.approx(old["log_probs"], abs=2e-5)


if __name__ == "__main__":
    import tempfile

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(measure(copy_micro_base(Path(folder) / "model")), indent=1) + "\n")
    torch.distributed.destroy_process_group()
    print(f"wrote {FILE}", file=sys.stderr)
