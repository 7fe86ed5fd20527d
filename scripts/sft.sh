#!/usr/bin/env bash
# Latent SFT from a recipe: scripts/sft.sh recipes/sft_micro.yaml [--dry-run] [key=value ...]
# One process on a CPU or one GPU; GPUS=8 starts one process a GPU with torchrun. On several machines, on each of them:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-0 GPUS=8 scripts/sft.sh ..     NODE_RANK=1 on the other; MASTER_PORT if need be
set -euo pipefail
cd "$(dirname "$0")/.."
nodes=(${NODE_RANK:+--node-rank "$NODE_RANK"})
# A cluster may have set the others for something else.
[[ -z "${NNODES:-}" ]] || nodes+=(--nnodes "$NNODES" ${MASTER_ADDR:+--master-addr "$MASTER_ADDR"} \
  ${MASTER_PORT:+--master-port "$MASTER_PORT"})
exec "${VENV:-.venv}/bin/python" -m future_l1_plugin.integrations.sft.launch ${GPUS:+--gpus "$GPUS"} "${nodes[@]}" "$@"
