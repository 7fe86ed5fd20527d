"""EasyR1 (hiyouga/EasyR1, tried with b44b311): LA-DAPO on its unmodified trainer, FSDP workers and actor.

    python -m future_l1_plugin.integrations.easyr1 config=recipes/easyr1/la_dapo.yaml worker.actor.model.model_path=SFT

EasyR1 installs under the name `verl` and wants transformers 4: it lives in an environment of its own, without upstream
verl. What is not EasyR1's own is shared with the verl integration: the losses of `la_dapo`, the terms of `rewards`, the
channel of `latent`, and `integrations.rl`.
"""
