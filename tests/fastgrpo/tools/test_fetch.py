"""`fastgrpo fetch` against a local server that answers as the hub does; the hub's own client asks."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.models.loading import source
from fastgrpo.tools.start import fetch
from tests import ROOT
from tests.harness import runs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = bytes(range(256)) * 12 * 4096  # the client writes pieces of 10 MiB
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "xswu/HPSv2": {"HPS_v2.1_compressed.pt": LARGE, "README.md": b"not asked for"},
    "openai/clip-vit-large-patch14": {"merges.txt": b"a b\n", "model.safetensors": LARGE},
    "maker/gated": {"model_index.json": b"{}"},
}
CODE = "import sys; from fastgrpo.cli.main import console; console(sys.argv[1:])"


class Hub(ThreadingHTTPServer):
    """A hub: its files, and the byte at which a first download of a large file breaks off."""

    breaks_at: int | None = None
    damaged = False
    ranges: tuple[str, ...] = ()


class Answer(BaseHTTPRequestHandler):
    """What the hub says of a repository, and its files in whole or in part."""

    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        about = re.fullmatch(r"/api/models/(\w+/[\w.-]+)(/revision/\w+)?(\?.*)?", self.path)
        if about is not None:
            return self.say_json(self.about(about[1]))
        tree = re.fullmatch(r"/api/models/(\w+/[\w.-]+)/tree/\w+(/.*)?(\?.*)?", self.path)
        if tree is not None:
            return self.say_json(
                [entry(name, data) for name, data in REPOSITORIES[tree[1]].items()]
            )
        asked = re.fullmatch(r"/(\w+/[\w.-]+)/resolve/\w+/(.+)", self.path)
        if asked is not None:
            return self.say_file(asked[1], asked[2])
        self.send_response(404)
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def about(self, repository: str) -> dict[str, Any]:
        content = REPOSITORIES[repository]
        siblings = [
            {"rfilename": name, "size": len(data), **hashes(name, data)}
            for name, data in content.items()
        ]
        gated = "manual" if repository == "maker/gated" else False
        card = {"license": "apache-2.0"}
        return {"id": repository, "sha": COMMIT, "siblings": siblings, "gated": gated, "private": False,
                "cardData": card, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def say_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def say_file(self, repository: str, file: str) -> None:
        if repository == "maker/gated":
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data, first = REPOSITORIES[repository][file], 0
        etag = hashes(file, data)["lfs"]["sha256"] if "lfs" in hashes(file, data) else blob(data)
        if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(asked[1])
            self.server.ranges += (asked[0],)
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(data) - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.server.damaged and len(data) == len(LARGE):
            data = bytes(len(data))
        end, self.server.breaks_at = self.server.breaks_at, None
        if end is not None and len(data) == len(LARGE):
            self.wfile.write(data[first:end])
            self.close_connection = True
            return self.connection.close()
        self.wfile.write(data[first:])
        return None


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def hashes(name: str, data: bytes) -> dict[str, Any]:
    """A small file has git's hash, a large one its SHA-256, too."""
    if len(data) < 1000:
        return {"blobId": blob(data)}
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"blobId": blob(b"pointer"), "lfs": lfs}


def entry(name: str, data: bytes) -> dict[str, Any]:
    """A line of a repository's tree."""
    found = {"type": "file", "path": name, "size": len(data), "oid": hashes(name, data)["blobId"]}
    lfs = hashes(name, data).get("lfs")
    return found | ({"lfs": lfs | {"oid": lfs["sha256"]}} if lfs else {})


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def say(server: Hub, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """`fastgrpo fetch` as a person types it; the hub's address is read when its client is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "fetch", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    text = (ROOT / "launch" / "t2v_tiny.toml").read_text()
    rewards = '[[rewards]]\nname = "hps"\npath = "./weights/HPS_v2.1_compressed.pt"\n'
    head, tail = text.split("[[rewards]]")[0], text[text.index("[checkpoint]") :]
    (tmp_path / "mine.toml").write_text(f"{head}{rewards}weights = {{ HPS = 1.0 }}\n\n{tail}")
    return str(tmp_path / "mine.toml")


def test_what_a_recipe_needs_is_listed_fetched_resumed_and_verified(
    tmp_path: Path, recipe: str
) -> None:
    weights = tmp_path / "weights" / "HPS_v2.1_compressed.pt"
    with hub() as server:
        code, listed, error = say(server, tmp_path, recipe, "--dry-run")
        assert code == 0, error
        lines = listed.splitlines()
        assert lines[0].startswith(
            "rewards.0.path: xswu/HPSv2, 1 file, 0.01 GB, licence apache-2.0"
        )
        assert lines[0].endswith(f"-> {tmp_path}/weights") and "hub's cache" in lines[1]
        assert not (tmp_path / "weights").exists() and not (tmp_path / "home" / "hub").exists()
        server.breaks_at = 11 * 2**20
        code, _, error = say(server, tmp_path, recipe)
        assert code == 0, error
        assert server.ranges == (f"bytes={10 * 2**20}-",), "it goes on where it was"
        assert weights.read_bytes() == LARGE and not weights.with_name("README.md").exists()
        assert list((tmp_path / "home" / "hub").glob("models--openai--*/snapshots/*/merges.txt"))
        code, listed, _ = say(server, tmp_path, recipe, "--dry-run")
        assert "xswu" not in listed, "what is there is not asked for again"


def test_a_damaged_file_is_removed_and_a_gate_is_told(tmp_path: Path, recipe: str) -> None:
    with hub() as server:
        server.damaged = True
        code, _, error = say(server, tmp_path, recipe)
        assert code == 2 and error.count("\n") == 1
        assert "HPS_v2.1_compressed.pt is not what the hub has of it, and was removed" in error
        assert not (tmp_path / "weights" / "HPS_v2.1_compressed.pt").exists()
        code, listed, error = say(server, tmp_path, recipe, "model.path=maker/gated")
        assert "model.path: maker/gated, 1 file," in listed and "gated: accept its terms" in listed
        assert code == 2 and "model.path=maker/gated: gated; accept its terms at" in error


def test_what_is_here_or_elsewhere_is_not_needed_and_a_template_is_got_by_hand() -> None:
    assert fetch.needs(config.load(runs.RECIPE)) == []
    found = fetch.needs(config.load(ROOT / "launch" / "t2v_hunyuan.toml"))
    assert [(need.key, need.by_hand) for need in found] == [
        ("model.path", False),
        ("rewards.0.path", False),
        ("rewards.0.options.base", False),
        ("rewards.0.options.template", True),
    ]
    assert [need.target and need.target.name for need in found] == [
        *(None, "VideoReward", None, "VideoAlign")
    ]
    elsewhere = ["rewards.0.where=server", "server.urls=['http://a:1']", "server.token_file=/t"]
    assert len(fetch.needs(config.load(ROOT / "launch" / "t2v_hunyuan.toml", elsewhere))) == 1


def test_of_a_model_one_form_of_its_weights_is_fetched() -> None:
    both = ["unet/config.json", "unet/w.bin", "unet/w.safetensors", "unet/w.fp16.safetensors"]
    need = fetch.Need("model.path", "a/b", source.FETCHED, None, whole_model=True)
    assert fetch._chosen(need, both) == ["unet/config.json", "unet/w.safetensors"]
    half = replace(need, variant="fp16")
    assert fetch._chosen(half, both) == ["unet/config.json", "unet/w.fp16.safetensors"]
    with pytest.raises(
        UserError, match=r"model\.variant=bf16: model\.path=a/b has no weights of it"
    ):
        fetch._chosen(replace(need, variant="bf16"), both)
    with pytest.raises(UserError, match=r"its weights of unet only as \.bin, .* model\.revision"):
        fetch._chosen(need, ["unet/config.json", "unet/w.bin"])


def test_a_need_knows_revision_and_variant() -> None:
    wanted = ["model.path=a/b", "model.revision=v2", "model.variant=fp16", "rewards.0.where=server"]
    (need,) = fetch.needs(config.load(runs.RECIPE, wanted))
    assert (need.repository, need.variant) == ("a/b@v2", "fp16")
