"""What can go wrong with one prompt of a step, and how the trainer learns of it: by tags on the prompt's key."""

#: Tags on a prompt whose rollout or reward failed: the reason; True if the run must not go on; the prompt's id.
ERROR, FATAL, PROMPT_ID = "error", "fatal", "prompt_id"


class RequestAborted(RuntimeError):
    """The rollout engine gave a request up that was sound."""


class PromptFailed(RuntimeError):
    """This prompt cannot be rolled out, and says nothing about others: a broken file, a length, an aborted request."""
