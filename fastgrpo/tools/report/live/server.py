"""`fastgrpo watch`: a run's report as a page that keeps itself up to date, over HTTP.

  GET /        the page; with ?token=TOKEN it sets a cookie and leads to the page without it
  GET /parts   ?have=HASH,HASH,...: the sections as JSON, null for those that the page has
  GET /livez   the process answers

All but /livez want the token, as a cookie or as a bearer token: others who have an account on this
machine reach its loopback address, too. Nothing can be changed from here.
"""

import hashlib
import hmac
import socket
import threading
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse

from fastgrpo.core.errors import UserError
from fastgrpo.rewards.serving.server.admission import carries_token
from fastgrpo.rewards.serving.server.process import bound
from fastgrpo.run import heartbeat
from fastgrpo.run.output import printable
from fastgrpo.tools.report.html import page
from fastgrpo.tools.report.live.now import now
from fastgrpo.tools.report.report import sections
from fastgrpo.tools.report.run_data import read_run

REFRESH_S = 5
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; media-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}

SCRIPT = """
const refreshed = document.createElement("p");
refreshed.className = "note"; refreshed.id = "refreshed"; refreshed.setAttribute("role", "status");
document.querySelector("main").prepend(refreshed);
async function refresh() {
  const parts = [...document.querySelectorAll("main > .part")];
  const have = parts.map((part) => part.dataset.hash).join(",");
  try {
    const answer = await fetch(`/parts?have=${have}`);
    if (!answer.ok) throw new Error(`the server says ${answer.status}`);
    const news = await answer.json();
    if (news.length !== parts.length) { location.reload(); return; }
    for (const [n, part] of news.entries()) {
      if (part === null) continue;
      parts[n].innerHTML = part.html;
      parts[n].dataset.hash = part.hash;
    }
    if (news.some((part) => part && part.html.includes("<video"))) showPlaying();
    refreshed.textContent = `Up to date at ${new Date().toLocaleTimeString()}.`;
  } catch (error) {
    refreshed.textContent = `Not up to date: no answer (${error.message}). Does watch still run?`;
  }
}
refresh();
setInterval(refresh, SECONDS * 1000);
"""


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    html: str

    @property
    def hash(self) -> str:
        """A short name of the section's content."""
        return hashlib.sha256(self.html.encode()).hexdigest()[:12]


class Watched:
    """The sections of a run's page, rendered anew when asked, but not for every tab at once."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.name = run_dir.resolve().name
        self._lock = threading.Lock()
        self._parts: list[Part] = []
        self._until = 0.0  # of the monotonic clock: when the sections are rendered again

    def parts(self) -> list[Part]:
        """The sections; a file that cannot be read is a banner in their place."""
        with self._lock:
            begun = time.monotonic()
            if begun >= self._until:
                self._parts = [Part(printable(html)) for html in self._render()]
                ended = time.monotonic()
                self._until = ended + max(1.0, 3 * (ended - begun))
            return self._parts

    def _render(self) -> list[str]:
        try:
            run = read_run(self.run_dir)
            first, *rest = sections(run)
        except (UserError, OSError) as error:
            head = f"<h1>fastgrpo run {escape(self.name)}</h1>"
            text = f"Nothing to show yet: {error}"
            return [f'<header>{head}<p class="banner">{escape(text)}</p></header>']
        return [first, now(run), *rest]

    def page(self) -> str:
        """The whole page."""
        body = "\n".join(
            f'<div class="part" data-hash="{part.hash}">{part.html}</div>' for part in self.parts()
        )
        script = SCRIPT.replace("SECONDS", str(REFRESH_S))
        return page(f"{self.name}: fastgrpo watch", body, script)

    def news(self, have: list[str]) -> list[dict[str, str] | None]:
        """The sections that the page does not have.  have: the hashes of those it has, in order"""
        parts = self.parts()
        known = dict(enumerate(have))
        return [
            None if known.get(n) == part.hash else {"hash": part.hash, "html": part.html}
            for n, part in enumerate(parts)
        ]


def make_app(run_dir: Path, token: str, port: int) -> FastAPI:
    """The application.  port: part of the cookie's name, as cookies do not tell ports apart"""
    watched, cookie = Watched(run_dir), f"fastgrpo-watch-{port}"
    shown = hashlib.sha256(token.encode()).hexdigest()  # of characters that every cookie may have
    app = FastAPI(openapi_url=None)

    def may(request: Request) -> bool:
        header = request.headers.get("authorization", "").encode("latin-1", "replace")
        given = request.cookies.get(cookie, "").encode()
        return hmac.compare_digest(given, shown.encode()) or carries_token(header, token)

    def refused() -> Response:
        text = "401: open the address that `fastgrpo watch` printed, with its token.\n"
        return PlainTextResponse(text, 401, HEADERS | {"WWW-Authenticate": "Bearer"})

    @app.get("/livez")
    def livez() -> Response:
        return PlainTextResponse("ok\n", headers=HEADERS)

    @app.get("/parts")
    def parts(request: Request, have: str = "") -> Response:
        if not may(request):
            return refused()
        return JSONResponse(watched.news(have.split(",")), headers=HEADERS)

    @app.get("/")
    def whole(request: Request) -> Response:
        given = request.query_params.get("token")
        if given is not None and hmac.compare_digest(given.encode(), token.encode()):
            answer = RedirectResponse("/", 303, HEADERS)
            answer.set_cookie(cookie, shown, httponly=True, samesite="strict")
            return answer
        return HTMLResponse(watched.page(), headers=HEADERS) if may(request) else refused()

    return app


def watch(run_dir: Path, host: str, port: int, token: str) -> None:
    """Serve the page of a run until SIGINT or SIGTERM; port 0 takes a free one.

    Raises UserError for a folder that is no run's, or an address that cannot be had.
    """
    check_run(run_dir)
    listener = bound(host, port)
    with listener:
        taken = listener.getsockname()[1]
        named = socket.gethostname() if host in ("0.0.0.0", "::") else host
        address = f"http://{f'[{named}]' if ':' in named else named}:{taken}/?token={quote(token)}"
        listener.listen()  # who opens the address at once waits, and is not refused
        print(f"watching {run_dir}: {address}", flush=True)
        server(make_app(run_dir, token, taken)).run(sockets=[listener])


def check_run(run_dir: Path) -> None:
    """Raise UserError for a folder that is no run's."""
    if not (run_dir / "metrics.jsonl").is_file() and not heartbeat.read(run_dir):
        raise UserError(
            f"{run_dir}: neither metrics.jsonl nor heartbeats, so this is not the folder of a run; "
            "give the recipe's run.dir, once it has begun."
        )


def server(app: FastAPI) -> uvicorn.Server:
    """A server of the application, for a handful of people."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=64,
            timeout_graceful_shutdown=2,
        )
    )
