"""Connections to web servers: which addresses may be reached, redirects hop by hop, time limits on every byte.

The owner of the config names the hosts of their shards, so those are trusted, wherever they are. A redirect is
written by somebody else: it may only lead to public addresses, or to hosts that the options list. A name is
resolved once, its addresses are checked, and the connection goes to a checked address, so that a second answer
of the name server cannot lead elsewhere.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from ringweave.data_pipes.storage_base import StorageOptions, redact
from ringweave.tokenizers.errors import DataError

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_FIX_HOST = "if you trust it, name the host in allow_hosts; else get the shards from another server"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def kind_of_address(text: str) -> str:
    """ "public", "private" (loopback, RFC 1918, shared and other ranges that are not global) or "link-local".

    IPv4 inside IPv6 (mapped, 6to4, Teredo, NAT64) counts as the IPv4 address. Link-local holds the metadata
    services of clouds, which hand out credentials; unspecified and multicast addresses count as it.
    """
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner: Address | None = address.ipv4_mapped or address.sixtofour
        if inner is None and address.teredo is not None:
            inner = address.teredo[1]
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner if inner is not None else address
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        return "link-local"
    # The metadata addresses of AWS over IPv6 and of Alibaba lie in private ranges.
    if str(address) in ("fd00:ec2::254", "100.100.100.200"):
        return "link-local"
    return "public" if address.is_global else "private"


def host_listed(host: str, port: int, listed: tuple[str, ...]) -> bool:
    """Whether `h`, `h:port` or `*.parent` of the list names the host."""
    host = host.lower().rstrip(".")
    for entry in listed:
        name = entry.lower().strip()
        if name in (host, f"{host}:{port}", f"[{host}]:{port}"):
            return True
        if name.startswith("*.") and host.endswith(name[1:]):
            return True
    return False


class Clock(threading.local):
    """The time limits of the request that this thread is in the middle of."""

    until = float("inf")  # of time.monotonic()
    stall_s = 20.0

    def left(self) -> float:
        """Seconds until the next byte has to be there. Raises TimeoutError when there are none."""
        left = min(self.stall_s, self.until - time.monotonic())
        if left <= 0:
            raise TimeoutError("the time for this read is over")
        return left


class _TimedRaw(io.RawIOBase):
    """The receiving side of a socket; each wait ends at the stall limit or the deadline, whichever is first."""

    def __init__(self, raw: Any, sock: Any, clock: Clock) -> None:
        self._raw, self._sock, self._clock = raw, sock, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._clock.left())
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """Also holds back a server that sends its headers letter by letter."""

    def __init__(self, sock: Any, *args: Any, clock: Clock, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        raw = self.fp.detach()  # type: ignore[attr-defined]
        self.fp = io.BufferedReader(_TimedRaw(raw, sock, clock), 1 << 16)


@dataclass(frozen=True, slots=True)
class Guard:
    """Which addresses a connection may go to. trusted: the host stands in the user's own config."""

    options: StorageOptions
    trusted: bool
    shown: str  # the redacted URL that leads here, for messages

    def addresses(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """`getaddrinfo` rows of the host, all checked. Raises DataError when one is not allowed, OSError."""
        rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for row in rows:
            kind = kind_of_address(str(row[4][0]))
            if kind == "public" or (kind == "private" and (self.trusted or self.options.allow_private)):
                continue
            if host_listed(host, port, self.options.allow_hosts):
                continue
            whose = "the host of the configured address" if self.trusted else "a redirect"
            raise DataError(
                "refused to connect",
                where=self.shown,
                why=f"{whose} leads to {host}:{port}, whose address {row[4][0]} is {kind}",
                fix=_FIX_HOST,
            )
        return rows


class _Checked:
    """Mixin of urllib3's connections: connects to a checked address, reads under the clock."""

    response_class: Any

    def __init__(self, *args: Any, guard: Guard, clock: Clock, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard, self._clock = guard, clock
        self.response_class = functools.partial(_TimedResponse, clock=clock)

    def _new_conn(self: Any) -> socket.socket:
        last: OSError = OSError("the name has no address")
        try:
            rows = self._guard.addresses(self.host, self.port)
        except OSError as error:
            raise NewConnectionError(self, f"cannot find {self.host}: {error}") from error
        for family, kind, protocol, _, address in rows:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self._clock.left())
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
                return sock
            except OSError as error:
                sock.close()
                last = error
        if isinstance(last, TimeoutError):
            raise ConnectTimeoutError(self, f"no connection to {self.host}:{self.port} in time") from last
        raise NewConnectionError(self, f"cannot connect to {self.host}:{self.port}: {last}") from last


class _PlainConnection(_Checked, HTTPConnection):
    pass


class _TlsConnection(_Checked, HTTPSConnection):
    pass


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class Transport:
    """Kept-alive connections by host. Thread-safe; a forked child makes its own."""

    def __init__(self, options: StorageOptions) -> None:
        self.options = options
        self.clock = Clock()
        self._fresh()

    def _fresh(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._pools: dict[tuple[str, str, int, bool], Any] = {}
        self._tls: ssl.SSLContext | None = None

    def get(
        self, url: str, headers: Mapping[str, str], *, home: str, deadline: float
    ) -> tuple[urllib3.BaseHTTPResponse, str]:
        """The answer to a GET, after redirects, and the URL that gave it; its body is not read yet.

        home: the address that the config leads to, `url` itself or what redirected to it before; its host alone
        is trusted and given credentials. deadline: time.monotonic() at which the read has to be over.
        Raises DataError for a hop that is not allowed and for too many; urllib3's exceptions for what may pass.
        """
        origin = urlsplit(home)
        bare = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        for _ in range(self.options.max_redirects + 1):
            parts = urlsplit(url)
            sent = headers if _origin(parts) == _origin(origin) else bare
            response = self._ask(parts, sent, self._trusted(parts, origin), redact(url), deadline)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response, url
            finish(response)
            url = self._hop(url, location, origin)
        why = f"more than {self.options.max_redirects} redirects, the last to {redact(url)}"
        fix = "give the final address in the config"
        raise DataError("too many redirects", where=redact(home), why=why, fix=fix)

    def _ask(
        self, parts: SplitResult, headers: Mapping[str, str], trusted: bool, shown: str, deadline: float
    ) -> urllib3.BaseHTTPResponse:
        pool = self._pool(parts, trusted, shown)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.clock.stall_s = stall = self.options.timeout_s
        # Connecting and the headers get a limit of their own; the body then has the whole deadline.
        self.clock.until = min(deadline, time.monotonic() + 2 * stall)
        response: urllib3.BaseHTTPResponse = pool.urlopen(
            "GET",
            path,
            headers=headers,
            retries=False,
            redirect=False,
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
            timeout=urllib3.Timeout(connect=stall, read=stall),
        )
        self.clock.until = deadline
        return response

    def _pool(self, parts: SplitResult, trusted: bool, shown: str) -> Any:
        host, port = _origin(parts)[1:]
        key = (parts.scheme, host, port, trusted)
        if self._pid != os.getpid():
            self._fresh()  # a socket shared by two processes would mix their answers
        with self._lock:
            if key not in self._pools:
                guard = Guard(self.options, trusted, shown.partition("?")[0])
                shared: dict[str, Any] = {"guard": guard, "clock": self.clock, "maxsize": 16}
                if parts.scheme == "https":
                    self._tls = self._tls or _tls_context()
                    self._pools[key] = _TlsPool(host, port, ssl_context=self._tls, **shared)
                else:
                    self._pools[key] = _PlainPool(host, port, **shared)
            return self._pools[key]

    def _trusted(self, parts: SplitResult, home: SplitResult) -> bool:
        """Whether the config names this host. Another port of it is another service, unless a usual one."""
        host, port = _origin(parts)[1:]
        home_host, home_port = _origin(home)[1:]
        return host == home_host and port in (home_port, *_PORTS.values())

    def _hop(self, url: str, location: str, home: SplitResult) -> str:
        """Where a redirect leads. Raises DataError if it may not go there."""
        target = location
        try:
            target = urljoin(url, location)
            parts = urlsplit(target)
            host, port = _origin(parts)[1:]
        except ValueError:
            parts, host, port = urlsplit(""), "", 0
        why = ""
        if parts.scheme not in _PORTS or not host:
            why = f"it leads to {redact(target)!r}, which is no http or https address"
        elif urlsplit(url).scheme == "https" and parts.scheme == "http":
            why = f"it leads from https to {redact(target)}, which anyone on the way could change"
        elif (
            self.options.allow_hosts
            and not self._trusted(parts, home)
            and not host_listed(host, port, self.options.allow_hosts)
        ):
            why = f"it leads to {host}:{port}, which allow_hosts does not list"
        if why:
            raise DataError("refused redirect", where=redact(url), why=why, fix=_FIX_HOST)
        return target


@functools.lru_cache(maxsize=32)
def transport_for(options: StorageOptions) -> Transport:
    """One per options, so that all shards of a host share its connections."""
    return Transport(options)


def finish(response: urllib3.BaseHTTPResponse, limit: int = 1 << 14) -> bytes:
    """The first `limit` bytes of a body; its connection is kept if the body ended there."""
    body = b""
    try:
        while len(body) < limit and (piece := response.read1(limit - len(body), decode_content=False)):
            body += piece
        ended = not response.read1(1, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError):
        ended = False
    if ended:
        response.release_conn()
    else:
        response.close()
    return body


def pieces_of(response: urllib3.BaseHTTPResponse, size: int, options: StorageOptions) -> Iterator[bytes]:
    """The next `size` bytes of a body as they come; ends early where the body does.

    Raises TimeoutError when less than `min_rate` bytes a second come over `timeout_s`.
    """
    since, count = time.monotonic(), 0
    while size:
        piece = response.read1(min(size, 1 << 18), decode_content=False)
        if not piece:
            return
        size, count = size - len(piece), count + len(piece)
        yield piece
        now = time.monotonic()
        if now - since >= options.timeout_s:
            if count < options.min_rate * (now - since):
                raise TimeoutError(f"only {count} bytes in {now - since:.1f} s")
            since, count = now, 0


def _origin(parts: SplitResult) -> tuple[str, str, int]:
    """(scheme, host, port). Raises ValueError for a port that is no number."""
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme, 0)


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:  # a slim image without the system's certificates
        context.load_verify_locations(certifi.where())
    return context
