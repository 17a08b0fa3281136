"""The launch files start the same job in every way a user may call them.

Each test copies the real launch files and fastgrpo/cli/launch.py into a small tree whose command
only prints what it was given. So what is tested is how processes start and what reaches them, in
seconds, and from an uninstalled checkout.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import (
    ON_THIS_MACHINE,
    SETTLED,
    processes_to_start,
    torchrun_environment,
)
from tests import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CLI = """
import json, os, sys, time

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command, recipe, *arguments = argv
    if any(argument.startswith("typo=") for argument in arguments):
        if os.environ.get("RANK", "0") == "0":
            time.sleep(0.5)  # later than the other ranks
            print("Unknown key 'typo'; did you mean 'type'?", file=sys.stderr)
        return 2
    keys = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_PORT")
    told = {"argv": argv, "cwd": os.getcwd(), **{key: os.environ.get(key) for key in keys}}
    if command == "check":
        print('[run]\\ndir = "the run"\\nmax_requeues = 2')
    if command == "train":
        os.write(1, (json.dumps(told) + os.linesep).encode())  # one write: lines of several ranks stay whole
    return 0

def console(argv=None):
    sys.exit(main(argv))

if __name__ == "__main__":
    console()
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout, in a folder with a space in its name, that holds only what starts a run."""
    tree = tmp_path / "a checkout"
    for folder in ("cli", "core"):
        (tree / "fastgrpo" / folder).mkdir(parents=True)
    (tree / "launch").mkdir()
    for file in (
        "launch/t2v_tiny.sh",
        "launch/t2v_tiny.toml",
        "launch/_run.sh",
        "launch/_job.sh",
        "fastgrpo/cli/launch.py",
        "fastgrpo/core/errors.py",
        "fastgrpo/core/processes.py",
        "fastgrpo/__init__.py",
        "fastgrpo/cli/__init__.py",
        "fastgrpo/core/__init__.py",
    ):
        shutil.copy(ROOT / file, tree / file)
    (tree / "fastgrpo/cli/main.py").write_text(CLI)
    (tree / "fastgrpo/cli/__main__.py").write_text(CLI)
    return tree


def start(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `command` for at most two minutes: this Python first on PATH, no GPU, no settings of an
    outer launcher.
    """
    outer = (
        "TORCHELASTIC_",
        "FASTGRPO_",
        "SLURM_",
        "PYTHONPATH",
        "OMP_NUM_THREADS",
        "RANK",
        "WORLD_SIZE",
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def told(result: subprocess.CompletedProcess[str]) -> list[dict[str, str | list[str] | None]]:
    """What each rank's `fastgrpo train` was given, in the order of the ranks."""
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: line["RANK"] or "")


def programs(folder: Path, bodies: dict[str, str]) -> str:
    """Write bash scripts by these names; returns a PATH with them first."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


SLURM = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_NNODES": "2",
    "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "n[1-2]",
}
ARGUMENTS = ["run.seed=3", "run.note=two words", "data.pattern=$HOME/*.txt"]


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        pytest.param(["bash"], min(2, os.cpu_count() or 1), id="bash"),
        pytest.param([], min(2, os.cpu_count() or 1), id="executable"),
        pytest.param([sys.executable], 1, id="python"),
        pytest.param(TORCHRUN, 1, id="torchrun"),
        pytest.param([*TORCHRUN, "--nproc-per-node=2"], 2, id="torchrun-2"),
        pytest.param([*TORCHRUN, "--no-python", "--nproc-per-node=2"], 2, id="torchrun-no-python"),
    ],
)
@pytest.mark.timeout(150)
def test_every_way_to_start_gives_each_rank_the_recipe_and_the_arguments(
    tree: Path, tmp_path: Path, command: list[str], processes: int
) -> None:
    ranks = told(start([*command, str(tree / "launch/t2v_tiny.sh"), *ARGUMENTS], cwd=tmp_path))
    assert len(ranks) == processes
    for rank, line in enumerate(ranks):
        assert line["argv"] == ["train", str(tree / "launch/t2v_tiny.toml"), *ARGUMENTS]
        assert line["cwd"] == str(tmp_path)
        assert line["RANK"] in (str(rank), None)
        assert line["WORLD_SIZE"] in (str(processes), None)


@pytest.mark.timeout(150)
def test_a_relative_path_and_a_link_find_the_recipe(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "job.sh").symlink_to(tree / "launch/t2v_tiny.sh")
    expected = ["train", str(tree / "launch/t2v_tiny.toml")]
    for command, cwd in (
        (["bash", "t2v_tiny.sh"], tree / "launch"),
        (["bash", "job.sh"], tmp_path),
    ):
        (line,) = told(start(command, cwd=cwd, FASTGRPO_PROCESSES="1"))
        assert line["argv"] == expected


@pytest.mark.timeout(150)
def test_a_lone_torchrun_process_becomes_as_many_as_asked_for_once(
    tree: Path, tmp_path: Path
) -> None:
    ranks = told(
        start([*TORCHRUN, str(tree / "launch/t2v_tiny.sh")], cwd=tmp_path, FASTGRPO_PROCESSES="3")
    )
    assert [line["RANK"] for line in ranks] == ["0", "1", "2"]
    assert {line["WORLD_SIZE"] for line in ranks} == {"3"}
    assert len({line["MASTER_PORT"] for line in ranks}) == 1
    assert {line["OMP_NUM_THREADS"] for line in ranks} == {
        str(max(1, min(8, (os.cpu_count() or 1) // 3)))
    }


@pytest.mark.parametrize("command", [["bash"], [sys.executable]])
@pytest.mark.timeout(150)
def test_a_mistake_is_one_line_and_exit_code_2(
    tree: Path, tmp_path: Path, command: list[str]
) -> None:
    result = start([*command, str(tree / "launch/t2v_tiny.sh"), "typo=1"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "Unknown key 'typo'; did you mean 'type'?\n"


@pytest.mark.timeout(150)
def test_rank_0_tells_a_mistake_before_torchrun_ends_the_ranks(tree: Path, tmp_path: Path) -> None:
    result = start(
        [*TORCHRUN, "--nproc-per-node=2", str(tree / "launch/t2v_tiny.sh"), "typo=1"], cwd=tmp_path
    )
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    assert lines.count("Unknown key 'typo'; did you mean 'type'?") == 1
    # where a reader of torchrun's report looks
    assert lines[-2].endswith("Unknown key 'typo'; did you mean 'type'?")


@pytest.mark.parametrize("command", [["bash"], [sys.executable]])
@pytest.mark.timeout(60)
def test_a_bad_number_of_processes_is_one_line(
    tree: Path, tmp_path: Path, command: list[str]
) -> None:
    result = start(
        [*command, str(tree / "launch/t2v_tiny.sh")], cwd=tmp_path, FASTGRPO_PROCESSES="many"
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("fastgrpo: FASTGRPO_PROCESSES=many: not a number")


@pytest.fixture
def elsewhere(tree: Path, tmp_path: Path) -> Path:
    """A launch file and its recipe in a folder of their own, beside an installed package."""
    (tree / "launch" / "__init__.py").touch()
    (tree / "fastgrpo" / "launch").symlink_to("../launch")
    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(ROOT / "launch" / "t2v_tiny.sh", folder / "mine.sh")
    (folder / "mine.toml").touch()
    return folder / "mine.sh"


@pytest.mark.parametrize("command", [["bash"], [sys.executable], TORCHRUN])
@pytest.mark.timeout(150)
def test_a_copy_in_another_folder_starts_the_installed_package(
    tree: Path, elsewhere: Path, tmp_path: Path, command: list[str]
) -> None:
    variables = {"PYTHONPATH": str(tree), "FASTGRPO_PROCESSES": "1", "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_NNODES": "1"}  # as inside an allocation
    (line,) = told(start([*command, str(elsewhere), "run.seed=3"], cwd=tmp_path, **variables))
    assert line["argv"] == ["train", str(elsewhere.with_suffix(".toml")), "run.seed=3"]
    assert line["cwd"] == str(tmp_path)


def test_a_copy_without_the_package_is_one_line_and_exit_code_2(
    elsewhere: Path, tmp_path: Path
) -> None:
    path = programs(tmp_path, {"python3": "exit 1"})
    result = start(["bash", str(elsewhere)], cwd=tmp_path, PATH=path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "fastgrpo: FASTGRPO_PYTHON=python3: no fastgrpo there; activate its environment, or name "
        "its python.\n"
    )


@pytest.mark.timeout(150)
def test_slurm_finds_the_file_behind_its_copy_and_starts_every_node(
    tree: Path, tmp_path: Path
) -> None:
    """slurm's own commands replaced by scripts that answer as slurm 22.05 does; two nodes, both on
    this machine.
    """
    file = tree / "launch/t2v_tiny.sh"
    (tmp_path / "spool").mkdir()
    shutil.copy(file, tmp_path / "spool/slurm_script")
    task = 'SLURM_NODEID=$i SLURMD_NODENAME=n$i "$@"'
    commands = {
        "scontrol": f'case "$1 $2" in "show job") echo "   Command={file} run.note=two words" ;; '
        '"show node") echo "   NodeAddr=127.0.0.1 NodeHostName=$3" ;; *) printf "%s\\n" n1 n2 ;; '
        "esac",
        "srun": f"while [[ $1 == --* ]]; do shift; done; for i in 0 1; do {task} & done; wait -n && wait -n",
    }
    path = programs(tmp_path, commands)
    command = ["bash", str(tmp_path / "spool/slurm_script"), "run.note=two words"]
    result = start(command, cwd=tmp_path, FASTGRPO_PROCESSES="1", PATH=path, **SLURM)
    # which rank says it
    result.stdout = re.sub(r"^\[[01]\] ", "", result.stdout, flags=re.MULTILINE)
    ranks = told(result)
    assert [line["RANK"] for line in ranks] == ["0", "1"]
    assert all(
        line["argv"] == ["train", str(file.with_suffix(".toml")), "run.note=two words"]
        for line in ranks
    )
    for node in (0, 1):
        (output,) = tmp_path.glob(
            f"the run/logs/job-{os.getpid()}-0/n{node}/*/attempt_0/0/stdout.log"
        )
        assert json.loads(output.read_text())["RANK"] == str(node)


WARN = (
    "kill -USR1 $(cut -d' ' -f4 /proc/$PPID/stat)"  # the batch script: srun is a child of its child
)
JOB = """
case "$1 $2" in
    "show job") echo "   JobState=$STATE Dependency=(null)" ;;
    "show node") echo "   NodeAddr=127.0.0.1" ;;
    "requeue "*) echo "requeued $2" ;;
    *) printf "%s\\n" n1 n2 ;;
esac
"""


@pytest.mark.parametrize(
    ("srun", "attempts", "state", "code", "requeued"),
    [
        pytest.param("true", None, "RUNNING Reason=None", 0, False, id="finished"),
        pytest.param(
            "echo yes >'the run/requeue'", None, "RUNNING Reason=None", 0, True, id="saved-in-time"
        ),
        pytest.param(
            "echo yes >'the run/requeue'", None, "COMPLETING Reason=None", 0, False, id="cancelled"
        ),
        pytest.param(
            "echo yes >'the run/requeue'",
            None,
            "COMPLETING Reason=TimeLimit",
            0,
            True,
            id="time-limit",
        ),
        pytest.param(
            "echo no >'the run/requeue'; exit 1",
            None,
            "RUNNING Reason=None",
            1,
            False,
            id="mistake",
        ),
        pytest.param(
            "echo no >'the run/requeue'",
            None,
            "RUNNING Reason=None",
            0,
            False,
            id="stopped-by-a-person",
        ),
        pytest.param("exit 137", None, "RUNNING Reason=None", 137, True, id="first-crash"),
        pytest.param("exit 1", "step-3 1", "RUNNING Reason=None", 1, True, id="second-crash"),
        pytest.param("exit 1", "step-3 2", "RUNNING Reason=None", 2, False, id="third-crash"),
        pytest.param(
            "exit 1",
            "step-2 2",
            "RUNNING Reason=None",
            1,
            True,
            id="first-crash-since-a-checkpoint",
        ),
        pytest.param(
            "echo yes >'the run/requeue'",
            "step-3 2",
            "RUNNING Reason=None",
            2,
            False,
            id="no-progress",
        ),
        pytest.param(
            f"{WARN}; for _ in {{1..50}}; do [[ ! -f 'the run/stop' ]] || break; sleep 0.1; done;"
            " [[ $(<'the run/stop') == slurm ]] && echo yes >'the run/requeue'; exit 0",
            None,
            "RUNNING Reason=None",
            0,
            True,
            id="warned",
        ),
        pytest.param(
            f"{WARN}; exit 3", None, "RUNNING Reason=None", 3, True, id="warned-as-it-ends"
        ),
    ],
)
@pytest.mark.timeout(60)
def test_a_job_goes_back_into_the_queue_where_there_is_more_to_do(
    tree: Path,
    tmp_path: Path,
    srun: str,
    attempts: str | None,
    state: str,
    code: int,
    requeued: bool,
) -> None:
    """The batch script with slurm's commands replaced; the run's newest checkpoint is step-3, its
    limit 2.
    """
    folder = tmp_path / "the run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/latest").write_text("step-3\n")
    for left in ("stop", "requeue"):  # by an earlier attempt
        (folder / left).write_text("yes\n")
    if attempts is not None:
        (folder / "attempts").write_text(attempts + "\n")
    path = programs(
        tmp_path, {"scontrol": JOB, "srun": "[[ ! -f 'the run/stop' ]] || exit 99\n" + srun}
    )
    command = ["bash", str(tree / "launch/t2v_tiny.sh")]
    result = start(command, cwd=tmp_path, PATH=path, STATE=state, ENVIRONMENT="BATCH", **SLURM)
    assert result.returncode == code, result.stderr
    assert (f"requeued {SLURM['SLURM_JOB_ID']}" in result.stdout) == requeued
    if attempts == "step-3 2":
        assert (
            "fastgrpo: run.max_requeues=2: attempt 3 that ends at checkpoint step-3, "
            in result.stderr
        )
    if requeued:
        assert (folder / "attempts").read_text() == f"step-3 {2 if attempts == 'step-3 1' else 1}\n"


HOSTILE = "a[$(touch ran)0]"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("attempts", f"step-3 {HOSTILE}\n"),
        ("attempts", "step-3 08\n"),
        ("attempts", "step-3"),  # cut off: no number, no new line
        ("checkpoints/latest", f"{HOSTILE}\n"),
        ("checkpoints/latest", "\x1b]0;title\x07\n"),
        ("requeue", f"{HOSTILE}\n"),
    ],
)
@pytest.mark.timeout(60)
def test_nothing_in_a_runs_folder_is_executed(
    tree: Path, tmp_path: Path, file: str, content: str
) -> None:
    folder = tmp_path / "the run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/latest").write_text("step-3\n")
    (folder / file).write_text(content)
    path = programs(tmp_path, {"scontrol": JOB, "srun": "exit 1"})
    command = ["bash", str(tree / "launch/t2v_tiny.sh")]
    slurm = {**SLURM, "STATE": "RUNNING Reason=None", "ENVIRONMENT": "BATCH"}
    result = start(command, cwd=tmp_path, PATH=path, **slurm)
    assert result.returncode == 1 and f"requeued {SLURM['SLURM_JOB_ID']}" in result.stdout
    assert "\x1b" not in result.stderr and "syntax" not in result.stderr
    assert not list(tmp_path.rglob("ran"))
    assert re.fullmatch(r"(step-3|none) 1\n", (folder / "attempts").read_text())


@pytest.mark.timeout(60)
def test_a_folders_name_with_a_new_line_is_not_read_as_a_limit(tree: Path, tmp_path: Path) -> None:
    name = f"the run\n{HOSTILE}"
    for file in ("main.py", "__main__.py"):
        stub = tree / "fastgrpo/cli" / file
        shown = name.replace("\n", "\\\\n")
        stub.write_text(stub.read_text().replace('"the run"', f'"{shown}"'))
    path = programs(tmp_path, {"scontrol": JOB, "srun": "exit 1"})
    command = ["bash", str(tree / "launch/t2v_tiny.sh")]
    slurm = {**SLURM, "STATE": "RUNNING Reason=None", "ENVIRONMENT": "BATCH"}
    result = start(command, cwd=tmp_path, PATH=path, **slurm)
    assert result.returncode == 1, result.stderr
    assert (tmp_path / name / "attempts").read_text() == "none 1\n"
    assert not list(tmp_path.rglob("ran"))


FLAKY_JOB = """
deaf() { # COMMAND TIMES: whether it is among the first so many calls of the command, of which it keeps count
    echo "$1" >>calls
    (($(grep -c "$1" calls) <= $2))
}
case "$1 $2" in
    "show job")
        ! deaf state "$DEAF_STATE" || exit 1
        echo "   JobState=$STATE Dependency=(null)"
        head -c 1000000 /dev/zero | tr '\\0' ' ' ;; # a reader that leaves early ends this with SIGPIPE
    "show node") ! deaf node "$DEAF_NODE" || exit 1; echo "   NodeAddr=127.0.0.7 NodeHostName=n1" ;;
    "requeue "*) ! deaf requeue "$DEAF_REQUEUE" || exit 1; echo "requeued $2" ;;
    *) echo n1 ;;
esac
"""


@pytest.mark.parametrize(
    ("state", "deaf", "code", "requeued", "pauses"),
    [
        pytest.param("RUNNING", {}, 3, True, "", id="answers-at-length"),
        pytest.param("RUNNING", {"DEAF_STATE": "2"}, 3, True, "1 2", id="answers-late"),
        pytest.param(
            "COMPLETING", {"DEAF_STATE": "2"}, 3, False, "1 2", id="cancelled-and-answers-late"
        ),
        pytest.param("RUNNING", {"DEAF_STATE": "99"}, 3, True, "1 2 4 0", id="never-answers"),
        pytest.param("RUNNING", {"DEAF_REQUEUE": "3"}, 3, True, "1 2 4", id="takes-it-back-late"),
        pytest.param(
            "RUNNING", {"DEAF_REQUEUE": "99"}, 3, False, "1 2 4 0", id="never-takes-it-back"
        ),
        pytest.param(
            "RUNNING", {"DEAF_NODE": "99"}, 3, True, "1 2 4 0", id="does-not-know-the-node"
        ),
    ],
)
@pytest.mark.timeout(60)
def test_a_slurm_that_does_not_answer_is_no_cancelled_job(
    tree: Path,
    tmp_path: Path,
    state: str,
    deaf: dict[str, str],
    code: int,
    requeued: bool,
    pauses: str,
) -> None:
    """A crashed job whose scontrol fails some times; its pauses are counted, not slept."""
    srun = "echo $FASTGRPO_MASTER >master; exit 3"
    path = programs(tmp_path, {"scontrol": FLAKY_JOB, "srun": srun, "sleep": "echo $1 >>pauses"})
    told = {"DEAF_STATE": "0", "DEAF_NODE": "0", "DEAF_REQUEUE": "0"} | deaf
    command = ["bash", str(tree / "launch/t2v_tiny.sh")]
    result = start(
        command,
        cwd=tmp_path,
        PATH=path,
        STATE=f"{state} Reason=None",
        ENVIRONMENT="BATCH",
        **SLURM | {"SLURM_NNODES": "1"},
        **told,
    )
    assert result.returncode == code, result.stderr
    assert (f"requeued {SLURM['SLURM_JOB_ID']}" in result.stdout) == requeued
    assert ("cancelled; submitting it again goes on" in result.stderr) == (state == "COMPLETING")
    assert ("slurm did not take it back; submitting it again" in result.stderr) == (
        "DEAF_REQUEUE" in deaf and not requeued
    )
    slept = tmp_path / "pauses"
    assert (slept.read_text().split() if slept.exists() else []) == pauses.split()
    address = "n1" if "DEAF_NODE" in deaf else "127.0.0.7"
    assert (tmp_path / "master").read_text().startswith(f"{address}:")


@pytest.mark.parametrize(
    ("person", "left"), [(None, "slurm\n"), ("", ""), ("enough\n", "enough\n")]
)
def test_slurms_word_leaves_a_persons_stop_file_as_it_is(
    tmp_path: Path, person: str | None, left: str
) -> None:
    if person is not None:
        (tmp_path / "stop").write_text(person)
    script = f"set -euo pipefail; source '{ROOT}/launch/_job.sh'; folder='{tmp_path}'; hear_slurm; kill -USR1 $$"
    subprocess.run(["bash", "-c", script], check=True, timeout=20)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"stop": left}


def test_the_name_of_this_machine_need_not_resolve() -> None:
    """Wherever torchrun is started for one machine, it is told an address and no name."""
    options = " ".join(ON_THIS_MACHINE)
    assert options == "--standalone --local-addr=127.0.0.1"
    assert f"meeting=({options})" in (ROOT / "launch" / "_run.sh").read_text()


def test_only_a_lone_process_whose_number_is_open_starts_more() -> None:
    assert processes_to_start({"FASTGRPO_PROCESSES": "8"}) == 8
    assert processes_to_start({"FASTGRPO_PROCESSES": "8", "WORLD_SIZE": "1"}) == 8
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert processes_to_start({"FASTGRPO_PROCESSES": "8", **rank}) == 1
    # a scheduler's, in the shell of a container, for a torchrun to come
    assert processes_to_start({"FASTGRPO_PROCESSES": "8", "RANK": "0", "WORLD_SIZE": "2"}) == 8
    with pytest.raises(UserError, match="FASTGRPO_PROCESSES=0"):
        processes_to_start({"FASTGRPO_PROCESSES": "0"})


def test_nothing_of_the_outer_torchrun_reaches_the_inner_one() -> None:
    outer = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "HOME": "h",
        "OMP_NUM_THREADS": "3",
    }
    assert torchrun_environment(outer, processes=2) == {
        "HOME": "h",
        "OMP_NUM_THREADS": "3",
        "PYTHONPATH": str(ROOT),
        SETTLED: "1",
    }


LAUNCH_FILES = sorted(
    file for file in (ROOT / "launch").glob("*.sh") if not file.name.startswith("_")
)


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: str(file.name))
def test_a_launch_file_is_clean_bash_and_clean_python(file: Path, tmp_path: Path) -> None:
    bash = subprocess.run(
        ["bash", "-n", str(file)], capture_output=True, text=True, check=False, timeout=20
    )
    assert (bash.returncode, bash.stderr) == (0, "")
    copy = shutil.copy(file, tmp_path)
    python = [sys.executable, "-W", "error", "-m", "py_compile", str(copy)]
    compiled = subprocess.run(python, capture_output=True, text=True, check=False, timeout=60)
    assert (compiled.returncode, compiled.stderr) == (0, "")
    assert os.access(file, os.X_OK)
    assert b"\r" not in file.read_bytes()


def test_launch_files_differ_only_in_their_slurm_lines() -> None:
    def common(file: Path) -> list[str]:
        return [line for line in file.read_text().splitlines() if not line.startswith("#SBATCH")]

    assert all(common(file) == common(LAUNCH_FILES[0]) for file in LAUNCH_FILES)


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: str(file.name))
def test_a_launch_file_has_its_recipe_and_its_job_name(file: Path) -> None:
    assert file.with_suffix(".toml").is_file()
    assert f"#SBATCH --job-name={file.stem}\n" in file.read_text()
