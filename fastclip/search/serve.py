"""A web page on this machine for searching a folder: text, a click on a picture, or one that is dropped on the page.

What is served are the page, results, and pictures of the folder, which are named by the numbers of their contents and
always encoded anew: no name of a file is ever taken from a request, and no file is passed on as it is.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastclip.data.faults import BadSample
from fastclip.embedding.query import Term, parse_texts, reading
from fastclip.search.contact_sheet import thumbnail
from fastclip.search.engine import Match, SearchEngine

__all__ = ["make_server"]

logger = logging.getLogger(__name__)
_LOOPBACK = "127.0.0.1"
_UPLOAD = 32 * 2**20  # bytes of a picture that is dropped
_SIDES = {"small": 320, "large": 1600}  # pixels
_COUNT, _MOST = 60, 500  # results
_DECODERS = 4  # large pictures that are decoded at a time, whatever the browser asks for at once
_GONE = (ConnectionError, TimeoutError)  # the browser has gone on, or says no more
_Route = Callable[[dict[str, str]], tuple[str, bytes]]  # options -> type and content of the answer
_POLICY = (  # the page's own script and style stand in it
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
)


def make_server(engine: SearchEngine, *, port: int = 0) -> ThreadingHTTPServer:
    """A server on the loopback address, for its ``serve_forever``; `server_port` is its port, any free one for 0.

    Raises:
        OSError: the port is taken.
    """
    handler = partial(_Handler, engine, threading.Semaphore(_DECODERS))
    try:
        return ThreadingHTTPServer((_LOOPBACK, port), handler)
    except OSError as error:
        raise OSError(f"port {port} of {_LOOPBACK}: {error.strerror}; --port 0 takes any free one") from error


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "fastclip", ""
    server: ThreadingHTTPServer
    timeout = 60  # seconds that a connection may rest

    def __init__(self, engine: SearchEngine, decoding: threading.Semaphore, *rest: Any) -> None:
        self._engine, self._decoding, self._reading = engine, decoding, ""
        super().__init__(*rest)

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/search": self._text, "/like": self._like, "/picture": self._picture})

    def do_POST(self) -> None:
        self._answer({"/search": self._dropped})

    def _answer(self, routes: dict[str, _Route]) -> None:
        try:
            self._check()
            url = urlsplit(self.path)  # ValueError of an address that is none
            if (route := routes.get(url.path)) is None:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")
            kind, data = route({name: values[-1] for name, values in parse_qs(url.query).items()})
            self._send(HTTPStatus.OK, kind, data)
        except _Refused as refused:
            self.close_connection = True  # what was sent with the request may not have been read
            self._send_error(refused.status, str(refused))
        except ValueError as error:
            self._send_error(HTTPStatus.BAD_REQUEST, str(error))
        except _GONE:
            self.close_connection = True
        except Exception as error:  # a bug, or a disk that fails: the server goes on
            logger.exception("%s", self.path)
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _check(self) -> None:
        """Pages of the web may not reach what is here through the browser of who sits here: neither by a name that they
        let point at this address (DNS rebinding), nor by requests or pictures of their own."""
        port, names = self.server.server_port, {_LOOPBACK, "localhost"}
        hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())  # which browsers leave out
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        if self.headers.get("Host") not in hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "this is served to this machine only")
        if site not in ("none", "same-origin") or origin not in (None, *(f"http://{host}" for host in hosts)):
            raise _Refused(HTTPStatus.FORBIDDEN, "this is served to its own page only")

    def _page(self, options: dict[str, str]) -> tuple[str, bytes]:
        page = (files("fastclip.search") / "page.html").read_bytes()
        return "text/html; charset=utf-8", page

    def _text(self, options: dict[str, str]) -> tuple[str, bytes]:
        query = options.get("q", "")
        terms = parse_texts(query)
        answer = self._results(self._engine.find(terms, _count(options)))
        self._reading = reading(query, terms)  # only where the query has an answer
        return answer

    def _like(self, options: dict[str, str]) -> tuple[str, bytes]:
        path = self._path(options)
        return self._results(self._engine.find([Term(1.0, path=path)], _count(options)))

    def _dropped(self, options: dict[str, str]) -> tuple[str, bytes]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a picture is sent with its length")
        if int(length) > _UPLOAD:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a picture may have {_UPLOAD // 2**20} MiB")
        data = self.rfile.read(int(length))
        with self._decoding:
            vector = self._engine.picture_vector(io.BytesIO(data), "this picture")
        return self._results(self._engine.find_vector(vector, _COUNT))

    def _picture(self, options: dict[str, str]) -> tuple[str, bytes]:
        side = _SIDES.get(options.get("size", "small"))
        if side is None:
            raise ValueError(f"size must be one of {', '.join(_SIDES)}")
        path = self._path(options)
        try:
            with self._decoding:
                picture = thumbnail(path, side)
        except BadSample as bad:
            raise _Refused(HTTPStatus.NOT_FOUND, bad.fault.reason) from bad
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)  # anew: the file itself may hold a place, a name, or a page
        return "image/jpeg", file.getvalue()

    def _path(self, options: dict[str, str]) -> Path:
        """Return the path of the picture with this number, if it lies in the folder: a link may lead elsewhere."""
        number, folder = options.get("id", ""), os.path.join(self._engine.folder, "")
        paths = self._engine.paths_of(int(number)) if number.isascii() and number.isdecimal() else []
        path = next((path for path in paths if os.path.realpath(path).startswith(folder)), None)
        if path is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such picture")
        return Path(path)

    def _results(self, matches: list[Match]) -> tuple[str, bytes]:
        within = len(os.path.join(self._engine.folder, ""))
        names = [match.path[within:].encode("utf-8", "replace").decode() for match in matches]
        rows = [{"id": match.content, "name": name, "score": match.score} for match, name in zip(matches, names)]
        return "application/json", json.dumps(rows).encode()

    def _send_error(self, status: HTTPStatus, reason: str) -> None:
        try:
            self._send(status, "text/plain; charset=utf-8", reason.encode("utf-8", "replace"))
        except _GONE:
            self.close_connection = True

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if self._reading:
            self.send_header("Fastclip-Query", json.dumps(self._reading))  # ASCII, in one line
            self._reading = ""
        self.send_header("Cache-Control", "no-store")  # another folder's page may have the same address next
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _count(options: dict[str, str]) -> int:
    count = options.get("n", str(_COUNT))
    if not (count.isascii() and count.isdecimal() and 0 < int(count) <= _MOST):
        raise ValueError(f"n must be from 1 to {_MOST}")
    return int(count)
