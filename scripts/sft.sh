#!/usr/bin/env bash
# Latent SFT from a recipe: scripts/sft.sh recipes/sft_micro.yaml [--dry-run] [key=value ...]
# One process on a CPU or one GPU; GPUS=8 starts one process a GPU with torchrun.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${VENV:-.venv}/bin/python" -m future_l1_plugin.integrations.sft.launch ${GPUS:+--gpus "$GPUS"} "$@"
