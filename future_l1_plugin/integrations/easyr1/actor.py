"""EasyR1's actor and reference policy, fed with the recorded latents.

EasyR1's own forward pass runs unchanged inside a `LatentChannel`. At latent positions the log-probability of the id is
replaced by the action's: the latent's density plus log(1 - p(end)) (`la_dapo.action_log_probs`). The update minimises
the loss of `la_dapo` in place of EasyR1's.

A batch brings, beside EasyR1's fields, ROLLOUT, an array of N `Rollout`s, and REF_MU (the reference's mu), an array of
N tensors (k_i, H). Its `response_mask` holds the rollouts' actions.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from verl.protocol import DataProto
from verl.utils.seqlen_balancing import prepare_dynamic_batch, restore_dynamic_batch
from verl.workers.actor.dp_actor import DataParallelPPOActor

from future_l1_plugin.integrations.rl.groups import NotFinite
from future_l1_plugin.integrations.rl.settings import LatentSection
from future_l1_plugin.la_dapo import (
    LaDapoLoss,
    LossInputs,
    LossOutputs,
    action_log_probs,
    kl_at_latents,
    policy_loss,
    split_actions,
)
from future_l1_plugin.latent import LatentChannel, continue_log_prob_at
from future_l1_plugin.model.config import LatentConfig

ROLLOUT, REF_MU, MEDIA, EXTRA = "rollout", "ref_mu", "multi_modal_inputs", "extra_info"
#: In `meta_info` of a batch: which step it is.
STEP = "step"


def object_array(values: Sequence[Any]) -> np.ndarray:
    """(N,) of objects. `np.array` would stack tensors of one shape."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def loss_settings(actor: Any, latent: LatentSection) -> LaDapoLoss:
    """The loss that EasyR1's keys (`worker.actor`) and ours (`latent`) make together."""
    return latent.loss(
        with_kl=actor.use_kl_loss and not actor.disable_kl,
        kl_weight=actor.kl_coef,
        clip_low=actor.clip_ratio_low,
        clip_high=actor.clip_ratio_high,
        dual_clip=actor.clip_ratio_dual,
    )


class LatentActor(DataParallelPPOActor):
    """The actor, or without an optimiser the reference.

    Args:
        config, actor_module, actor_optimizer: as EasyR1's.
        latent: how latents are drawn and trained.
    """

    def __init__(
        self,
        config: Any,
        actor_module: nn.Module,
        latent: LatentSection,
        actor_optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__(config, actor_module, actor_optimizer)
        self.model_config = LatentConfig.from_hf(actor_module.config)
        self.scoring = latent.scoring()
        self.loss = loss_settings(config, latent) if actor_optimizer is not None else None
        self.mu: list[Tensor] = []  # mu of each row of the last compute_log_prob, (k_i, H) on the CPU
        self._channel = LatentChannel(actor_module, self.model_config.tokens)
        self._fed: tuple[Tensor, Tensor] | None = None  # latents (K, H); Bool, where logits predict the response
        self._token_log_probs: Callable[..., Tensor] = self.log_probs_from_logits
        self.log_probs_from_logits = self._log_probs

    def _forward_micro_batch(self, micro_batch: dict[str, Any], temperature: float) -> Tensor:
        """Log-probabilities (B, T), float64: an untempered density is of the order of 1e4, float32 resolves 1e-3."""
        ids, mask = micro_batch["input_ids"], micro_batch["attention_mask"].bool()
        length = micro_batch["responses"].shape[1]
        latents = self._checked(micro_batch)
        where = mask.clone()
        where[:, :-length] = False
        if self.config.padding_free:
            where = where[mask][None]
            predicts = where[0].roll(-1)
        else:
            predicts = where[:, -length:]
        self._channel.feed(latents, where=where)
        self._fed = torch.cat(latents).to(ids.device), predicts
        with self._channel:
            return super()._forward_micro_batch(micro_batch, temperature)

    def _checked(self, micro_batch: dict[str, Any]) -> list[Tensor]:
        latents = [rollout.latents for rollout in micro_batch[ROLLOUT]]
        counts = (micro_batch["responses"] == self.model_config.latent_id).sum(1).tolist()
        for row, (given, expected) in enumerate(zip(latents, counts, strict=True)):
            if len(given) != expected:
                raise ValueError(
                    f"row {row} of a micro-batch: its response has {expected} <|latent|> ids, its rollout brought "
                    f"{len(given)} latents. Ids and latents must come from one rollout."
                )
        return latents

    def _log_probs(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`action_log_probs` in the place of EasyR1's log p(labels). Logits (.., V) are divided by the temperature."""
        latents, predicts = self._fed
        at = predicts & (labels == self.model_config.latent_id)
        went_on = None
        if not self.model_config.budget.exact:
            rows = at.flatten().nonzero()[:, 0]
            logits, went_on = continue_log_prob_at(
                logits, rows, self.model_config.latent_end_id, logits.new_ones(len(rows), dtype=torch.float32)
            )
        token_log_probs = self._token_log_probs(logits, labels)
        return action_log_probs(token_log_probs, at, self.scoring, self._channel.mu, latents, went_on)

    @torch.no_grad()
    def compute_log_prob(self, data: DataProto) -> Tensor:
        """(N, T), float64; leaves mu behind."""
        self.actor_module.eval()
        temperature = data.meta_info["temperature"]
        batches, order = self._split(data, self.config.micro_batch_size_per_device_for_experience)
        found, means = [], []
        for batch in batches:
            found.append(self._forward_micro_batch({**batch.batch, **batch.non_tensor_batch}, temperature))
            lengths = [len(rollout.latents) for rollout in batch.non_tensor_batch[ROLLOUT]]
            means += self._channel.mu.float().cpu().split(lengths)
        log_probs = torch.cat(found)
        if order is None:
            self.mu = means
            return log_probs
        places = [place for part in order for place in part]
        self.mu = [mean for _, mean in sorted(zip(places, means, strict=True), key=lambda pair: pair[0])]
        return restore_dynamic_batch(log_probs, order)

    def _split(self, data: DataProto, size: int) -> tuple[list[DataProto], list[list[int]] | None]:
        if not self.config.dynamic_batching:
            return data.split(size), None
        return prepare_dynamic_batch(data, max_token_len=size * data.batch["input_ids"].shape[1])

    def update_policy(self, data: DataProto) -> dict[str, Any]:
        """One pass over the mini-batches for each of `ppo_epochs`; metrics by the names of the verl integration."""
        self.actor_module.train()
        temperature = data.meta_info["temperature"]
        batches = data.split(self.config.global_batch_size_per_device)
        metrics: dict[str, list[float]] = defaultdict(list)
        for name, value in self._rollout_gaps(data).items():
            metrics[name] = [value]
        maxima: list[dict[str, float]] = []
        for batch in [batch for _ in range(self.config.ppo_epochs) for batch in batches]:
            text, latent = self._masks(batch.batch)
            counts = torch.stack([text.sum(), latent.sum()])
            dist.all_reduce(counts)
            sums: dict[str, float] = defaultdict(float)
            largest: dict[str, float] = defaultdict(float)
            total = 0.0
            for micro_batch in self._split(batch, self.config.micro_batch_size_per_device_for_update)[0]:
                inputs = {**micro_batch.batch, **micro_batch.non_tensor_batch}
                found = self._la_dapo(inputs, temperature, *counts.tolist())
                (found.loss * self.world_size).backward()  # FSDP averages over ranks
                for name, value in found.means.items():
                    sums[name] += value.item() * self.world_size  # so does the trainer
                for name, value in found.maxima.items():
                    largest[name] = max(largest[name], value.item())
                total += found.loss.item()
            self._check_finite("loss", total, batch, counts.device)
            norm = self._optimizer_step().item()  # EasyR1 leaves weights as they are where it is not finite
            self._check_finite("gradient norm", norm, batch, counts.device)
            metrics["actor/grad_norm"].append(norm)
            for name, value in sums.items():
                metrics[f"actor/{name}"].append(value)
            maxima.append(self._over_ranks(largest, counts.device))
        for name in maxima[0]:
            metrics[f"actor/{name}_max"] = [max(found[name] for found in maxima)]
            metrics[f"actor/{name}_first_max"] = [maxima[0][name]]  # before any update: rollout and actor agree
        return metrics

    def _check_finite(self, what: str, value: float, batch: DataProto, device: torch.device) -> None:
        """Raises NotFinite on all ranks if the value of any is not finite; nothing of the step is saved then."""
        bad = torch.tensor(float(not math.isfinite(value)), device=device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if not bad:
            return
        ids = [str(row["id"]) for row in batch.non_tensor_batch[EXTRA]]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (value, ids))
        values, ids = zip(*found, strict=True)
        prompts = ", ".join(dict.fromkeys(name for row in ids for name in row))
        raise NotFinite(
            f"step {batch.meta_info[STEP]}: expected a finite {what} of an update, found {', '.join(map(str, values))} "
            f"(one a rank). Its prompts: {prompts}. Nothing of this step was saved. Run the same command: it goes on "
            "from the newest checkpoint. If it ends here again, go on from a checkpoint before "
            "(trainer.load_checkpoint_path) with another learning rate, attention kernel or data"
        )

    def _rollout_gaps(self, data: DataProto) -> dict[str, float]:
        """Largest |rollout - actor| log-probability, in nats (latents: tempered), of any rank."""
        old = data.batch["old_log_probs"]
        drawn = torch.zeros_like(old, dtype=torch.float64)
        for row, rollout in zip(drawn, data.non_tensor_batch[ROLLOUT], strict=True):
            row[: len(rollout.log_probs)] = rollout.log_probs
        gap = (drawn - old).abs()
        text, latent = ((gap * mask).max().item() for mask in self._masks(data.batch))
        return self._over_ranks({"rollout_gap/text_max": text, "rollout_gap/latent_max": latent}, gap.device)

    def _masks(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Bool (B, T) each: tokens that were chosen, and latents."""
        return split_actions(batch["responses"], batch["response_mask"], self.model_config.latent_id)

    def _la_dapo(self, inputs: dict[str, Any], temperature: float, num_text: int, num_latents: int) -> LossOutputs:
        """`la_dapo.policy_loss` of a micro-batch."""
        log_prob = self._forward_micro_batch(inputs, temperature)
        text, latent = self._masks(inputs)
        kl = None
        if self.loss.latent_kl_weight:
            reference = torch.cat(list(inputs[REF_MU]))
            kl = kl_at_latents(log_prob, latent, self.scoring, self._channel.mu, reference)
        batch = LossInputs(
            log_prob=log_prob,
            old_log_prob=inputs["old_log_probs"],
            advantages=inputs["advantages"],
            text_mask=text,
            latent_mask=latent,
            num_text=num_text,
            num_latents=num_latents,
            ref_log_prob=inputs["ref_log_probs"] if self.loss.kl_weight else None,
            latent_kl=kl,
        )
        return policy_loss(self.loss, batch)

    def _over_ranks(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        found = torch.tensor(list(values.values()), device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return dict(zip(values, found.tolist(), strict=True))
