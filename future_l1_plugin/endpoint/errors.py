"""Why a served model gave no reply."""

from future_l1_plugin.errors import UserError


class EndpointError(UserError):
    """No reply, for a reason that every sample meets alike, such as a refused key. `sample_id`: what was asked."""

    def __init__(self, message: str, sample_id: str | None = None) -> None:
        super().__init__(message)
        self.sample_id = sample_id


class NoReply(EndpointError):
    """No usable reply for `sample_id`; other samples may get one."""


class MalformedReply(ValueError):
    """The endpoint replied, but not with what can be read. Raised by readers of replies; leads to a retry."""
