"""Why something that a client asks is not done."""

from qvera.utils.errors import InputError


class UnknownRecord(LookupError):
    """There is none of that id, or it is another owner's."""


class Refused(InputError):
    """What a client asks can't be done.

    Attributes:
        param: the key of the body that it is about.
        code: OpenAI's word for it.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class TooMany(Exception):
    """An owner has as many open jobs as it may have."""


class NotMade(Exception):
    """No job of this owner has made the model."""
