"""Headers of files on a server, fetched by ranges before the files themselves: all that planning a load needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

from .header import FileStamp, Header, parse_header

FIRST = 128 << 10  # bytes asked for at first; most headers are shorter
MOST = 25 << 20  # bytes of a header that are fetched this way
TIMEOUT = 10.0  # seconds without an answer
_TOGETHER = 8
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def glimpse(urls: Mapping[Path, str], headers: Mapping[str, str]) -> dict[Path, Header] | None:
    """The safetensors header of each URL, as of the file that it will be; None if the server does not give all.

    The first one is asked for alone: a server without ranges costs one request, whose body is not read. headers: of
    the requests. The stamps have the files' sizes and nothing else. Raises FormatError for a header that is no good.
    """
    items = list(urls.items())
    first = _header(*items[0], headers)
    if first is None:
        return None
    with ThreadPoolExecutor(_TOGETHER) as pool:
        futures = [pool.submit(copy_context().run, _header, file, url, headers) for file, url in items[1:]]
        try:
            found = [first, *(future.result() for future in futures)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    known = {header.file: header for header in found if header is not None}
    return known if len(known) == len(items) else None


def _header(file: Path, url: str, headers: Mapping[str, str]) -> Header | None:
    got = ranged(url, headers, 0, FIRST)
    if got is None:
        return None
    raw, size = got
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 2 <= length <= min(MOST, size - 8):
        return None  # what it is instead is told once it is there
    if len(raw) < 8 + length:
        rest = ranged(url, headers, len(raw), 8 + length)
        if rest is None or rest[1] != size:
            return None
        raw += rest[0]
    return parse_header(raw[8 : 8 + length], file, FileStamp(size, 0, 0, 0))


def ranged(url: str, headers: Mapping[str, str], begin: int, end: int) -> tuple[bytes, int] | None:
    """Bytes ``begin`` to ``end``, or to the end of what is there, and the size of the whole.

    None if the server answers with anything else, or cannot be reached.
    """
    wish = {**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    try:
        with _request(url, wish) as (status, answer, chunks):
            told = _RANGE.fullmatch(answer.get("Content-Range") or "")
            if status != 206 or told is None:
                return None
            start, last, size = map(int, told.groups())
            wanted = min(end, size) - begin
            if start != begin or last + 1 - begin != wanted:
                return None
            raw = bytearray()
            for chunk in chunks:
                raw += chunk
                if len(raw) > wanted:
                    return None
    except Exception as error:  # of whatever library carries the request; downloading, which comes next, says it well
        if isinstance(error, (TypeError, AttributeError, NameError)):  # a fault of ours, or a version we do not know
            raise
        return None
    return (bytes(raw), size) if len(raw) == wanted else None


@contextmanager
def _request(url: str, headers: Mapping[str, str]) -> Iterator[tuple[int, Any, Iterator[bytes]]]:
    """Status, headers and body, not read yet, of a GET by huggingface_hub's own client, as the user configured it.

    That is httpx's or, in older versions, requests'. Both keep the token from other hosts that they are sent on to.
    """
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    if hasattr(session, "stream") and not hasattr(session, "mount"):
        with session.stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as answer:
            yield answer.status_code, answer.headers, answer.iter_bytes()
    else:
        with session.get(url, headers=headers, timeout=TIMEOUT, stream=True) as answer:
            yield answer.status_code, answer.headers, answer.iter_content(1 << 16)
