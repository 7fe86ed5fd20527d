"""Writes the page of the table of metrics: python -m future_l1_plugin.integrations.rl > (this folder)/README.md"""

from future_l1_plugin.integrations.rl.metrics import METRICS, Metric

_HEAD = """# LA-DAPO apart from any host

What verl, EasyR1 and TRL share: the recipe sections `latent` and `rewards` (`settings`), which prompts can be rewarded
(`prompts`), one typed `Rollout` from every engine (`la_dapo/rollout.py`; `rollouts` for transformers), rewards of
groups (`samples`), which groups are trained on (`groups`), both for a round of groups (`grading`), a model's
log-probabilities of rollouts on transformers (`scoring`), and what a step reports (`metrics`).

A host brings prompts in, has them decoded, calls `make_sample` and `group_rewards`, turns totals into advantages
(`la_dapo_advantage`), and runs its model within a `LatentChannel`: `action_log_probs`, then `policy_loss` of
`LossInputs`.

## Metrics

Written by `python -m future_l1_plugin.integrations.rl`; do not edit. One name means one thing on every host.

| name | unit | of | what | hosts |
|---|---|---|---|---|
"""


def page() -> str:
    """The page, as Markdown."""
    return _HEAD + "".join(map(_row, METRICS))


def _row(metric: Metric) -> str:
    return f"| `{metric.name}` | {metric.unit} | {metric.population} | {metric.meaning} | {', '.join(metric.hosts)} |\n"


if __name__ == "__main__":
    print(page(), end="")
