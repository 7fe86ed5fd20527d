"""Latent SFT from a recipe: what is the same in every host. The hosts are hf_trainer and qwen_vl_finetune."""
