"""The errors that a user can cause or mend. Each message says what was found, what was expected, and what to do."""

from __future__ import annotations


class ErnieImageNF4Error(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one line and exits with 1."""


class RepositoryNotFound(ErnieImageNF4Error):
    """No folder and no Hub repository of that name, or it can't be reached."""


class InvalidRepository(ErnieImageNF4Error):
    """The folder is there, but it isn't a complete, sound ERNIE-Image repository."""


class DeviceUnavailable(ErnieImageNF4Error):
    """The device asked for isn't there, or has too little memory for what was asked."""


class InvalidSettings(ErnieImageNF4Error):
    """A setting (size, steps, prompt, output path, memory mode ...) that can't work."""


class IncompatibleLibraries(ErnieImageNF4Error):
    """A library, in the version that is installed, can't do with files in which no check finds a fault."""


class DiskFull(ErnieImageNF4Error):
    """A disk has too little room for what is downloaded or made."""


class UploadFailed(ErnieImageNF4Error):
    """The Hub doesn't take what is to be published, or can't be reached."""


class NotFinite(ErnieImageNF4Error):
    """Drawing came to NaN or infinity, or to a picture of one single value: another dtype has more range."""


class WriteFailed(ErnieImageNF4Error):
    """A picture or a manifest can't be written, though its disk has room."""


class InvalidRequest(ErnieImageNF4Error):
    """A request to the server asks for what can't work or isn't allowed.

    Attributes:
        field: What is at fault.
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


class NotAuthorized(ErnieImageNF4Error):
    """A request has no API key, or a wrong one."""


class UnknownModel(ErnieImageNF4Error):
    """A request names a model that the server doesn't have."""


class ComeAgain(ErnieImageNF4Error):
    """The server can't draw a request now. The same request can succeed later.

    Attributes:
        retry_after: Seconds after which it is worth another try.
    """

    def __init__(self, text: str, retry_after: int) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class QueueFull(ComeAgain):
    """So many pictures wait that the server takes no more."""


class WorkerLost(ComeAgain):
    """The process that drew the request died, or there is none to draw it."""


class ShuttingDown(ComeAgain):
    """The server is being stopped and finishes only what it is drawing."""


class RequestTimedOut(ErnieImageNF4Error):
    """The request took longer than the server's time limit, its waiting included."""


class DrawingFailed(ErnieImageNF4Error):
    """Drawing came to an error: not enough memory for the size, or numbers that aren't finite."""


class MissingPackage(ErnieImageNF4Error):
    """A part of this package needs others that aren't installed."""
