"""Work done in processes of its own: with fewer rights, killed, or several at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
NOBODY = 65534


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A fresh Python that runs ``code`` with ``sys.argv[1:]``, its helpers of the tests importable."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def said(process: subprocess.Popen[str]) -> str:
    """What a process printed, which must end well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def unprivileged(work: Callable[[], Any]) -> Any:
    """The JSON value that ``work`` returns in a forked process for which permissions count, or its error's facts.

    An error comes back as {"error": its class, "text": its message, "errno": its number, "known": whether it is ours}.
    """
    from loadstone.errors import LoadstoneError

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            try:
                answer = work()
            except BaseException as error:
                ours = isinstance(error, LoadstoneError)
                number = getattr(error, "errno", None)
                answer = {"error": type(error).__name__, "text": str(error), "errno": number, "known": ours}
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if not data:
        pytest.fail("the process for which permissions count said nothing")
    return json.loads(data)
