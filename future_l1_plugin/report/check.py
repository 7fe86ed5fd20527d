"""What `future-l1 data check` says at its end."""

from rich.console import Console
from rich.table import Table

from future_l1_plugin.data.check import FAULTS, Outcome


def print_check(outcome: Outcome) -> None:
    """Print the summary as a table, and what to do next."""
    summary, out, console = outcome.summary, outcome.out, Console()
    table = Table(title="Records", title_justify="left")
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_column("")
    table.add_row("[green]clean[/]", f"{summary['clean']:,}", f"{summary['videos']['frames_decoded']:,} frames decoded")
    for kind, count in summary["faults"].items():
        table.add_row(f"[red]{kind}[/]", f"{count:,}", FAULTS[kind])
    table.add_row("all", f"{summary['rows']:,}", f"{summary['videos']['named']:,} videos")
    console.print(table)

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if summary["rejected"]:
        line(f"Why each of the {summary['rejected']:,} rows was rejected: {out / 'rejected.jsonl'}")
    if summary["clean"]:
        what, root = "the rest" if summary["rejected"] else "them", summary["videos"]["root"]
        line(f"Train on {what}: data.records={out / 'clean.jsonl'} data.videos={root}")
    elif summary["faults"].get("video_missing"):
        line(f"No row is clean. Check that the videos lie in {summary['videos']['root']} (--videos).")
