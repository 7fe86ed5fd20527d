#!/usr/bin/env bash
# The tests that need EasyR1: scripts/test_easyr1.sh CHECKOUT [VENV] [PYTHON]. `make test-easyr1 EASYR1=CHECKOUT` calls it.
# EasyR1 is used where it is: nothing is installed into it or into this project's own virtual environment.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

checkout=${1:-}
[[ -f $checkout/verl/trainer/main.py ]] || {
    echo "expected a checkout of EasyR1, found '$checkout'. Run:" >&2
    echo "git clone https://github.com/hiyouga/EasyR1 && make test-easyr1 EASYR1=EasyR1" >&2
    exit 1
}
checkout=$(cd "$checkout" && pwd)
cd "$root"
venv=${2:-.venv-easyr1}
stamp=$venv/.future_l1_easyr1
pins=$(python3 future_l1_plugin/compat.py easyr1)

if [[ ! -f $stamp || $(<"$stamp") != "$pins" ]]; then
    [[ -x $venv/bin/python ]] || "${3:-python3.11}" -m venv "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check -q install)
    "${pip[@]}" "$(grep '^torch==' <<<"$pins")"
    # A CPU build of torch has no torchvision of its own: the CUDA one would bring another torch.
    "${pip[@]}" --no-deps "$(grep '^torchvision==' <<<"$pins")"
    grep -v '^torchvision==' <<<"$pins" | "${pip[@]}" -r /dev/stdin msgspec einops pylatexenc pandas pytest scipy
    PYTHONPATH=$root "$venv/bin/python" patches/torchvision_cpu.py install
    "${pip[@]}" --no-deps --use-pep517 -e .
    echo "$pins" >"$stamp"
fi

# EasyR1 imports vLLM, which the latent rollout does not use, and asks for CUDA by name: both have a stand-in.
path=$root:$checkout stand_ins=$root/tests/integrations/easyr1/stand_ins
pytest=("$venv/bin/python" -m pytest -p no:cacheprovider)
CUDA_VISIBLE_DEVICES=-1 PYTHONPATH=$path:$stand_ins "${pytest[@]}" tests/integrations/{easyr1,test_easyr1_recipe.py}
"$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)' || path+=:$stand_ins
PYTHONPATH=$path "${pytest[@]}" tests/integrations/test_easyr1_gpu.py
