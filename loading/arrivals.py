"""Files that are downloaded while those that came before them are loaded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import IntegrityError
from .header import FileStamp, Header, read_header
from .workers import join

if TYPE_CHECKING:
    from .moves import Move

DOWNLOADS = 4  # at a time: few, so that the first are there soon

Download = Callable[[Path, Callable[[], None]], Path]


class Abandoned(Exception):
    """The load that a download was for has ended."""


class Arrivals:
    """Files whose headers are known and whose bytes are still to come; used by several threads.

    headers: what the files promise. download: brings one, calling what it is given every now and then, which raises
    `Abandoned` once nobody waits any more; returns where it is. Nothing is downloaded before `start`, or before someone
    waits. As a context it ends the downloads if the block raises, and leaves no thread.
    """

    def __init__(self, headers: Mapping[Path, Header], download: Download) -> None:
        self._headers, self._download = dict(headers), download
        self._todo = deque(self._headers)
        self._there: set[Path] = set()
        self._failures: list[BaseException] = []
        self._state = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._stamps: dict[Path, FileStamp] = {}

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
        join(self._threads)

    def record(self, stamps: dict[Path, FileStamp]) -> None:
        """Note the state of each file that arrives in ``stamps``."""
        self._stamps = stamps

    def start(self) -> None:
        """Begin to download; a second call does nothing."""
        with self._state:
            if self._threads:
                return
            count = min(DOWNLOADS, len(self._headers))
            self._threads = [
                threading.Thread(target=self._work, name="loadstone-download", daemon=True) for _ in range(count)
            ]
            for thread in self._threads:
                thread.start()

    def wait(self, file: Path) -> None:
        """Return when the file is there, at once if it is none of these. Raises what its download raised."""
        if file not in self._headers or file in self._there:
            return
        self.start()
        with self._state:
            self._state.wait_for(lambda: file in self._there or self._failures)
            if file not in self._there:
                raise self._failures[0]

    def wait_for_all(self) -> None:
        """`wait` for every file."""
        for file in self._headers:
            self.wait(file)

    def in_order(self, moves: Sequence[Move]) -> Iterator[Move]:
        """The moves file by file, those of files that are there first, each other one as soon as its file arrives."""
        groups: dict[Path, list[Move]] = {}
        for move in moves:
            groups.setdefault(move.entry.file, []).append(move)
        for file in [file for file in groups if file not in self._headers]:
            yield from groups.pop(file)
        while groups:
            self.start()
            with self._state:
                self._state.wait_for(lambda: self._failures or not self._there.isdisjoint(groups))
                ready = [file for file in groups if file in self._there]
                if not ready:
                    raise self._failures[0]
            for file in ready:
                yield from groups.pop(file)

    def abandon(self) -> None:
        """End the downloads, and let everyone who waits for one raise `Abandoned`."""
        with self._state:
            self._failures.append(Abandoned("the load that this file was for has ended"))
            self._state.notify_all()

    def _work(self) -> None:
        while (file := self._next()) is not None:
            try:
                stamp = self._bring(file)
            except BaseException as error:  # raised again where the file is waited for
                with self._state:
                    self._failures.append(error)
                    self._state.notify_all()
                return
            with self._state:
                self._stamps[file] = stamp
                self._there.add(file)
                self._state.notify_all()

    def _next(self) -> Path | None:
        with self._state:
            return self._todo.popleft() if self._todo and not self._failures else None

    def _bring(self, file: Path) -> FileStamp:
        place = self._download(file, self._check)
        if place != file and not file.samefile(place):
            raise IntegrityError(f"{file} was expected, but the download was put at {place}; load again")
        header = read_header(file)
        promised = self._headers[file]
        if header.stamp.size != promised.stamp.size or header.entries != promised.entries:
            raise IntegrityError(
                f"{file} is not what its header promised before it was downloaded; the server gives two versions of "
                "it. Load again, and if that does not help with force_download=True"
            )
        return header.stamp

    def _check(self) -> None:
        if self._failures:
            raise Abandoned("the load that this file was for has ended")
