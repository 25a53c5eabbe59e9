"""A local web server that serves byte ranges well, and badly when told to: each request takes the next behaviour."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Behaviour = Callable[["Handler", "Thing", int, int], None]


@dataclass
class Thing:
    """One object of the server. `next` behaviours are used up one a request; then `always`, else it serves well."""

    data: bytes
    etag: str = '"v1"'
    modified: str = ""
    next: list[Behaviour] = field(default_factory=list)
    always: Behaviour | None = None


@dataclass
class Asked:
    """What one request said."""

    path: str
    headers: dict[str, str]
    connection: tuple[str, int]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HostileServer

    def do_GET(self) -> None:
        with self.server.lock:
            asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, self.client_address)
            self.server.asked.append(asked)
            thing = self.server.things.get(self.path)
            behave = good if thing is None or not thing.next else thing.next.pop(0)
            if thing is not None and behave is good and thing.always is not None:
                behave = thing.always
        if thing is None:
            self.answer(404, b"no such thing")
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(match[1]), int(match[2]) + 1) if match else (0, len(thing.data))
        try:
            behave(self, thing, start, min(end, len(thing.data)))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """A whole answer with a length."""
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def range_headers(self, thing: Thing, start: int, end: int) -> dict[str, str]:
        headers = {
            "Content-Range": f"bytes {start}-{end - 1}/{len(thing.data)}",
            "Content-Length": str(end - start),
        }
        headers |= {"ETag": thing.etag} if thing.etag else {}
        return headers | ({"Last-Modified": thing.modified} if thing.modified else {})

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


class HostileServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.things: dict[str, Thing] = {}
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        self.stop = threading.Event()  # wakes whoever stalls

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, path: str, data: bytes, **options: object) -> Thing:
        """Serve `data` at `path`; returns it, to be given behaviours."""
        self.things[path] = thing = Thing(data, **options)  # type: ignore[arg-type]
        return thing

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what the tests are about."""


def good(handler: Handler, thing: Thing, start: int, end: int) -> None:
    """206 with the range; 416 behind the end; 412 for another etag."""
    match = handler.headers.get("If-Match")
    if match is not None and match != thing.etag:
        handler.answer(412)
    elif start >= len(thing.data):
        handler.answer(416, headers={"Content-Range": f"bytes */{len(thing.data)}"})
    else:
        handler.answer(206, thing.data[start:end], handler.range_headers(thing, start, end))


def cut(after: int) -> Behaviour:
    """Says the whole length, sends `after` bytes of it and hangs up."""

    def behave(handler: Handler, thing: Thing, start: int, end: int) -> None:
        handler.head(206, handler.range_headers(thing, start, end))
        handler.wfile.write(thing.data[start : min(end, start + after)])
        handler.close_connection = True

    return behave


def stall(after: int) -> Behaviour:
    """Sends `after` bytes of the body and then nothing. -1: not even the headers."""

    def behave(handler: Handler, thing: Thing, start: int, end: int) -> None:
        if after >= 0:
            handler.head(206, handler.range_headers(thing, start, end))
            handler.wfile.write(thing.data[start : min(end, start + after)])
            handler.wfile.flush()
        handler.server.stop.wait(30)
        handler.close_connection = True

    return behave


def drip(pause_s: float, *, headers: bool = False) -> Behaviour:
    """One byte at a time, of the body or already of the headers."""

    def behave(handler: Handler, thing: Thing, start: int, end: int) -> None:
        handler.close_connection = True
        if headers:
            whole = b"HTTP/1.1 206 Partial Content\r\nX-Long: " + b"x" * 10_000
        else:
            handler.head(206, handler.range_headers(thing, start, end))
            whole = thing.data[start:end]
        for at in range(len(whole)):
            handler.wfile.write(whole[at : at + 1])
            handler.wfile.flush()
            if handler.server.stop.wait(pause_s):
                return

    return behave


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"no") -> Behaviour:
    return lambda handler, thing, start, end: handler.answer(code, body, headers)


def redirect(to: str, code: int = 302) -> Behaviour:
    return status(code, {"Location": to}, b"")


def whole(handler: Handler, thing: Thing, start: int, end: int) -> None:
    """Ignores the range."""
    handler.answer(200, thing.data, {"ETag": thing.etag} if thing.etag else {})


def other_range(shift: int) -> Behaviour:
    """Answers the range `shift` bytes further."""

    def behave(handler: Handler, thing: Thing, start: int, end: int) -> None:
        handler.answer(206, thing.data[start:end], handler.range_headers(thing, start + shift, end + shift))

    return behave


def less(count: int) -> Behaviour:
    """Answers at most `count` bytes of the range, and says so."""

    def behave(handler: Handler, thing: Thing, start: int, end: int) -> None:
        good(handler, thing, start, min(end, start + count))

    return behave


def chunked(code: int, *, broken: bool = False) -> Behaviour:
    """Chunked, without a length; `broken`: it ends in the middle of a chunk."""

    def behave(handler: Handler, thing: Thing, start: int, end: int) -> None:
        headers = handler.range_headers(thing, start, end) if code == 206 else {}
        headers.pop("Content-Length", None)
        handler.head(code, {**headers, "Transfer-Encoding": "chunked"})
        body = thing.data[start:end] if code == 206 else thing.data
        for at in range(0, len(body), 1000):
            piece = body[at : at + 1000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if broken and at >= 2000:
                handler.close_connection = True
                return
        handler.wfile.write(b"0\r\n\r\n")

    return behave


def packed(handler: Handler, thing: Thing, start: int, end: int) -> None:
    """Compressed, though nobody asked."""
    headers = handler.range_headers(thing, start, end) | {"Content-Encoding": "gzip"}
    handler.head(206, headers)
    handler.wfile.write(thing.data[start:end])


def slow(bytes_a_second: float) -> Behaviour:
    """Serves well, but slowly."""

    def behave(handler: Handler, thing: Thing, start: int, end: int) -> None:
        handler.head(206, handler.range_headers(thing, start, end))
        for at in range(start, end, 4096):
            piece = thing.data[at : min(end, at + 4096)]
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(len(piece) / bytes_a_second)

    return behave


def ranges(asked: Iterable[Asked]) -> list[tuple[int, int]]:
    """The ranges of requests as (start, end)."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", one.headers.get("range", "")) for one in asked]
    return [(int(match[1]), int(match[2]) + 1) for match in found if match]


@contextmanager
def serving() -> Iterator[HostileServer]:
    """A server that answers until the block ends."""
    with HostileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
