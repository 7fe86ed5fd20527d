"""Writes the page of the table: python -m future_l1_plugin.resume > recipes/resume.md"""

from future_l1_plugin.resume.table import NAMES, TABLES, Kind, Rule

_HEAD = """# What may change when a run goes on

Written by `python -m future_l1_plugin.resume > recipes/resume.md`; do not edit.

A run that is started again in its folder goes on from its newest whole checkpoint. Each key of a recipe is in one of
three classes:

- **changes results**: refused. The rest of the run would not be the run that was started. Name another folder, or
  train anew (`log.resume=false`, `trainer.resume_mode=disable`, `trainer.find_last_checkpoint=false`).
- **changes only cost**: free. Where a result may move by rounding, the run says so.
- **extends**: free, and said: a number may grow, a word may go from left to right. Lowered, it is refused, unless the
  row says "both ways". -1 and null count as no number.

What is compared is content, not paths: record files, the start checkpoint (large files by size and a sample of bytes),
videos and images (names and sizes), and the ids of the records that are used. A moved folder is free; a file that was
edited in place is refused. A limit that was raised brings no record into an SFT run under way, because the order of all
follows from their number; an RL run that would get or lose prompts by it is refused. A few videos or images of another
size (one, or every twentieth up to 16) are taken for repaired ones, and said. The digests lie in `inputs.json` in the
run's folder.

The first row that fits a key counts. `*`: anything within a part of a key; `**`: anything; `{a,b}`: one of these. A key
in no row changes results.
"""
_CLASS = {Kind.RESULTS: "changes results", Kind.COST: "changes only cost", Kind.EXTENDS: "extends"}


def page() -> str:
    """The page, as Markdown."""
    parts = [_HEAD]
    for host, rules in TABLES.items():
        rows = "".join(_row(rule) for rule in rules)
        parts.append(f"\n## {NAMES[host]}\n\n| keys | class | what it is |\n|---|---|---|\n{rows}")
    return "".join(parts)


def _row(rule: Rule) -> str:
    keys = "<br>".join(f"`{key}`" for key in rule.keys)
    return f"| {keys} | {_CLASS[rule.kind]} | {_what(rule)} |\n"


def _what(rule: Rule) -> str:
    order = f" ({' -> '.join(rule.order)})" if rule.order else ""
    both = ", both ways" if rule.both else ""
    said = f". Said: {rule.said}" if rule.said else ""
    return f"{rule.why}{order}{both}{said}"


if __name__ == "__main__":
    print(page(), end="")
