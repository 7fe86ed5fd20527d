"""Trains the runs of a file, one after the other, in the processes that torchrun started: FILE, a JSON list of the
arguments of each. Ends at the first that does not end with 0."""

import json
import sys

from future_l1_plugin.integrations.sft.run import main

for arguments in json.loads(open(sys.argv[1]).read()):  # noqa: SIM115
    if code := main(arguments):
        sys.exit(code)
