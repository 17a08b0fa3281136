"""Which starts a run folder takes: one that trained nothing binds nobody, and what changes no
result may change.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from fastgrpo.checkpoint.resume import check_same_recipe, commit, holds_run, remove_unbegun
from fastgrpo.core import config
from fastgrpo.core.errors import UserError
from fastgrpo.train import train
from tests.harness import runs


def test_a_red_preflight_binds_nobody_to_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its remedy, another value of some key, is taken in the same folder, also with
    run.resume=never.
    """
    small = [
        *runs.SMALL,
        *runs.SMALLER,
        "run.iterations=1",
        "run.preflight=true",
        f"run.dir={tmp_path / 'run'}",
    ]
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(UserError, match="red before training: folder"):
            train(config.load(runs.RECIPE, small))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""
    remedy = config.load(runs.RECIPE, [*small, "rollout.samples_per_prompt=2", "run.resume=never"])
    assert train(remedy) is not None
    assert config.load(tmp_path / "run" / "recipe.toml") == remedy
    for changed, message in (
        ("run.resume=never", "holds a run already"),
        ("run.seed=1", "of another recipe"),
    ):
        with pytest.raises(UserError, match=message):
            train(config.load(runs.RECIPE, [*small, "rollout.samples_per_prompt=2", changed]))


def test_one_finished_iteration_or_checkpoint_binds(tmp_path: Path) -> None:
    assert not holds_run(tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").touch()
    assert not holds_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
    assert holds_run(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-3").mkdir(parents=True)
    assert holds_run(tmp_path / "run")


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "run.iterations=7",
        "model.decode_batch=2",
        "model.gradient_checkpointing=true",
        "rollout.store=host",
        "rollout.batch_size=auto",
        "checkpoint.every=3",
        "distributed.shard=2",
        "rewards.0.urls=['http://n1:8000']",
        "rewards.0.where=process",
        "rewards.0.device=cuda:1",
        "rewards.1.batch_size=3",
    ],
)
def test_a_run_goes_on_with_what_changes_no_result(override: str) -> None:
    check_same_recipe(
        config.load(runs.RECIPE, REWARDS), config.load(runs.RECIPE, [*REWARDS, override])
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.dtype=bfloat16", "model.dtype: float32 -> bfloat16"),
        ("lora.rank=4", "lora.rank: 0 -> 4"),
        ("rollout.eta=0.5", "rollout.eta: 0.7 -> 0.5"),
        (
            "rewards.0.weights.VQ=0.5",
            "rewards.0.weights: {'VQ': 1.0, 'MQ': 1.0, 'TA': 1.0} -> {'VQ': 0.5, ",
        ),
        ("rewards.1.fps=8.0", "rewards.1.fps: None -> 8.0"),
        ("rewards.1.name=other", "rewards.1.name: video_stats -> other"),
    ],
)
def test_a_run_does_not_go_on_with_what_changes_its_result(override: str, told: str) -> None:
    with pytest.raises(UserError, match="holds a run of another recipe") as caught:
        check_same_recipe(
            config.load(runs.RECIPE, REWARDS), config.load(runs.RECIPE, [*REWARDS, override])
        )
    assert (
        f"({told}" in str(caught.value)
        and "; " not in str(caught.value).partition("(")[2].partition(")")[0]
    )


def test_another_number_of_rewards_is_another_recipe() -> None:
    with pytest.raises(UserError, match=r"rewards\.1\.name: video_stats -> None; "):
        check_same_recipe(
            config.load(runs.RECIPE, REWARDS), config.load(runs.RECIPE, ["server.token_file=token"])
        )


def test_a_judge_may_move_and_not_ask_otherwise() -> None:
    def judge(**options: str) -> config.Recipe:
        text = ", ".join(f"{key}='{value}'" for key, value in options.items())
        return config.load(
            runs.RECIPE,
            [f"rewards=[{{name='vlm_judge', weights={{judge=1.0}}, options={{{text}}}}}]"],
        )

    before = judge(endpoints="http://a", model="m", question="q")
    check_same_recipe(before, judge(endpoints="http://b", model="m", question="q", key_file="k"))
    with pytest.raises(UserError, match=r"rewards\.0\.options: .*'question': 'r'"):
        check_same_recipe(before, judge(endpoints="http://a", model="m", question="r"))


REWARDS = [
    "rewards=[{name='tiny_world', weights={VQ=1.0, MQ=1.0, TA=1.0}}, {name='video_stats', "
    "weights={sharp=0.0}}]",
    "server.token_file=token",
]


def git(folder: Path, *words: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    asked = subprocess.run(
        ["git", *author, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return asked.stdout.strip()


def test_the_commit_is_that_of_the_code_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "the user's own project")
    mine = git(tmp_path, "rev-parse", "--short", "HEAD")
    packages = tmp_path / "venv" / "site-packages"
    packages.mkdir(parents=True)
    assert commit(packages) == ""
    assert commit(tmp_path) == mine
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))  # as in git's own hooks
    assert commit(tmp_path) == mine
    monkeypatch.setenv("PATH", str(packages))  # no git
    assert commit(tmp_path) == ""


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    """A mistake that only loading finds; in a folder of the user's, the folder stays."""
    mistake = [*runs.SMALLER[:-1], f"model.path={tmp_path / 'nowhere'}"]  # beside a server
    (tmp_path / "mine").mkdir()
    for name in ("fresh", "mine"):
        runs.complaint(tmp_path / name, mistake)
    assert [path.name for path in tmp_path.rglob("*") if path.name not in ("lock", "requeue")] == [
        "mine"
    ]


def test_what_is_no_trace_of_an_unbegun_run_stays(tmp_path: Path) -> None:
    for name in ("lock", "recipe.toml", "hashes.json"):
        (tmp_path / name).touch()
    remove_unbegun(tmp_path, found=False)
    assert len(list(tmp_path.iterdir())) == 3
