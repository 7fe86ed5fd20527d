"""Names that recipes use for what `plugin` registers with verl."""

TRAINER = ADVANTAGE = "la_dapo"
ENGINE = "fsdp2_latent"
ROLLOUT, VLLM_ROLLOUT = "latent_hf", "latent_vllm"
AGENT_LOOP = "future_l1_latent"
