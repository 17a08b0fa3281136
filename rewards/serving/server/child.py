"""A reward server as a child of the trainer, which ends with it."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fastgrpo
from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import no_link
from fastgrpo.core.processes import die_with
from fastgrpo.rewards.serving.server.app import serve

TOKEN_VARIABLE = "FASTGRPO_TOKEN"


@contextmanager
def launch_beside(
    specs: Sequence[RewardSpec], folder: Path, start_timeout_s: float = 120.0
) -> Iterator[tuple[str, str]]:
    """Run a server of these rewards as a child process for as long as the context lasts.

    returns url and token
    It listens on this machine only, logs to folder/reward_server.log, and dies with the calling
    process, however that ends. Call from the main thread: Linux takes the end of the calling thread
    for the end of the parent.
    Raises UserError, with the log's last line, where the server does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ready_file, log_file = folder / "reward_server.json", folder / "reward_server.log"
    ready_file.unlink(missing_ok=True)
    token = secrets.token_urlsafe(32)
    # the child finds the package also where it is not installed
    root = str(Path(fastgrpo.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    child_environment = {
        TOKEN_VARIABLE: token,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with open(log_file, "ab", opener=no_link) as output:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), str(ready_file.absolute())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # not by argv, which every user of the machine can read
            env=os.environ | child_environment,
            # Ctrl-C reaches the trainer, which still needs scores to end in good order
            start_new_session=True,
        )
    try:
        send_specs(child, specs)
        yield wait_until_ready(child, ready_file, log_file, start_timeout_s), token
    finally:
        stop(child)
        ready_file.unlink(missing_ok=True)


def send_specs(child: subprocess.Popen[bytes], specs: Sequence[RewardSpec]) -> None:
    """Give the child its rewards; where it is dead already, its log says why."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(json.dumps([spec.model_dump(mode="json") for spec in specs]).encode())


def wait_until_ready(
    child: subprocess.Popen[bytes], ready_file: Path, log_file: Path, timeout_s: float
) -> str:
    """The url of a server that was just started."""
    deadline = time.monotonic() + timeout_s
    while not ready_file.exists():
        if child.poll() is not None or time.monotonic() > deadline:
            lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            state = (
                "did not start in time"
                if child.poll() is None
                else f"exited with code {child.returncode}"
            )
            raise UserError(
                f"reward server: {state}: {lines[-1] if lines else 'no output'}; see {log_file}"
            )
        time.sleep(0.05)
    url: str = json.loads(ready_file.read_text(encoding="utf-8"))["url"]
    return url


def stop(child: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """End the child by SIGTERM, and by SIGKILL where it has not ended in `patience_s` seconds."""
    child.terminate()
    try:
        child.wait(patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def main(parent: str, ready_file: str) -> None:
    """Serve as the child of `launch_beside`.

    The rewards come by standard input, the token by the environment.
    """
    die_with(int(parent))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # slurm warns every process of a job step
    try:
        specs = [RewardSpec.model_validate(spec) for spec in json.load(sys.stdin)]
        token = os.environ.pop(TOKEN_VARIABLE, "")
        serve(specs, "127.0.0.1", 0, token=token, ready_file=Path(ready_file))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
