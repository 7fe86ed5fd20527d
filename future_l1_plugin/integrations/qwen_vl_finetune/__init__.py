"""Latent SFT in an unmodified checkout of 2U1/Qwen-VL-Series-Finetune, with its trainer, flags, DeepSpeed and LoRA."""
