"""Text to token ids and back: bytes as tokens, or a tokenizer.json through the ``tokenizers`` package.

Models do not need this module; the command and the examples do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import ArgumentError, ConfigError, MissingDependencyError, NotFoundError
from ..loading.source import Source
from .configuration import read_config_file

CONFIG_NAME = "tokenizer_config.json"
FILE_NAME = "tokenizer.json"
_MOST_BYTES = 256 << 20
_T = TypeVar("_T")
_HELD_BACK = 16  # tokens of one character that a stream waits for; longer runs are not a character


class Tokenizer(Protocol):
    """What both kinds can do; ``vocab_size`` counts all ids, the specials are None where there are none."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with what the model wants before it unless told not to."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """A token for each byte of UTF-8 (0 to 255), then the special tokens in order, the first two <bos> and <eos>."""

    def __init__(self, special_tokens: Sequence[str] = ("<bos>", "<eos>")) -> None:
        names = tuple(special_tokens)
        if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"special_tokens must be two or more different names, got {special_tokens!r}")
        self.special_tokens = names
        self.bos_token_id: int | None = 256
        self.eos_token_id: int | None = 257
        self.vocab_size = 256 + len(names)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The bytes of the text, after <bos>. Raises ArgumentError for a text that is not Unicode."""
        try:
            ids = list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ArgumentError(f"the text is not valid Unicode: {error}") from error
        return [256, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of byte ids. Raises ArgumentError for ids that are none."""
        data = bytearray()
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ArgumentError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
            if token < 256:
                data.append(token)
            elif not skip_special_tokens:
                data += self.special_tokens[token - 256].encode("utf-8")
        return data.decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json."""
        return {
            "tokenizer_class": type(self).__name__,
            "bos_token": self.special_tokens[0],
            "eos_token": self.special_tokens[1],
            "special_tokens": list(self.special_tokens),
        }


class FastTokenizer:
    """A tokenizer.json. Raises MissingDependencyError without the ``tokenizers`` package, ConfigError if malformed."""

    def __init__(self, path: Path, config: dict[str, Any] | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise MissingDependencyError(
                f"{path.name} needs the tokenizers package: pip install 'loadstone[text]'"
            ) from error
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ConfigError(f"{path} has {size} bytes; a tokenizer is at most {_MOST_BYTES}")
        self._path = path
        self._backend = _spoken(lambda: Backend.from_file(str(path)), f"{path} is not a tokenizer")
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._special(config or {}, "bos_token")
        self.eos_token_id = self._special(config or {}, "eos_token")

    def _special(self, config: dict[str, Any], name: str) -> int | None:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(token) if isinstance(token, str) else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the specials that tokenizer.json puts around a text. Raises ArgumentError if not Unicode."""
        try:
            what = f"{self._path} cannot tokenize this text"
            return _spoken(lambda: self._backend.encode(text, add_special_tokens=add_special_tokens).ids, what)
        except (TypeError, UnicodeEncodeError) as error:
            raise ArgumentError(f"the text cannot be tokenized: {error}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        what = f"{self._path} makes no text of these tokens"
        return _spoken(lambda: self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens), what)


def _spoken(call: Callable[[], _T], what: str) -> _T:
    """``call()``; what the tokenizers package raises for a file's sake, panics of its Rust too, as a ConfigError."""
    try:
        return call()
    except (TypeError, UnicodeEncodeError, OverflowError):
        raise  # the caller's arguments
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{what}: {error}") from error


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Raises NotFoundError if it has none that can be read, ConfigError if it is malformed, MissingDependencyError.
    """
    path = source.find(CONFIG_NAME)
    config = read_config_file(path) if path is not None else {}
    if config.get("tokenizer_class") == ByteTokenizer.__name__:
        return ByteTokenizer(config.get("special_tokens", ("<bos>", "<eos>")))
    path = source.find(FILE_NAME)
    if path is None:
        raise NotFoundError(
            f"{source.describe()} has no {FILE_NAME}, the one form of tokenizer that is read "
            "(besides bytes as tokens); save the tokenizer as a fast one"
        )
    return FastTokenizer(path, config)


class TextStream:
    """Text out of tokens one at a time; a character cut over several tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers space a token by what comes before it: decode with that, and leave it out.
        self._context = list(prompt[-_HELD_BACK:])
        self._pending: list[int] = []

    def put(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._pending.append(token)
        return self._take(flush=len(self._pending) > _HELD_BACK)

    def end(self) -> str:
        """What was held back."""
        return self._take(flush=True)

    def _take(self, flush: bool) -> str:
        ids = self._context + self._pending
        text = self._tokenizer.decode(ids)
        if text.endswith("\ufffd") and not flush:
            return ""
        shown = len(self._tokenizer.decode(self._context))
        self._context, self._pending = ids[-_HELD_BACK:], []
        return text[shown:]
