"""Tables, pictures and a page from finished runs."""

from future_l1_plugin.report.demo import report_demo
from future_l1_plugin.report.plots import plot_rl_files

__all__ = ["plot_rl_files", "report_demo"]
