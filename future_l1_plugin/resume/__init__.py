"""Going on with a run that was broken off: what may change, what must be the same, which checkpoint is whole.

One table for all hosts (`table`), the comparison (`compare`), digests of data and start checkpoint (`inputs`), whole
checkpoint folders (`checkpoints`). Neither torch nor a host is imported.
"""

from future_l1_plugin.resume.checkpoints import MARKER, Found, delete, fault, newest_whole, seal
from future_l1_plugin.resume.compare import Changes, changes, check, flat
from future_l1_plugin.resume.inputs import Inputs
from future_l1_plugin.resume.runs import hold
from future_l1_plugin.resume.table import TABLES, Kind, Rule, rule_of

__all__ = [
    "MARKER",
    "TABLES",
    "Changes",
    "Found",
    "Inputs",
    "Kind",
    "Rule",
    "changes",
    "check",
    "delete",
    "fault",
    "flat",
    "hold",
    "newest_whole",
    "rule_of",
    "seal",
]
