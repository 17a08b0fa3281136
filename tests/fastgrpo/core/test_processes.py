"""Folders that only one run may use, on file systems with and without locks, and a rank that fails
alone.
"""

import errno
import fcntl
import socket
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.cli import main as cli
from fastgrpo.core import files, processes
from fastgrpo.core.errors import UserError
from fastgrpo.core.files import only_run_in, take_lock
from fastgrpo.core.processes import OneRankError, fail_alone
from fastgrpo.parallel.world import open_world


def test_a_folder_is_one_processs_until_that_gives_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE_S", 0.0)
    with only_run_in(tmp_path / "run"):
        assert take_lock(tmp_path / "run", "run.dir") is None
        with pytest.raises(
            UserError, match=r"run\.dir=.*/run: another process is training there; wait for it"
        ):
            only_run_in(tmp_path / "run").__enter__()
    with only_run_in(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_without_file_locks_a_run_goes_on_with_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_run_in(tmp_path / "run"):
        told = capsys.readouterr().err
    assert told.startswith(
        f"fastgrpo: run.dir={tmp_path / 'run'}: its file system has no file locks (Function not"
    )
    assert told.count("\n") == 1 and "Lustre: flock; NFS: lockd" in told


def test_a_lock_that_fails_otherwise_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), only_run_in(tmp_path / "run"):
        pass


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_rank_that_fails_alone_tells_it_itself_and_ends_at_once(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> None:
        try:
            fail_alone("rollout.batch_size=8: no room; lower it.")
        except OneRankError:
            assert "no room" in capsys.readouterr().err, (
                "told before anything is closed, which may wait for others"
            )
            raise

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("fastgrpo.cli.train._run_keys", run)
    monkeypatch.setattr(cli, "after_rank_0", lambda code: pytest.fail("rank 0 has nothing to tell"))
    assert cli.main(["keys"]) == 2
    assert capsys.readouterr().err == "", "and once"


def test_what_a_rank_that_fails_alone_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OneRankError, match=r"^x=1: wrong; use 2\.$"):
        fail_alone("x=1: wrong; use 2.")
    assert capsys.readouterr().err == "fastgrpo: rank 3: x=1: wrong; use 2.\n"


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, (0, 1, False)),
        # a scheduler's, in the shell of a container, for a torchrun to come
        ({"RANK": "3", "WORLD_SIZE": "4"}, (0, 1, False)),
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n0"}, (0, 1, False)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, True)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n0", "MASTER_PORT": "1"},
            (3, 4, True),
        ),
        ({"RANK": "x", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (0, 1, False)),
    ],
)
def test_a_schedulers_variables_are_not_torchruns(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: tuple[int, int, bool]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (processes.rank(), processes.world_size(), processes.under_torchrun()) == told


def test_a_port_that_is_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        told = f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}: .*the port is in use"
        with pytest.raises(UserError, match=told), open_world():
            pass
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="cannot meet there"), open_world():
        pass
