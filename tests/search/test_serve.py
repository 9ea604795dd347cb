"""`fastclip serve`: the page in a browser, and the contents that the server hands out."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import needs

needs("train")
from PIL import Image

from fastclip.search import serve
from fastclip.search.engine import SearchEngine
from fastclip.search.serve import make_server
from support.colours import Colours, draw, picture_vector, text_vector
from support.processes import in_session, start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Served:
    """A folder of 20 images, its server, and an image outside of the folder."""

    def __init__(self, folder: Path) -> None:
        self.photos = [draw(folder / "photos" / f"{k % 2}" / f"ü & <b> {k}.png", k) for k in range(20)]
        self.secret = draw(folder / "secret.png", 100)
        (folder / "photos" / "link.png").symlink_to(self.secret)
        self.engine = SearchEngine(Colours(), folder / "photos", indices=folder / "cache")
        self.engine.update()
        self.server = make_server(self.engine)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        found = response.status, response.headers["Content-Type"], response.read()
        connection.close()
        return found

    def json(self, path: str, **rest: Any) -> Any:
        status, kind, data = self.ask(path, **rest)
        assert (status, kind) == (200, "application/json"), data
        return json.loads(data)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("served").resolve())
    yield found
    found.server.shutdown()
    found.server.server_close()


def ranked(served: Served, query: Any, without: Path | None = None) -> list[str]:
    """Return the names of the photos in descending order of their scores."""
    folder = Path(served.engine.folder)
    photos = [*served.photos, folder / "link.png"]
    ordered = sorted(
        (photo for photo in photos if photo != without), key=lambda path: -float(query @ picture_vector(path))
    )
    return [str(photo.relative_to(folder)) for photo in ordered]


def names(results: Any) -> list[str]:
    return [one["name"] for one in results]


def test_results_are_those_of_the_engine(served: Served) -> None:
    query = urllib.parse.quote("2:red + blue - green")
    expected = 2 * text_vector("red") + text_vector("blue") - text_vector("green")
    results = served.json(f"/search?q={query}")
    assert names(results) == ranked(served, expected)
    scores = [float(expected @ picture_vector(Path(served.engine.folder) / one["name"])) for one in results]
    assert [one["score"] for one in results] == pytest.approx(scores, abs=1e-5)
    assert names(served.json(f"/search?q={query}&n=3")) == names(results)[:3]
    first = Path(served.engine.folder) / names(results)[0]
    like = served.json(f"/like?id={results[0]['id']}")
    assert names(like) == ranked(served, picture_vector(first), without=first)
    data = served.secret.read_bytes()
    assert names(served.json("/search", method="POST", body=data)) == ranked(served, picture_vector(served.secret))


def test_how_a_query_was_read_is_a_header(served: Served) -> None:
    for query, told in (("red", None), ('2:red - "ü\n"', '+ 2 * text "red" - 1 * text "ü"')):
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/search?q={urllib.parse.quote(query)}") as answer:
            header = answer.headers["Fastclip-Query"]
        assert (header and json.loads(header)) == told
    status, _, said = served.ask("/search?q=red%20-%20red")
    assert status == 400 and b"cancel each other" in said


def test_picture_is_encoded_anew_at_the_size_that_is_asked(served: Served) -> None:
    Image.new("RGB", (2000, 1000), "red").save(Path(served.engine.folder) / "wide.png", pnginfo=None)
    served.engine.update()
    try:
        (wide,) = (one for one in served.json("/search?q=red") if one["name"] == "wide.png")
        for size, pixels in (("small", (320, 160)), ("large", (1600, 800))):
            status, kind, data = served.ask(f"/picture?id={wide['id']}&size={size}")
            picture = Image.open(io.BytesIO(data))
            assert (status, kind, picture.format, picture.size) == (200, "image/jpeg", "JPEG", pixels)
            assert np.abs(np.asarray(picture).mean((0, 1)) - (254, 0, 0)).max() < 2
    finally:
        (Path(served.engine.folder) / "wide.png").unlink()
        served.engine.update()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/picture?id=0", 404),
        ("/picture?id=99999", 404),
        ("/picture?id=-1", 404),
        ("/picture?id=../secret.png", 404),
        ("/picture?id=1&size=huge", 400),
        ("/picture", 404),
        ("/like?id=99999999999999999999999", 404),
        ("/../secret.png", 404),
        ("/%2e%2e/secret.png", 404),
        ("//etc/passwd", 404),
        ("/search?q=", 400),
        ("/search?q=a&n=0", 400),
        ("/search?q=a&n=1e3", 400),
    ],
)
def test_what_is_not_there_is_not_served(served: Served, path: str, status: int) -> None:
    found, kind, _ = served.ask(path)
    assert (found, kind) == (status, "text/plain; charset=utf-8")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_address_that_is_none_is_refused(served: Served, method: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(f"{method} http://[ HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode())
        assert line.makefile("rb").readline().split()[1:2] == [b"400"]
    assert "Traceback" not in capfd.readouterr().err and served.ask("/")[0] == 200


def test_nothing_outside_the_folder_is_served(served: Served) -> None:
    """Images outside the folder are not served. A link may lead outside: its name appears among the results, but not
    its image. A text that equals a path remains a text.
    """
    (link,) = (one for one in served.json("/search?q=x") if one["name"] == "link.png")
    for path in (f"/picture?id={link['id']}", f"/like?id={link['id']}"):
        assert served.ask(path)[0] == 404
    assert served.ask(f"/search?q={urllib.parse.quote(str(served.secret))}")[0] == 200
    before = served.json(f"/search?q={served.secret}")
    assert names(before) == ranked(served, text_vector(str(served.secret)))
    other = draw(Path(served.engine.folder).parent / "beside" / "x.png", 50)
    SearchEngine(Colours(), other.parent, indices=Path(served.engine.folder).parent / "cache").update()
    numbers = [served.ask(f"/picture?id={number}")[0] for number in range(30)]
    assert numbers.count(200) == 20  # of 22 contents in the index


def test_picture_that_a_link_outside_equals_is_served(served: Served) -> None:
    folder = Path(served.engine.folder)
    copy = Path(shutil.copy(served.secret, folder / "zz copy.png"))  # sorted after link.png
    served.engine.update()
    try:
        (one,) = (one for one in served.json("/search?q=x") if one["name"] == copy.name)
        assert served.ask(f"/picture?id={one['id']}")[0] == 200
    finally:
        copy.unlink()
        served.engine.update()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1:1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_pages_of_the_web_are_refused(served: Served, headers: dict[str, str]) -> None:
    named = {name: value.replace("{port}", str(served.port)) for name, value in headers.items()}
    for path, method in (("/", "GET"), ("/search?q=a", "GET"), ("/picture?id=1", "GET"), ("/search", "POST")):
        status, _, data = served.ask(path, method, b"x" if method == "POST" else None, **named)
        assert status == 403 and b"this server answers requests from" in data
    own = {
        "Host": f"localhost:{served.port}",
        "Origin": f"http://localhost:{served.port}",
        "Sec_Fetch_Site": "same-origin",
    }
    assert served.ask("/search?q=a", **own)[0] == 200


def test_port_of_http_may_be_left_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.ask("/", Host="localhost")[0] == 403
    monkeypatch.setattr(served.server, "server_port", 80)
    for host in ("localhost", "127.0.0.1", "localhost:80"):
        assert served.ask("/", Host=host, Origin=f"http://{host}")[0] == 200
    assert served.ask("/", Host="evil.example")[0] == 403


@pytest.mark.fault("An upload stalls", "Its connection is closed, and the server continues")
def test_upload_that_stalls_is_dropped(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve._Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(f"POST /search HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 9\r\n\r\nx".encode())
        assert line.makefile("rb").read() == b""
    assert "Traceback" not in caplog.text and served.ask("/")[0] == 200


def test_only_the_loopback_address_is_bound(served: Served) -> None:
    assert served.server.server_address[0] == "127.0.0.1"
    with pytest.raises(
        OSError, match=f"port {served.port} of 127.0.0.1: Address .* in use; use --port 0 for any free one"
    ):
        make_server(served.engine, port=served.port)


def test_dropped_picture_that_cannot_be_used_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, data = served.ask("/search", "POST", b"<html>")
    assert status == 400 and b"not a readable image" in data
    bomb = io.BytesIO()
    Image.new("L", (20_000, 10_000)).save(bomb, "PNG", compress_level=1)
    status, _, data = served.ask("/search", "POST", bomb.getvalue())
    assert status == 400 and b"too large" in data
    for length, expected in (("33554433", 413), ("-5", 411), ("x", 411)):
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
            head = f"POST /search HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: {length}\r\n\r\n"
            line.sendall(head.encode())
            assert line.makefile("rb").readline().split()[1] == b"%d" % expected
    assert served.ask("/elsewhere", "POST", b"x")[0] == 404
    assert served.ask("/", "PUT", b"x")[0] == 501


def test_picture_that_has_gone_and_a_bug_leave_the_server_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = served.photos[0]
    (one,) = (one for one in served.json("/search?q=x") if one["name"].endswith(f"/{photo.name}"))
    photo.rename(photo.parent / "away")
    assert served.ask(f"/picture?id={one['id']}")[0] == 404
    (photo.parent / "away").rename(photo)
    with monkeypatch.context() as patch:
        patch.setattr(serve, "thumbnail", lambda *_: 1 / 0)
        assert served.ask(f"/picture?id={one['id']}")[0] == 500
    assert served.ask(f"/picture?id={one['id']}")[0] == 200


def test_many_requests_at_once_are_answered(served: Served) -> None:
    answers: list[int] = []
    shown = [one["id"] for one in served.json("/search?q=x") if one["name"] != "link.png"]
    work = [f"/picture?id={number}" for number in shown] + [f"/search?q=text{k}" for k in range(24)]
    threads = [threading.Thread(target=lambda path=path: answers.append(served.ask(path)[0])) for path in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 44


def test_page_is_whole_and_asks_for_nothing_else(served: Served) -> None:
    status, kind, data = served.ask("/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert not re.search(rb"https?://|@import|<link[^>]+stylesheet|<script[^>]+src", data)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    needs("playwright")
    import playwright.sync_api as sync_api

    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_page_searches_by_text_by_click_and_by_drop(served: Served, browser: Any) -> None:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda told: problems.append(told.text) if told.type == "error" else None)

    def shown(count: int, told: str) -> list[str]:
        page.wait_for_function(
            "([count, told]) => document.querySelectorAll('#results li').length === count"
            " && document.getElementById('status').textContent.startsWith(told + ':')",
            arg=[count, told],
        )
        return [link.text_content() for link in page.query_selector_all("#results a")]

    page.goto(f"http://127.0.0.1:{served.port}/")
    (served_link := Path(served.engine.folder) / "link.png").unlink()  # an image that is refused is an error
    served.engine.update()
    try:
        page.fill("#query", "2:red - blue")
        page.keyboard.press("Enter")
        served.photos.sort()
        query = 2 * text_vector("red") - text_vector("blue")
        by_text = ranked_photos(served, query)
        assert shown(20, "2:red - blue") == by_text
        page.wait_for_function("[...document.images].slice(0, 3).every(one => one.complete && one.naturalWidth === 5)")
        page.click("#results li:nth-child(2) button")
        chosen = Path(served.engine.folder) / by_text[1]
        assert shown(19, f"Like {by_text[1]}") == ranked_photos(served, picture_vector(chosen), chosen)
        page.go_back()
        assert shown(20, "2:red - blue") == by_text
        data = list(served.secret.read_bytes())
        page.evaluate(
            """data => {
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([new Uint8Array(data)], "mine.png", {type: "image/png"}));
                document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
            }""",
            data,
        )
        assert shown(20, "Like mine.png") == ranked_photos(served, picture_vector(served.secret))
        assert not problems
    finally:
        served_link.symlink_to(served.secret)
        served.engine.update()
        page.close()


def ranked_photos(served: Served, query: Any, without: Path | None = None) -> list[str]:
    folder = Path(served.engine.folder)
    ordered = sorted(served.photos, key=lambda path: -float(query @ picture_vector(path)))
    return [str(photo.relative_to(folder)) for photo in ordered if photo != without]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("number", "ignored"),
    [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGTERM, [signal.SIGINT])],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM in the background"],
)
def test_command_serves_until_a_signal(
    tmp_path: Path, checkpoint: Path, number: signal.Signals, ignored: list[signal.Signals]
) -> None:
    draw(tmp_path / "photos" / "a.png", 1)
    code = "import sys; from fastclip.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["serve", tmp_path / "photos", "--checkpoint", checkpoint, "--device", "cpu", "--port", "0"]
    environment = os.environ | {"FASTCLIP_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    command = start([sys.executable, "-c", code, *words], env=environment, ignored=ignored)
    assert command.stdout is not None
    address = urllib.parse.urlsplit(command.stdout.readline().strip())
    assert address.hostname == "127.0.0.1" and address.port, command.communicate()

    def find() -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=60)
        connection.request("GET", "/search?q=cat")
        return json.loads(connection.getresponse().read())

    assert [one["name"] for one in find()] == ["a.png"]
    for other in ignored:
        command.send_signal(other)
    assert [one["name"] for one in find()] == ["a.png"]
    begin = time.monotonic()
    command.send_signal(number)
    _, said = command.communicate(timeout=60)
    assert command.returncode == 128 + number and "Traceback" not in said, said
    assert time.monotonic() - begin < 10 and not in_session(command.pid)
    with pytest.raises(ConnectionRefusedError):
        find()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "photos"]
