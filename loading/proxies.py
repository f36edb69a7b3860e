"""``proxies=`` for one load, through huggingface_hub's own client.

Notable: from version 1 on huggingface_hub takes proxies from the environment only and ignores the argument. Here the
requests of a call that has proxies are sent by a second client beside the shared one, which stays as it is for others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from ..errors import ArgumentError

Proxies = tuple[tuple[str, str | None], ...]
_chosen: ContextVar[Proxies] = ContextVar("loadstone_proxies", default=())
_lock = threading.Lock()


def checked_proxies(given: Mapping[str, str | None] | None) -> Proxies:
    """``{"https": "host:port", "http://one.host": "http://user:password@host:port"}``, in today's spelling.

    Keys are schemes, "all", or a scheme and a host; None as a value means no proxy there. Raises ArgumentError (which
    never shows the values: they may hold passwords).
    """
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not all(isinstance(key, str) and key for key in given):
        raise ArgumentError(f"proxies is a dictionary of schemes and addresses, got {type(given).__name__}")
    chosen = []
    for key, address in given.items():
        if address is not None and (not isinstance(address, str) or not address.strip()):
            raise ArgumentError(f"proxies[{key!r}] must be an address such as 'host:3128', or None")
        pattern = key if "://" in key else f"{key}://"
        if pattern.partition("://")[0] not in ("http", "https", "all"):
            raise ArgumentError(f"proxies has the key {key!r}; known are 'http', 'https', 'all', 'http://host'")
        chosen.append((pattern, address if address is None or "://" in address else f"http://{address}"))
    return tuple(chosen)


@contextmanager
def through(proxies: Proxies) -> Iterator[None]:
    """While inside, this thread's requests to the Hub go through the proxies."""
    if not proxies:
        yield
        return
    _install()
    token = _chosen.set(proxies)
    try:
        yield
    finally:
        _chosen.reset(token)


def _install() -> None:
    """Have huggingface_hub make clients that ask for each request which way it goes."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _lock:
        make = _http._GLOBAL_CLIENT_FACTORY
        if not getattr(make, "asks_loadstone", False):
            set_client_factory(_asking(make))


def _asking(make: Callable[[], Any]) -> Callable[[], Any]:
    def factory() -> Any:
        client, others = make(), {}
        plain_send, plain_close = client.send, client.close

        def send(request: Any, **options: Any) -> Any:
            proxies = _chosen.get()
            if not proxies:
                return plain_send(request, **options)
            with _lock:
                if proxies not in others:
                    others[proxies] = _proxied(client, proxies)
            return others[proxies].send(request, **options)

        def close() -> None:
            for other in others.values():
                other.close()
            plain_close()

        client.send, client.close = send, close
        return client

    factory.asks_loadstone = True  # type: ignore[attr-defined]
    return factory


def _proxied(client: Any, proxies: Proxies) -> Any:
    """A client like another, through proxies and never around them."""
    http = import_module(type(client).__module__.partition(".")[0])  # httpx, or what replaced it
    mounts = {pattern: None if address is None else http.HTTPTransport(proxy=address) for pattern, address in proxies}
    hooks = {kind: list(functions) for kind, functions in client.event_hooks.items()}
    hooks.setdefault("response", []).append(_without_xet)
    return http.Client(
        event_hooks=hooks, follow_redirects=client.follow_redirects, timeout=client.timeout, mounts=mounts
    )


def _without_xet(response: Any) -> None:
    """Take away the offer of the Xet protocol, whose own client would go around the proxy."""
    for name in [name for name in response.headers if name.lower().startswith("x-xet-")]:
        del response.headers[name]
