"""One of two ranks of the engine; see `test_verl_vision.py`. Arguments: checkpoint, rank, store's file."""

import sys
from datetime import timedelta
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what several test files share
from test_verl_engine import SCORING, as_batch, make_engine, roll_out, trainable
from verl.utils import tensordict_utils as tu

from future_l1_plugin.integrations.verl.loss import loss_function
from future_l1_plugin.la_dapo import LaDapoLoss

TEXT, IMAGE, VIDEO = (0, 1), (2, 3), (4, 5)  # rollouts of `roll_out`
#: What the two ranks show in one micro-batch of two rollouts.
CASES = [(IMAGE, VIDEO), (TEXT, VIDEO), ((2, 4), IMAGE), (TEXT, (3, 5)), ((4, 2), VIDEO)]


def main(path: str, rank: int, store: str) -> None:
    model, found = roll_out(path)  # before the engine, which patches the model's class
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{store}", timeout=timedelta(seconds=30)
    )
    for frozen in (True, False):
        engine = make_engine(path)
        if frozen:
            for module in engine.module.modules():
                if "visual" in module._modules:
                    module.visual.requires_grad_(False)
        for case in CASES:
            rows = [found[i] for i in case[rank]]
            batch = trainable(as_batch(path, model, rows), rows, model)
            tu.assign_non_tensor(batch, use_remove_padding=False, calculate_entropy=False)
            with engine.train_mode():
                result = engine.forward_backward_batch(
                    batch, loss_function(LaDapoLoss(), SCORING, model.config.latent_id)
                )
                assert len(result["loss"]) == 1  # one micro-batch
            print("passed", frozen, case, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
