"""A local web page for searching a folder by text, by a click on an image, or by an image dropped on the page.

The server answers with the page, results of searches, and images of the folder. Requests name images by their content
ids, never by file names. Images are always encoded again, so that no file of the folder is sent unchanged.
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
_UPLOAD = 32 * 2**20  # largest size of a dropped image, in bytes
_SIDES = {"small": 320, "large": 1600}  # longer side of a served image, in pixels
_COUNT, _MOST = 60, 500  # default and largest number of results
_DECODERS = 4  # images decoded at a time, which bounds the memory if a browser requests many
_GONE = (ConnectionError, TimeoutError)  # the browser has closed the connection or stopped sending
_Route = Callable[[dict[str, str]], tuple[str, bytes]]  # query parameters -> content type and body of the response
_POLICY = (  # 'unsafe-inline', because script and style are part of the page
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
)


def make_server(engine: SearchEngine, *, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the search page on the loopback address. Call its ``serve_forever`` to run it.

    Args:
        engine: engine that answers the searches.
        port: port to listen on; 0 takes any free one, which is then ``server_port``.

    Raises:
        OSError: the port is in use.
    """
    handler = partial(_Handler, engine, threading.Semaphore(_DECODERS))
    try:
        return ThreadingHTTPServer((_LOOPBACK, port), handler)
    except OSError as error:
        raise OSError(f"port {port} of {_LOOPBACK}: {error.strerror}; use --port 0 for any free one") from error


class _Refused(Exception):
    """An error response with the given status."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "fastclip", ""
    server: ThreadingHTTPServer
    timeout = 60  # seconds after which an idle connection is closed

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
            url = urlsplit(self.path)  # raises ValueError for an invalid address
            if (route := routes.get(url.path)) is None:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")
            kind, data = route({name: values[-1] for name, values in parse_qs(url.query).items()})
            self._send(HTTPStatus.OK, kind, data)
        except _Refused as refused:
            self.close_connection = True  # the body of the request may not have been read
            self._send_error(refused.status, str(refused))
        except ValueError as error:
            self._send_error(HTTPStatus.BAD_REQUEST, str(error))
        except _GONE:
            self.close_connection = True
        except Exception as error:  # a bug or a failing disk; the server continues
            logger.exception("%s", self.path)
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _check(self) -> None:
        """Refuse requests that other web pages make through the user's browser.

        Such a page could let its own host name point to this address (DNS rebinding), or send requests to and embed
        images from this server.
        """
        port, names = self.server.server_port, {_LOOPBACK, "localhost"}
        hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())  # browsers omit port 80
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        if self.headers.get("Host") not in hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "this server answers requests from this machine only")
        if site not in ("none", "same-origin") or origin not in (None, *(f"http://{host}" for host in hosts)):
            raise _Refused(HTTPStatus.FORBIDDEN, "this server answers requests from its own page only")

    def _page(self, options: dict[str, str]) -> tuple[str, bytes]:
        page = (files("fastclip.search") / "page.html").read_bytes()
        return "text/html; charset=utf-8", page

    def _text(self, options: dict[str, str]) -> tuple[str, bytes]:
        query = options.get("q", "")
        terms = parse_texts(query)
        answer = self._results(self._engine.find(terms, _count(options)))
        self._reading = reading(query, terms)  # set only if the search succeeded
        return answer

    def _like(self, options: dict[str, str]) -> tuple[str, bytes]:
        path = self._path(options)
        return self._results(self._engine.find([Term(1.0, path=path)], _count(options)))

    def _dropped(self, options: dict[str, str]) -> tuple[str, bytes]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "an image must be sent with a Content-Length")
        if int(length) > _UPLOAD:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an image may have at most {_UPLOAD // 2**20} MiB")
        data = self.rfile.read(int(length))
        with self._decoding:
            vector = self._engine.picture_vector(io.BytesIO(data), "this image")
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
        picture.save(file, "JPEG", quality=85)  # not the file itself, which may hold a location, a name or HTML
        return "image/jpeg", file.getvalue()

    def _path(self, options: dict[str, str]) -> Path:
        """Return the path of the requested image. Files outside of the folder, to which links may lead, are refused."""
        number, folder = options.get("id", ""), os.path.join(self._engine.folder, "")
        paths = self._engine.paths_of(int(number)) if number.isascii() and number.isdecimal() else []
        path = next((path for path in paths if os.path.realpath(path).startswith(folder)), None)
        if path is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such image")
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
            self.send_header("Fastclip-Query", json.dumps(self._reading))  # JSON keeps it ASCII and on one line
            self._reading = ""
        self.send_header("Cache-Control", "no-store")  # a later server for another folder may have the same address
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
        raise ValueError(f"n must be between 1 and {_MOST}")
    return int(count)
