"""Chat completions from one or several endpoints, also when one is slow, busy, gone or wrong."""

import logging
import os
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import httpx

from fastgrpo.core.errors import Unavailable, UserError
from fastgrpo.core.files import check_secret, read_secret
from fastgrpo.rewards.networks.vlm.answers import NoScore, first_words
from fastgrpo.rewards.serving.client.persist import Bad, Busy, GivenUp, persist, retry_after
from fastgrpo.rewards.serving.client.replicas import Outage, Replica, Replicas

log = logging.getLogger(__name__)

KEY_VARIABLE = "FASTGRPO_JUDGE_KEY"
URLS, KEY_FILE = "rewards.options.endpoints", "rewards.options.key_file"
MAX_ANSWER = 2**20  # bytes; one token with its alternatives takes a few thousand


class RefusedClip(Exception):
    """A request that an endpoint will not take, as of a prompt that is too long for the model."""


class Endpoints:
    """Endpoints that serve the same model. Threads may share it.

    A request goes to the one with the fewest under way. What fails there goes to another one, with
    growing pauses, until `patience_s` seconds have passed without a good answer of any.
    """

    def __init__(
        self, urls: tuple[str, ...], key: str | None, timeout_s: float, patience_s: float
    ) -> None:
        """Take the addresses; nothing is sent yet.

        key: sent as the bearer token. None: none is
        timeout_s: seconds for one request;  patience_s: seconds for a question
        """
        self.replicas = Replicas(urls, patience_s, kind="judge", key=URLS)
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self.answered = 0  # good answers
        self._key = key
        self._lock = threading.Lock()
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._http = httpx.Client(
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=60.0),
            trust_env=False,  # a proxy for the internet must not get the cluster's own traffic
        )

    def begin(self) -> None:
        """Begin a call: what was out of reach in the last one is tried again."""
        self.replicas.live()

    def ask(self, body: bytes) -> Mapping[str, float]:
        """Probability of each first word of the answer to a request, see `answers.request`.

        Raises NoScore where the endpoints answer others and not this one well, Unavailable where
        they answer nothing, UserError where they refuse what the recipe says.
        """
        try:
            words = persist(self.replicas, partial(self._attempt, body), self.patience_s)
        except RefusedClip as refusal:
            if self.answered:
                raise NoScore(f"the judge refuses the request ({refusal})") from None
            raise UserError(
                f"{URLS}: the judge refuses the first request ({refusal}); correct the options, or "
                "start it so that it takes several images and gives 20 log-probabilities."
            ) from None
        except GivenUp as end:
            if end.turned_away:
                raise Unavailable(f"the judge turns requests away ({end})", False) from None
            if self.answered:
                raise NoScore(f"the judge does not answer well ({end})") from None
            raise UserError(
                f"{URLS}: no judge answers the first request well ({end}); correct the address, or "
                "use a server that gives top_logprobs."
            ) from None
        except Outage as outage:
            raise Unavailable(
                f"no answer for {self.patience_s:g} s, {outage.trouble}", False
            ) from None
        with self._lock:
            self.answered += 1
        return words

    def _attempt(self, body: bytes, replica: Replica) -> dict[str, float]:
        """One request to one endpoint. Raises as `persist` wants it."""
        deadline = time.monotonic() + self.timeout_s
        content = bytearray()
        with self._http.stream("POST", f"{replica.url}/chat/completions", content=body) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise Bad(f"an answer of more than {MAX_ANSWER} bytes")
                # the library's limit is for each piece, and a byte at a time would go on for ever
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"no whole answer within {self.timeout_s:g} s")
        self._check(replica, response, bytes(content))
        return first_words(bytes(content))

    def _check(self, replica: Replica, response: httpx.Response, content: bytes) -> None:
        """Raise for any answer but success."""
        status = response.status_code
        if response.is_success:
            return
        if status in (401, 403):  # not quoted: some quote the key
            raise UserError(
                f"{KEY_FILE}: {replica.url} refuses the key ({status}); write the right one into "
                f"that file, or into {KEY_VARIABLE}."
            )
        missing = status == 404 or response.is_redirect
        if missing and self.answered:  # a proxy before one that starts again
            raise httpx.NetworkError(f"status {status}")
        if missing:
            raise UserError(
                f"{replica.where}: no chat completions there, or no such model ({status}"
                f"{self._quoted(content)}); correct the address or rewards.options.model."
            )
        if status in (408, 409, 425, 429):
            raise Busy(f"status {status}", retry_after(response, 0.5))
        if status in (502, 503, 504):
            raise httpx.NetworkError(f"status {status}")
        if status >= 500:
            raise Bad(f"status {status}")
        # once it has answered others, what it quotes may be a prompt
        said = "" if self.answered else self._quoted(content)
        raise RefusedClip(f"status {status}{said}")

    def _quoted(self, content: bytes) -> str:
        """What an endpoint says to a refusal, in one line and without the key."""
        text = " ".join(content.decode("utf-8", "replace").split())
        if self._key:
            text = text.replace(self._key, "[key]")
        text = "".join(letter for letter in text if letter.isprintable())[:200]
        return f": {text}" if text else ""


def urls_of(text: str) -> tuple[str, ...]:
    """The endpoints' addresses, of a text with spaces or commas between them.

    Raises UserError, which shows no address that may hold a password or a key.
    """
    found = []
    for typed in text.replace(",", " ").split():
        try:
            url = httpx.URL(typed)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.userinfo or url.query or url.fragment:
            raise UserError(
                f"{URLS}: an address has a password, a query or a # in it; write http://host:port/v1 "
                "and give the key by rewards.options.key_file."
            )
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"{URLS}={typed}: no address; write it as http://host:port/v1.")
        found.append(f"{typed.rstrip('/')}/v1" if url.path in ("", "/") else typed.rstrip("/"))
    if not found:
        raise UserError(
            f"{URLS}: missing; give the address of a server with OpenAI's API, such as "
            "http://127.0.0.1:8000/v1."
        )
    return tuple(found)


def key_of(file: str | None) -> str | None:
    """The key for the endpoints, of a file, else of FASTGRPO_JUDGE_KEY. None: they want none.

    Raises UserError for a file without a usable key. A text that names no file is not shown: it may
    be the key itself.
    """
    if file is not None:
        if not os.path.lexists(file):
            raise UserError(
                f"{KEY_FILE}: no such file; give the path of a file that has the key in it, not the "
                "key."
            )
        return read_secret(Path(file), KEY_FILE, "the judge's key")
    if (key := os.environ.get(KEY_VARIABLE)) is None:
        return None
    check_secret(key, KEY_VARIABLE)
    return key
