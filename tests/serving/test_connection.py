"""Requests to a server: time limits, attempts, and every failure as one line."""

import socket
import threading

import pytest
from fakes import Fake

from ppow_jax.errors import ConfigError
from ppow_jax.serving import connection, servers
from ppow_jax.serving.connection import ServerError


def never(ids, tokens):
    raise AssertionError


def connected(fake, **about):
    return connection.connection(fake.url, "--url", **({"timeout": 5.0} | about))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8080",
        "ftp://x",
        "http://",
        "http://h:port",
        "http://h:99999",
        "http://a b",
        "http://h?q=1",
        "",
    ],
)
def test_what_is_no_url_of_a_server(url):
    with pytest.raises(ConfigError) as caught:
        connection.connection(url, "--url", 1.0)
    assert str(caught.value) == f"--url: found {url!r}, expected http://HOST:PORT of a server"


@pytest.mark.parametrize("behind", ["", "/", "/v1", "/v1/"])
def test_the_path_of_the_api_may_stand_behind_it(behind):
    assert connection.connection(f"http://h:1{behind}", "--url", 1.0).url == "http://h:1"


def test_nothing_listens_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        ServerError, match=rf"^--url: {url}/v1/models: not reached .*refused.*; is the server"
    ):
        servers.connect(url, "--url", 5.0)


def test_a_server_that_hangs():
    ended = threading.Event()
    with Fake("vllm", never, before=lambda path, body: ended.wait(10) and None) as fake:
        with pytest.raises(ServerError, match=r"/v1/models: no answer in 0.2 s; is it overloaded\?$"):
            servers.connect(fake.url, "--url", 0.2)
        ended.set()


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (404, {"error": {"message": "no such path"}}, "404 Not Found: no such path"),
        (401, {"message": "a key, please"}, "401 Unauthorized: a key, please"),
        (500, b"<html>", "500 Internal Server Error: '<html>'"),
        (500, b"", "500 Internal Server Error: nothing more"),
        (400, ["odd"], "400 Bad Request: '[\"odd\"]'"),
        (307, {}, "307 Temporary Redirect"),
        (200, b"<html>hello", "found '<html>hello', expected JSON; is it such a server?"),
        (200, {"data": []}, "found {'data': []}, expected OpenAI's list of models"),
        (200, {"data": [{"id": "a"}, {"id": "b"}]}, "serves 2 models, expected one"),
        (200, [1], "found [1], expected OpenAI's list of models"),
    ],
)
def test_answers_of_something_else(status, answer, message):
    with Fake("vllm", never, before=lambda path, body: (status, answer)) as fake:
        with pytest.raises(ServerError) as caught:
            servers.connect(fake.url, "--url", 5.0)
        assert message in str(caught.value)
        assert len(fake.requests) == 1  # a redirect is not followed


def test_a_server_that_is_still_loading_is_asked_again(monkeypatch):
    pauses = []
    monkeypatch.setattr(connection.time, "sleep", pauses.append)
    with Fake("vllm", never) as fake:
        fake.before = lambda path, body: (503, {"error": "loading"}) if len(fake.requests) < 4 else None
        assert servers.connect(fake.url, "--url", 5.0, attempts=4).model == "markov"
        assert pauses == [1.0, 2.0, 4.0]
        fake.before = lambda path, body: (503, {"error": "loading"})
        with pytest.raises(ServerError, match="503 Service Unavailable: loading"):
            connected(fake, attempts=3).json("/x")
        assert len(fake.requests) == 7
        fake.before = lambda path, body: (400, {"error": {"message": "too long"}})
        with pytest.raises(ServerError, match="400 Bad Request: too long"):
            connected(fake, attempts=3).json("/x")
        assert len(fake.requests) == 8  # it would be refused again


@pytest.mark.parametrize("key", ["", "abc"])
def test_the_key_of_the_environment_is_sent(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Fake("vllm", never) as fake:
        servers.connect(fake.url, "--url", 5.0)
        assert fake.headers[0].get("Authorization") == (f"Bearer {key}" if key else None)
