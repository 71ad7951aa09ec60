"""Web servers that send us elsewhere, or never come to an end."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kdad_dist.config.load import load
from kdad_dist.data.index import Index
from kdad_dist.data.reader import ShardReader
from kdad_dist.data.source import fetch
from kdad_dist.errors import ConfigError, DataError
from tests.security.test_shards import stream
from tests.shards import make_shards, serve

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The address of a server that answers everything in this way."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sends_to(place: str) -> Answer:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", place)
        request.end_headers()

    return answer


def endless(status: int) -> Answer:
    """Sends a gigabyte, which nobody should read."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.end_headers()
        for _ in range(1024):
            request.wfile.write(bytes(2**20))
        sent.append(request.path)

    sent: list[str] = []
    answer.sent = sent  # type: ignore[attr-defined]
    return answer


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "pipe:id", "data:,x"])
def test_a_redirection_leads_to_web_servers_alone(tmp_path: Path, place: str):
    with answering(sends_to(place)) as address:
        for use in (lambda: Index.read(address), lambda: fetch(address, "train-00000.tar")):
            with pytest.raises(DataError, match=r"cannot be read: .*(not read|not allowed)"):
                use()


def test_a_redirection_in_a_circle_ends():
    with answering(sends_to("/index.json")) as address, pytest.raises(DataError, match="redirect"):
        Index.read(address)


def test_a_redirection_to_another_web_server_is_followed(tmp_path: Path):
    make_shards(tmp_path)
    with serve(tmp_path) as (there, _):

        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            sends_to(there + request.path)(request)

        with answering(answer) as address:
            assert len(stream(Index.read(address))) == 10


@pytest.mark.parametrize("part", ["index", "range", "shard"])
def test_of_an_answer_without_end_no_more_is_read_than_expected(tmp_path: Path, part: str):
    index = make_shards(tmp_path)
    answer = endless(206 if part == "range" else 200)
    with answering(answer) as address, pytest.raises(DataError, match="more than|do not match"):
        match part:
            case "index":
                fetch(address, "index.json", 2**22)
            case "range":
                with serve(tmp_path) as (sound, _):
                    reader = ShardReader(sound, 16)
                reader.root = address
                reader.image(index.samples[0])
            case "shard":
                with serve(tmp_path) as (sound, _):
                    found = Index.read(sound)
                stream(type(found)(**{**vars(found), "root": address}))
    assert not answer.sent  # type: ignore[attr-defined]


def test_an_answer_that_is_no_http_is_an_error_of_the_data():
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"\x00\xff" * 100 + b"\r\n\r\n")

    with answering(answer) as address, pytest.raises(DataError, match="cannot be read"):
        Index.read(address)


@pytest.mark.parametrize("address", ["http://[", "http://127.0.0.1:port", "http://a b/\n", "//["])
def test_an_address_that_is_none_is_an_error_of_the_data(address: str):
    with pytest.raises(DataError, match=r"cannot be read|does not exist"):
        Index.read(address)


def test_an_address_with_a_password_is_refused_before_it_is_written_anywhere(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data\.shards") as raised:
        load("demo", ["data.shards=https://user:s3cret@example.org/shards"])
    assert "s3cret" not in str(raised.value)
