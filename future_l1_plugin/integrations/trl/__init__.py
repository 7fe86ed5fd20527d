"""LA-DAPO in TRL's GRPOTrainer.

settings    what latents ask of GRPOConfig, and the loss that it makes with the section `latent`
trainer     a subclass: rollouts with latents, our rewards and groups, our loss
"""
