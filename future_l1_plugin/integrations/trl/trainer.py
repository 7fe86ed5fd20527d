"""TRL's GRPOTrainer with latents. Its loop, sampler, buffers, reference model, logs and checkpoints are its own.

What is put in at TRL's seams: `rollout_func` decodes with the model itself; a reward function judges whole groups;
`_get_per_token_logps_and_entropies` scores the recorded latents; `_compute_loss` minimises `la_dapo.policy_loss`.
A group that the filter leaves out stays in the batch with empty masks: TRL samples no other in its place.
"""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from future_l1_plugin.compat import require
from future_l1_plugin.data.frame_cache import FrameCache
from future_l1_plugin.data.prompt import RlPrompt, encode_prompt
from future_l1_plugin.data.rl import Prompts
from future_l1_plugin.integrations.rl.grading import Grades, grade
from future_l1_plugin.integrations.rl.groups import GroupFilter, NotFinite, RolloutError, Verdict
from future_l1_plugin.integrations.rl.metrics import log_prob_gaps, span_metrics
from future_l1_plugin.integrations.rl.prompts import check_judged
from future_l1_plugin.integrations.rl.rollouts import rollouts_of
from future_l1_plugin.integrations.rl.samples import make_sample
from future_l1_plugin.integrations.rl.scoring import padded, score
from future_l1_plugin.integrations.rl.settings import LatentSection
from future_l1_plugin.integrations.trl.settings import loss_settings
from future_l1_plugin.la_dapo import LossInputs, Rollout, group_advantage, kl_at_latents, policy_loss, split_actions
from future_l1_plugin.latent.channel import HEAD_NAME, latent_head
from future_l1_plugin.model import LatentConfig, generate
from future_l1_plugin.model.batch import left_padded
from future_l1_plugin.rewards import RewardSet

_LEFT_OUT = (Verdict.TOO_EASY, Verdict.TOO_HARD, Verdict.NO_VERDICT)


@dataclass(frozen=True)
class Row:
    """A response, and the inputs of its prompt (`EncodedPrompt.inputs`)."""

    inputs: dict[str, Tensor]
    rollout: Rollout


@dataclass
class _Round:
    """What arises while TRL makes a batch of N rows and has no column for, in TRL's order."""

    rows: list[Row] = field(default_factory=list)
    grades: Grades | None = None
    ref_mu: list[Tensor] | None = None  # the reference's mu, (k_i, H) each


class LaDapoTrainer(GRPOTrainer):
    """
    Args:
        model, processor: from `model.load`, in the dtype of the weights that learn.
        prompts: what is asked (`data.load_prompts`).
        rewards: with a term `accuracy` (`rl.settings.checked_rewards`).
        args: the keys in `settings.ACT` and those of TrainingArguments.
        latent: how latents are drawn and trained.
        bounds: (least, greatest) mean accuracy of a group that is trained on; None keeps every group with a verdict.
        frames: decoded frames kept in memory.

    Raises:
        EnvironmentMismatch: another TRL.
        ConfigError: as `loss_settings`. DataError: free-text answers that no term of `rewards` can decide.

    Training raises RolloutError where no group of a batch is left, NotFinite for a loss or a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        prompts: list[RlPrompt],
        rewards: RewardSet,
        args: GRPOConfig,
        latent: LatentSection,
        bounds: tuple[float, float] | None = (0.1, 0.9),
        frames: FrameCache | None = None,
    ) -> None:
        require("trl")
        self.settings, self.scoring, self.rewards = loss_settings(args, latent), latent.scoring(), rewards
        self.latent = LatentConfig.from_hf(model.config)
        prompts = check_judged(Prompts(prompts, []), rewards, "raise")
        self._prompts, self._frames = {prompt.id: prompt for prompt in prompts}, frames
        self._filter = GroupFilter(bounds, "gradient_accumulation_steps", "bounds=None")
        self._round = _Round()
        super().__init__(
            model,
            self.la_dapo,
            args,
            Dataset.from_dict({"prompt": list(self._prompts)}),
            processing_class=processor,
            rollout_func=self._roll_out,
        )
        head = latent_head(self.model)
        if self.ref_model is not None and head is not None:  # TRL loads the reference as a stock model
            setattr(self.ref_model, HEAD_NAME, deepcopy(head).requires_grad_(False))

    @torch.no_grad()
    def _roll_out(self, ids: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """One response to each prompt, in TRL's fields."""
        processor = self.processing_class
        encoded = {name: encode_prompt(self._prompts[name], processor, self._frames).inputs for name in set(ids)}
        inputs = [encoded[name] for name in ids]
        self.model.eval()  # gradient checkpointing would rule out a cache
        output = generate(
            self.model,
            left_padded(inputs, processor.tokenizer.pad_token_id, self.accelerator.device),
            policy=self.scoring.policy,
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            tokenizer=processor.tokenizer,
            record_means=True,
        )
        self.model.train()
        rollouts = rollouts_of(output, self.latent, self.scoring)
        triples = zip(inputs, rollouts, ids, strict=True)
        self._round.rows = [Row(one, r.checked(f"prompt {name}")) for one, r, name in triples]
        return {
            "prompt_ids": [one["input_ids"][0].tolist() for one in inputs],
            "completion_ids": [r.ids.tolist() for r in rollouts],
            "logprobs": [r.log_probs.tolist() for r in rollouts],
        }

    async def la_dapo(self, prompts: list[str], log_metric: Any, **_: Any) -> list[float]:
        """The totals of responses whose groups are trained on, 0 for the others."""
        tokens, longest = self.latent.tokens, self.max_completion_length
        pairs = [(self._prompts[name], row.rollout) for name, row in zip(prompts, self._round.rows, strict=True)]
        samples = [make_sample(self.processing_class.tokenizer, tokens, *pair, longest) for pair in pairs]
        grades = self._round.grades = await grade(self.rewards, self._filter, samples, prompts)
        # TRL takes the mean of all that is logged under a name, over processes, too.
        values = {f"groups/{v}": [grades.seen[v] * self.accelerator.num_processes] for v in _LEFT_OUT}
        values["groups/accuracy"] = grades.accuracies
        if kept := grades.places:
            values |= {f"reward/{name}": column for name, column in grades.terms.items()}
            values["reward"] = [grades.totals[i] for i in kept]
            values |= {name: [value] for name, value in span_metrics([samples[i] for i in kept], tokens).items()}
        for name, column in values.items():
            for value in column:
                log_metric(name, value)
        return grades.totals

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's columns of N rows, and ours: `rows`, `kept` Bool (N,), `num_actions` Long (N, 2) of tokens and latents,
        and `ref_mu`, where there is a reference."""
        found = self._round = _Round()
        output = super()._generate_and_score_completions(inputs)
        grades, rows = found.grades, found.rows
        seen = sum((Counter(one) for one in gather_object([grades.seen])), Counter())
        if not seen[Verdict.KEPT]:
            raise RolloutError(self._filter.starved(0, seen.total(), 1, seen))
        del self._metrics["train"]["reward"][-2]  # TRL's own, which counts groups that are left out
        if "old_per_token_logps" not in output:  # TRL would take the update's own where it follows at once
            size = self.args.per_device_train_batch_size
            output["old_per_token_logps"] = self._get_per_token_logps_and_entropies(self.model, batch_size=size)[0]
        device, names = self.accelerator.device, [row["prompt"] for row in inputs]
        output["rows"], output["kept"] = rows, torch.tensor(grades.kept, device=device)
        advantages = group_advantage(torch.tensor(grades.totals), names, self.scale_rewards == "group")
        output["advantages"] = advantages.to(device)
        output["num_actions"] = torch.stack([mask.sum(1) for mask in self._masks(rows, output["kept"])], 1)
        if found.ref_mu is not None:
            output["ref_mu"] = found.ref_mu
        old = [output["old_per_token_logps"][i, : len(rows[i].rollout.ids)] for i in grades.places]
        gaps = log_prob_gaps([rows[i].rollout for i in grades.places], old, self.latent.tokens) if old else {}
        for name in ("rollout_gap/text_max", "rollout_gap/latent_max"):
            every = self.accelerator.gather(torch.tensor([gaps.get(name, 0.0)], device=device))
            self._metrics["train"][name].append(every.max().item())
        return output

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, *_: Any, batch_size: int, **__: Any
    ) -> tuple[Tensor, None, None]:
        """Of the round's rows, float64 (N, T): TRL asks for the reference's, and for the actor's before its updates."""
        rows = self._round.rows
        found = [self._score(model, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        if model is self.ref_model:
            counts = [len(row.rollout.latents) for row in rows]
            self._round.ref_mu = list(torch.cat([mu for _, mu in found]).split(counts))
        return padded([row for log_probs, _ in found for row in log_probs]), None, None

    def _score(self, model: nn.Module, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """`rl.scoring.score`: log-probabilities float64 (B, T), mu (K, H)."""
        pad = self.processing_class.tokenizer.pad_token_id
        inputs = left_padded([row.inputs for row in rows], pad, self.accelerator.device)
        return score(model, self.latent, self.scoring, inputs, [row.rollout for row in rows], self.temperature)

    def _masks(self, rows: list[Row], kept: Tensor) -> tuple[Tensor, Tensor]:
        """Bool (B, T) each: tokens that were chosen, and latents; empty in rows that are left out."""
        ids, actions = padded([row.rollout.ids for row in rows]), padded([row.rollout.actions for row in rows])
        return split_actions(ids, actions & kept[:, None], self.latent.latent_id)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """`la_dapo.policy_loss` of a micro-batch; its means are over the actions of the whole update."""
        rows, kept = inputs["rows"], inputs["kept"]
        log_prob, mu = self._score(model, rows)
        text, latent = self._masks(rows, kept)
        length, passes = log_prob.shape[1], self.args.gradient_accumulation_steps
        first = self._step % self.args.steps_per_generation // passes * passes
        counts = sum(one["num_actions"].sum(0) for one in self._buffered_inputs[first : first + passes])
        num_text, num_latents = self.accelerator.reduce(counts, "sum").tolist()
        kl = None
        if self.settings.latent_kl_weight:
            every = self._masks(rows, torch.ones_like(kept))[1]
            kl = kl_at_latents(log_prob, every, self.scoring, mu, torch.cat(inputs["ref_mu"]))
        batch = LossInputs(
            log_prob=log_prob,
            old_log_prob=inputs["old_per_token_logps"][:, :length],
            advantages=inputs["advantages"][:, None].expand_as(log_prob),
            text_mask=text,
            latent_mask=latent,
            num_text=num_text,
            num_latents=num_latents,
            ref_log_prob=inputs["ref_per_token_logps"][:, :length] if self.settings.kl_weight else None,
            latent_kl=kl,
        )
        found = policy_loss(self.settings, batch)
        self._check_finite("loss", found.loss.detach())
        shares = self.accelerator.reduce(torch.stack(list(found.means.values())), "sum")
        for name, share in zip(found.means, shares.tolist(), strict=True):
            self._metrics["train"][f"actor/{name}"].append(share * passes)  # TRL takes the mean over passes
        return found.loss * self.accelerator.num_processes  # DDP takes the mean over processes

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._check_finite("gradient norm", torch.as_tensor(norm))
        return norm

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not bool(value.isfinite()):
            raise NotFinite(
                f"step {self.state.global_step + 1}: expected a finite {what}, found {float(value)}. Nothing of this "
                "step was saved. Go on from the newest checkpoint (train(resume_from_checkpoint=True)); if it ends "
                "here again, with another learning rate, attention kernel or data"
            )
