"""Latent SFT on transformers.Trainer."""
