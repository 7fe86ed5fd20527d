#!/usr/bin/env bash
# The tests of LA-DAPO in TRL: scripts/test_trl.sh VENV [TESTS ..]. `make test-trl` calls it.
# TRL goes into an environment of its own, VENV-trl, on top of VENV: verl does not run where TRL 1.x is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/beside.sh

base=$1
shift
beside "$base" "$base-trl" "$("$base/bin/python" -c '
from future_l1_plugin.compat import pin_of
print(pin_of("trl").exact)')"
exec "$base-trl/bin/python" -m pytest "${@:-tests/integrations/test_trl.py}"
