"""A whole run on VideoAlign behind two reward servers, one of which is killed and comes back:
nothing changes.
"""

import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import tomli_w
from prometheus_client.parser import text_string_to_metric_families

from tests import ROOT
from tests.harness import forks, runs
from tests.harness.weights import videoalign

TOKEN = "a token of at least sixteen characters"
ITERATIONS = 6
LONGER = (f"run.iterations={ITERATIONS}", "rollout.batch_size=2")  # four requests per iteration


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Replica:
    """A `fastgrpo serve-rewards` process for the recipe's rewards, to be killed and started again
    on its port.
    """

    def __init__(self, recipe: Path, token: Path, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.ready = folder / f"{self.port}.json"
        self.arguments = [
            "serve-rewards",
            "--recipe",
            str(recipe),
            "--port",
            str(self.port),
            "--token-file",
            str(token),
            "--ready-file",
            str(self.ready),
        ]
        self.process = self.start()

    def start(self) -> forks.Started:
        self.ready.unlink(missing_ok=True)
        return forks.start("fastgrpo.cli", self.arguments)

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while not self.ready.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, (
                "the replica did not start"
            )
            time.sleep(0.1)

    def clips_scored(self) -> float:
        """By the process that runs now."""
        answer = httpx.get(
            f"{self.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False
        )
        samples = [
            one for family in text_string_to_metric_families(answer.text) for one in family.samples
        ]
        return sum(one.value for one in samples if one.name == "reward_clips_total")

    def kill(self) -> None:
        self.process.kill()


def rows(folder: Path) -> list[str]:
    """Of a run's metrics, those that are whole."""
    file = folder / "metrics.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def failed(folder: Path) -> float:
    """Requests that did not reach a server, so far."""
    return sum(float(json.loads(row)["scoring/requests_failed"]) for row in rows(folder))


def wait_for(run: forks.Started, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + runs.LIMIT
    while not reached():
        assert run.poll() is None and time.monotonic() < deadline, "the run ended before"
        time.sleep(0.02)


def recipe_with_videoalign(folder: Path) -> Path:
    """The tiny recipe, its reward a tiny random VideoAlign; a batch of one, so that no bit depends
    on neighbours.
    """
    import tomllib

    videoalign.write(folder / "weights")
    tree = tomllib.loads(runs.RECIPE.read_text())
    spec = videoalign.spec(folder / "weights", batch_size=1)
    tree["rewards"] = [spec.model_dump(mode="json", exclude_none=True) | {"where": "server"}]
    data = ROOT / "data"
    tree["model"]["path"] = str(data / "tiny_hunyuan_video")
    tree["prompts"] |= {part: str(data / f"tiny_world_{part}.txt") for part in ("train", "heldout")}
    file = folder / "recipe.toml"
    file.write_text(tomli_w.dumps(tree))
    return file


def test_a_replica_killed_and_restarted_in_mid_run_changes_no_bit(tmp_path: Path) -> None:
    recipe, token = recipe_with_videoalign(tmp_path), tmp_path / "token"
    token.write_text(TOKEN)
    replicas = [Replica(recipe, token, tmp_path) for _ in range(2)]
    processes: list[forks.Started] = []
    try:
        for replica in replicas:
            replica.wait()
        servers = [
            f"server.urls={json.dumps([r.url for r in replicas])}",
            f"server.token_file={token}",
            *LONGER,
        ]
        calm = runs.arguments(tmp_path / "calm", servers)
        stormy = runs.arguments(tmp_path / "stormy", [*servers, "server.outage_s=100"])
        for command in (calm, stormy):
            command[command.index(str(runs.RECIPE))] = str(recipe)
        undisturbed = forks.run("fastgrpo.cli", calm)
        assert undisturbed.returncode == 0, undisturbed.stderr
        run = forks.start("fastgrpo.cli", stormy)
        processes.append(run)
        # the file itself is there before the first iteration
        wait_for(run, lambda: len(rows(tmp_path / "stormy")) > 0)
        replicas[1].kill()
        wait_for(run, lambda: failed(tmp_path / "stormy") > 0)
        run.send(signal.SIGSTOP)  # it is to go on with both replicas, however long the start takes
        replicas[1].process = replicas[1].start()
        replicas[1].wait()
        assert len(rows(tmp_path / "stormy")) < ITERATIONS - 1
        run.send(signal.SIGCONT)
        assert run.wait(runs.LIMIT) == 0
        assert replicas[1].clips_scored() > 0  # of the new process
    finally:
        for process in processes:
            process.kill()
        for replica in replicas:
            replica.kill()
    assert len(runs.metrics(tmp_path / "calm")) == ITERATIONS and failed(tmp_path / "calm") == 0
    for one, other in zip(
        runs.metrics(tmp_path / "calm"), runs.metrics(tmp_path / "stormy"), strict=True
    ):
        for key in (
            "reward/VQ",
            "reward/MQ",
            "reward/sum",
            "reward/invalid",
            "group_std/VQ",
            "update/grad_norm",
        ):
            assert one[key] == other[key], key
