"""lmms-eval: the model `future_l1` and, by `patches/lmms_eval_tasks.py`, the tasks of `lmms_tasks/`.

    lmms-eval --model future_l1 --model_args pretrained=PATH --tasks futurebench --output_path OUT --log_samples

`read_results` takes the numbers from OUT.
"""

from future_l1_plugin.evaluation.results import read_results
from future_l1_plugin.evaluation.statistics import Metric

__all__ = ["Metric", "read_results"]
