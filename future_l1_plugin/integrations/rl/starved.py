"""What to do where rounds of sampling do not give enough groups to train on."""

from collections.abc import Mapping


def way_out(seen: Mapping[str, int], rounds: str, unfiltered: str) -> str:
    """Advice that fits what was found.

    Args:
        seen: how many groups were "too_easy", "too_hard", had "no_verdict", or "failed".
        rounds: the key that bounds the rounds. unfiltered: key=value that switches the filter off.
    """
    causes = {key: seen.get(key, 0) for key in ("no_verdict", "failed", "too_hard", "too_easy")}
    most = max(causes, key=lambda key: causes[key])
    if most == "no_verdict":
        return (
            "The judge is what is missing, not the model: see that it answers at the address, with the key and the "
            f"model, that `judge` of the entry `accuracy` in `rewards` names, or raise {rounds}."
        )
    if most == "failed":
        return "See in the log why prompts fail and fix them; a new run may also leave them out of the data."
    harder, better = "harder", ""
    if most == "too_hard":
        harder, better = "easier", "start from a better checkpoint, "
    return (
        f"Raise {rounds}, with which this run may go on; a new one may also {better}use {harder} data, or switch the "
        f"filter off ({unfiltered})."
    )
