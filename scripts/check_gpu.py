#!/usr/bin/env python
"""The GPU self-test, under eight minutes on one H100; small, in a minute, on a CPU. `make test-gpu` runs it.

    python scripts/check_gpu.py [--parts a c] [--small] [--out FILE.json] [--limit SECONDS]
    python scripts/check_gpu.py --table FILE.json        # the Markdown table of a results file

Needs torch and transformers; neither the hub nor an installed plugin. What else a part needs and does not find is a
reason to skip it. Exit code 1 if a part failed. See future_l1_plugin/gpu_check and scripts/gpu_results/README.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from future_l1_plugin.gpu_check.runner import main

if __name__ == "__main__":
    sys.exit(main())
