"""Every error loadstone raises on purpose.

Each also derives from the builtin (OSError, ValueError, TypeError, ...) that callers coming from other libraries
already catch. A message says what failed, what was given and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 16_000  # characters of a message: what it quotes may be a stranger's, and of any length
_LONGEST_NAME, _MOST_NAMES = 300, 5000  # compared with each other: the time grows with both
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class LoadstoneError(Exception):
    """Base of all errors below. What would act on a terminal, or cannot be printed, is escaped in the message."""

    def __str__(self) -> str:  # not in __init__, which compiled code that raises could not be traced through
        return _printable(super().__str__())


class CheckpointError(LoadstoneError, OSError, ValueError):
    """A checkpoint cannot be read or written."""

    def __str__(self) -> str:  # OSError would print a tuple for several arguments
        return _printable(str(self.args[0])) if self.args else ""


class FormatError(CheckpointError):
    """A weights file or an index is not what its format requires."""


class IntegrityError(CheckpointError):
    """Files of one checkpoint contradict each other."""


class ReadError(CheckpointError):
    """The disk, or the network to it, failed while weights were read; ``errno`` is the system's."""


class WriteError(CheckpointError):
    """The disk did not take what was to be written: no space, no permission; ``errno`` is the system's."""

    @classmethod
    def of(cls, error: OSError, what: str) -> WriteError:
        """``what`` failed for the system's reason."""
        told = cls(f"{what}: {error.strerror or error}")
        told.errno, told.strerror, told.filename = error.errno, error.strerror, error.filename
        return told


class PathError(CheckpointError):
    """A path is not a regular file inside the checkpoint."""


class UnsafeFormatError(CheckpointError):
    """The weights are only there in a format that can execute code."""


class MissingWeightsError(CheckpointError):
    """Weights that are needed are not in the checkpoint."""


class UnexpectedWeightsError(CheckpointError):
    """The checkpoint holds weights the model has no place for (``strict=True``)."""


class ShapeMismatchError(CheckpointError, RuntimeError):
    """Shapes in the checkpoint differ from those of the model."""


class HubError(LoadstoneError, OSError):
    """The Hub, or its local cache, did not give what was asked for."""

    def __str__(self) -> str:
        return _printable(str(self.args[0])) if self.args else ""


class NotFoundError(HubError, FileNotFoundError):
    """A directory, repository, revision or file does not exist."""


class OfflineError(HubError, ConnectionError):
    """The Hub cannot be reached, or must not be, and the file is not cached."""


class GatedError(HubError, PermissionError):
    """The repository needs a token, or access that the token does not give."""


class ConfigError(LoadstoneError, ValueError):
    """A configuration is missing, malformed or contradicts itself."""


class RepoIdError(ConfigError, HubError):
    """A name is neither an existing directory nor a well-formed Hub repository id."""


class UnsupportedModelError(ConfigError):
    """No registered architecture serves this configuration."""


class RegistrationError(LoadstoneError, ValueError):
    """An architecture cannot be registered as asked."""


class RemoteCodeRefused(LoadstoneError, ValueError):
    """The checkpoint wants to bring its own code, which was not allowed."""


class RemoteCodeError(LoadstoneError, ImportError, ValueError):
    """A checkpoint's own code, which was allowed, is malformed, incomplete, fails, or does not fit."""


class QuantizationError(LoadstoneError, ValueError):
    """A quantization method or its configuration is unknown or unsupported."""


class DeviceMapError(LoadstoneError, ValueError):
    """A device map is malformed, incomplete or impossible here."""


class OffloadError(LoadstoneError, RuntimeError):
    """Weights that are spread over devices, or stay on disk, do not allow what was asked."""


class ParallelError(LoadstoneError, ValueError):
    """A model cannot be spread over a device mesh as asked, or its ranks do not agree."""


class AttentionError(LoadstoneError, ValueError):
    """An attention implementation is unknown, or cannot do what was asked."""


class KernelError(LoadstoneError, ValueError):
    """A kernel is unknown, or cannot run on this device or with these tensors."""


class InitializationError(LoadstoneError, RuntimeError):
    """A parameter or buffer would be left with undefined values."""


class GenerationError(LoadstoneError, ValueError):
    """A generation option is invalid or contradicts another."""


class ArgumentError(LoadstoneError, TypeError):
    """A call was given an argument it does not know."""


class MemoryLimitError(LoadstoneError, MemoryError, RuntimeError):
    """What was asked for takes more memory than there is."""


class MissingDependencyError(LoadstoneError, ImportError):
    """An optional package is needed for this and is not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    if len(name) > _LONGEST_NAME:
        return ""
    candidates = [one for one, _ in zip(known, range(_MOST_NAMES), strict=False) if len(one) <= _LONGEST_NAME]
    close = get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _printable(text: str) -> str:
    """The text without what a terminal would take for a command, cut in the middle if it is very long."""
    if len(text) > _LONGEST:
        left_out = len(text) - _LONGEST
        text = f"{text[: _LONGEST * 3 // 4]} ... [{left_out} characters left out] ... {text[-_LONGEST // 4 :]}"
    return _UNSHOWN.sub(lambda found: repr(found[0])[1:-1], text)
