"""LA-DAPO apart from any host: what `verl`, `easyr1` and `trl` share.

settings    the recipe sections `latent` and `rewards`
prompts     which prompts can be rewarded at all
rollouts    `la_dapo.Rollout` of what transformers decoded
samples     rollouts to rewards
groups      which groups are trained on, and what to do where there are too few
grading     a round of groups: rewards and verdicts
scoring     what a model on transformers makes of rollouts
metrics     what a step reports, by one table of names (README.md)
"""
