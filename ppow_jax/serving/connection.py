"""HTTP to a server: JSON there and back, with a time limit, and every failure as one line."""

import dataclasses
import http.client
import json
import os
import reprlib
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel.console import log

KEY = "OPENAI_API_KEY"  # the environment variable that may hold a server's key
_PASSING = (408, 429, 500, 502, 503, 504)  # statuses of what may be over in a moment
_PAUSE, _PAUSE_AT_MOST = 1.0, 30.0  # seconds before the second attempt, each pause twice the one before
_SHOWN = 200  # characters of what a server says


class ServerError(UserError):
    """A server is not there, refuses, or answers something else than expected.

    Attributes:
      passing: whether the same request may be answered in a moment.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another server would get the key, and a POST would become a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclasses.dataclass(frozen=True)
class Connection:
    """Requests to one server.

    Attributes:
      url: `http://HOST:PORT`, without a path of the API.
      timeout: seconds that the server may be silent.
      attempts: how often a request is sent, if what goes wrong may be over in a moment.
    """

    url: str
    timeout: float
    attempts: int = 1

    def json(self, path: str, body: Any = None) -> Any:
        """The answer to a POST of a JSON value, or to a GET where there is none.

        Raises:
          ServerError: naming the address: no answer, an error, or no JSON.
        """
        text = self.text(path, body)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ServerError(
                f"{self.url}{path}: found {text[:_SHOWN]!r}, expected JSON; is it such a server?"
            ) from e

    def text(self, path: str, body: Any = None) -> str:
        """As `json`, whatever the answer holds."""
        pause = _PAUSE
        for attempt in range(1, self.attempts + 1):
            try:
                return self._once(path, body)
            except ServerError as e:
                if not e.passing or attempt == self.attempts:
                    raise
                log.warning("%s; attempt %d of %d follows in %g s", e, attempt + 1, self.attempts, pause)
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE_AT_MOST)
        raise AssertionError("no attempt")

    def _once(self, path: str, body: Any) -> str:
        where = f"{self.url}{path}"
        headers = {"Content-Type": "application/json", "Accept": "*/*"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(where, data, headers)
            with _OPENER.open(request, timeout=self.timeout) as answer:
                return answer.read().decode(errors="replace")
        except urllib.error.HTTPError as e:
            raise ServerError(f"{where}: {e.code} {e.reason}: {_said(e)}", e.code in _PASSING) from e
        except TimeoutError as e:
            raise ServerError(f"{where}: no answer in {self.timeout:g} s; is it overloaded?", True) from e
        except (http.client.HTTPException, OSError, ValueError) as e:
            reason = getattr(e, "reason", None) or e
            if isinstance(reason, TimeoutError):
                reason = f"no connection in {self.timeout:g} s"
            said = str(reason) or type(reason).__name__
            raise ServerError(f"{where}: not reached ({said}); is the server running?", True) from e


def connection(url: str, where: str, timeout: float, attempts: int = 1) -> Connection:
    """A connection to what a user names; a path `/v1` may stand behind it.

    Args:
      url: of the server.
      where: the flag or key that has it, for the error.
      timeout: as `Connection`'s.
      attempts: as `Connection`'s.

    Raises:
      ConfigError: it is no URL of a server.
    """
    base = url.rstrip("/").removesuffix("/v1")
    try:
        parts = urllib.parse.urlsplit(base)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none
        valid = False
    if (
        not valid
        or parts.query
        or parts.fragment
        or not base.isascii()
        or not base.isprintable()
        or " " in base
    ):
        raise ConfigError(f"{where}: found {url!r}, expected http://HOST:PORT of a server")
    return Connection(base, timeout, attempts)


def _said(error: urllib.error.HTTPError) -> str:
    """What a server says of an error: the message of OpenAI's form, or the beginning of whatever it is."""
    try:
        text = error.read().decode(errors="replace")
    except (http.client.HTTPException, OSError):
        return "nothing more"
    try:
        about = json.loads(text)
        about = about.get("error", about)
        return str(about.get("message", about) if isinstance(about, dict) else about)[:_SHOWN]
    except (ValueError, AttributeError, RecursionError):
        return reprlib.repr(text[:_SHOWN]) if text else "nothing more"
