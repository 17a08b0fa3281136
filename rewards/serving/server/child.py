"""A reward server as a child of the trainer: it ends with it, and is started again where it dies."""

import contextlib
import json
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fastgrpo
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import no_link
from fastgrpo.core.processes import die_with
from fastgrpo.rewards.serving.server.process import serve

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "FASTGRPO_TOKEN"
LOG = "reward_server.log"  # in the run folder
NAME = "reward server beside the trainer"
LONG_LIFE_S = 60.0  # of a server that was well: its end is a new trouble
LONGEST_PAUSE_S = 10.0  # between starts that fail


class ServerProcess:
    """The process of a server of these rewards, which may be started more than once.

    It listens on this machine only, always at the same port, logs to folder/reward_server.log, and
    dies with the thread that started it: Linux takes the end of that thread for the parent's.
    """

    def __init__(self, specs: Sequence[RewardSpec], folder: Path, start_timeout_s: float) -> None:
        """Start nothing yet.  start_timeout_s: seconds until it must take requests"""
        self.specs = specs
        self.start_timeout_s = start_timeout_s
        self.ready_file = folder / "reward_server.json"
        self.log_file = folder / LOG
        self.token = secrets.token_urlsafe(32)
        self.port = 0  # a free one at the first start
        self.ended = threading.Event()  # no more starts
        self._log_begin = 0  # where in the log the present process began
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> str:
        """Start the process, and wait until it takes requests.  returns its url

        Raises UserError, with the process's last words, where it does not come up.
        """
        with self._lock:
            if self.ended.is_set():
                raise UserError(f"{NAME}: the run has ended; start the run again.")
            self.ready_file.unlink(missing_ok=True)
            with open(self.log_file, "ab", opener=no_link) as output:
                self._log_begin = output.tell()
                self._process = self._popen(output)
        self._send_specs(self._process)
        return self._wait_until_ready(self._process)

    def _popen(self, output: IO[bytes]) -> "subprocess.Popen[bytes]":
        # the child finds the package also where it is not installed
        root = str(Path(fastgrpo.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        child_environment = {
            TOKEN_VARIABLE: self.token,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        arguments = (str(os.getpid()), str(self.ready_file.absolute()), str(self.port))
        return subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # not by argv, which every user of the machine can read
            env=os.environ | child_environment,
            # Ctrl-C reaches the trainer, which still needs scores to end in good order
            start_new_session=True,
        )

    def _send_specs(self, process: "subprocess.Popen[bytes]") -> None:
        """Give the process its rewards; where it is dead already, its log says why."""
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            specs = [spec.model_dump(mode="json") for spec in self.specs]
            process.stdin.write(json.dumps(specs).encode())

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]") -> str:
        deadline = time.monotonic() + self.start_timeout_s
        while not self.ready_file.exists():
            if process.poll() is not None:
                raise UserError(f"{NAME}: {self.death()}; see {self.log_file}")
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise UserError(
                    f"{NAME}: not ready within {self.start_timeout_s:g} s, its last words: "
                    f"{self.last_words()}; see {self.log_file}, or raise server.start_timeout_s."
                )
            time.sleep(0.05)
        url: str = json.loads(self.ready_file.read_text(encoding="utf-8"))["url"]
        self.port = int(url.rpartition(":")[2])
        return url

    def wait(self) -> None:
        """Wait until the process has ended."""
        assert self._process is not None
        self._process.wait()

    def death(self) -> str:
        """How the process ended, and what it said last."""
        assert self._process is not None
        code = self._process.returncode
        if code >= 0:
            how = f"exited with code {code}"
        else:
            cause = ", as the system does where memory runs out" * (code == -signal.SIGKILL)
            how = f"killed by {signal.Signals(-code).name}{cause}"
        return f"{how}: {self.last_words()}"

    def last_words(self) -> str:
        """The last line of the present process's log that is more than a note."""
        with self.log_file.open("rb") as log:
            log.seek(self._log_begin)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
        return next((words for words in map(_words, reversed(lines)) if words), "no last words")

    def stop(self, patience_s: float = 10.0) -> None:
        """End the process by SIGTERM, by SIGKILL where it takes longer; it starts no more."""
        with self._lock:
            self.ended.set()
            process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.ready_file.unlink(missing_ok=True)


def _words(line: str) -> str:
    """What a line of the log says; empty for a note of a server that is well."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line.strip()
    if not isinstance(entry, dict) or entry.get("level") in ("DEBUG", "INFO"):
        return ""
    return " ".join(str(entry[key]) for key in ("message", "error") if key in entry)


@contextmanager
def launch_beside(
    specs: Sequence[RewardSpec],
    folder: Path,
    start_timeout_s: float = 120.0,
    outage_s: float = 300.0,
) -> Iterator[tuple[str, str]]:
    """Run a server of these rewards as a child process for as long as the context lasts.

    returns url and token
    Where the process ends before, that is told at once and it is started again, for at most
    `outage_s` seconds. Call from the main thread, since the process dies with the calling one.
    Raises UserError, with the log's last line, where the server does not come up at first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server = ServerProcess(specs, folder, start_timeout_s)
    watch = threading.Thread(
        target=keep_up, args=(server, outage_s), name="reward server's watch", daemon=True
    )
    try:
        url = server.start()
        watch.start()
        yield url, server.token
    finally:
        server.stop()
        if watch.ident is not None:
            watch.join()


def keep_up(server: ServerProcess, outage_s: float) -> None:
    """Start a server again whenever it ends, until it is stopped.

    Gives up where that has been no use for `outage_s` seconds. The thread that runs this must live
    as long as the process that it may start.
    """
    trouble_since, ready_since = time.monotonic(), -math.inf
    while True:
        server.wait()
        if server.ended.is_set():
            return
        now = time.monotonic()
        if now - ready_since > LONG_LIFE_S:
            trouble_since = now
        log.warning("%s: %s; starting it again, see %s", NAME, server.death(), server.log_file)
        if not start_again(server, trouble_since + outage_s):
            return
        ready_since = time.monotonic()


def start_again(server: ServerProcess, until: float) -> bool:
    """Start a server until that succeeds.  returns whether it takes requests

    until: of time.monotonic, when to give up
    """
    pause = 0.0
    while not server.ended.wait(pause):
        if time.monotonic() > until:
            log.error("%s: gone for server.outage_s; it is not started again", NAME)
            return False
        try:
            server.start()
        except UserError as error:
            if not server.ended.is_set():
                log.warning("%s", error)
            pause = min(2.0 * pause + 0.5, LONGEST_PAUSE_S)
            continue
        log.warning("%s: takes requests again", NAME)
        return True
    return False


def main(parent: str, ready_file: str, port: str) -> None:
    """Serve as the process of a `ServerProcess`.

    The rewards come by standard input, the token by the environment.
    """
    die_with(int(parent))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # slurm warns every process of a job step
    try:
        specs = [RewardSpec.model_validate(spec) for spec in json.load(sys.stdin)]
        token = os.environ.pop(TOKEN_VARIABLE, "")
        serve(specs, "127.0.0.1", int(port), token=token, ready_file=Path(ready_file))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
