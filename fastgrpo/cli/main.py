"""The `fastgrpo` command. A user's mistake is one line on stderr and exit code 2."""

import argparse
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fastgrpo import __version__
from fastgrpo.cli import options, plan, report, sample, serve, train
from fastgrpo.cli.evaluation import evaluate, reproduce, score, study
from fastgrpo.cli.start import fetch, init
from fastgrpo.core.errors import UserError, UserErrors
from fastgrpo.core.processes import (
    INTERRUPTED,
    SPOKEN_FOR,
    CtrlC,
    OneRankError,
    after_rank_0,
    die_with_torchrun,
    leave,
    rank,
    tell_torchrun,
)
from fastgrpo.run import output

EXAMPLES = (
    ("fastgrpo init mine --from t2v_tiny", "a folder of your own to begin in, anywhere"),
    ("fastgrpo fetch launch/t2v_hunyuan.toml --dry-run", "what it needs from hubs"),
    ("fastgrpo train launch/t2v_tiny.toml", "one process, the tiny world"),
    ("fastgrpo train launch/t2v_tiny.toml run.dir=runs/a run.seed=1 rewards.0.where=process", ""),
    ("torchrun --nproc-per-node 2 launch/t2v_tiny.sh", "the same recipe on two ranks"),
    ("fastgrpo preflight launch/t2v_tiny.toml", "is this recipe correct on this machine"),
    (
        "fastgrpo plan launch/t2v_hunyuan.toml --gpus 64 --gpu h800",
        "does it fit, how long will it take",
    ),
    ("fastgrpo embed launch/t2v_tiny.toml", "encode its prompts beforehand"),
    ("fastgrpo sample runs/t2v_tiny --against-base", "held-out clips, beside the base model's"),
    ("fastgrpo export runs/t2v_tiny exported", "a folder that diffusers loads"),
    ('fastgrpo score clip.mp4 --reward tiny_world --prompt "..."', "what a reward says of a file"),
    ("fastgrpo check-reward ./my_reward.py", "does a reward of your own keep the contract"),
    ("fastgrpo evaluate runs/t2v_tiny", "base against trained, by several rewards"),
    ("fastgrpo evaluate runs/t2i_sd --benchmark geneval --weights weights", "a benchmark of it"),
    ("fastgrpo study runs/t2v_tiny --pairs 24", "blind pairs of the two for human raters"),
    ("fastgrpo reproduce table2 --weights weights --dry-run", "what a table of the paper takes"),
    ("fastgrpo report runs/t2v_tiny", "the report of a finished or running run"),
    ("fastgrpo watch runs/t2v_tiny", "the same, as a page that keeps itself up to date"),
    ("fastgrpo status runs/t2v_tiny", "where each rank is: does it hang, and which one"),
    ("fastgrpo check launch/t2v_tiny.toml", "every mistake that shows without loading a model"),
    ("fastgrpo serve-rewards tiny_world --port 8700 --token-file token.txt", ""),
    ("fastgrpo convert-videoalign weights/VideoReward weights/videoalign", ""),
    ("fastgrpo keys", "every recipe key, its default and meaning"),
)
ALONE = (
    "init",
    "fetch",
    "check",
    "check-reward",
    "plan",
    "keys",
    "export",
    "score",
    "serve-rewards",
    "report",
    "reproduce",
    "watch",
    "status",
)
"""Commands that share no work with other ranks: each speaks, whatever a scheduler calls it."""
EPILOG = "examples:\n" + "".join(
    f"{f'  {line:<62}{meaning}'.rstrip()}\n" for line, meaning in EXAMPLES
)


def parser() -> argparse.ArgumentParser:
    """All sub-commands and their help."""
    top = argparse.ArgumentParser(
        prog="fastgrpo",
        description="Reinforcement learning for video and image generators: GRPO on the SDE "
        "trajectories of flow and diffusion models (DanceGRPO).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fastgrpo {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    init.add(commands)
    fetch.add(commands)
    train.add_train(commands)
    train.add_preflight(commands)
    train.add_embed(commands)
    plan.add(commands)
    sample.add(commands)
    score.add_score(commands)
    score.add_check_reward(commands)
    evaluate.add_evaluate(commands)
    study.add(commands)
    reproduce.add_reproduce(commands)
    train.add_keys(commands)
    serve.add(commands)
    report.add_report(commands)
    report.add_watch(commands)
    report.add_status(commands)
    for name, command in commands.choices.items():
        example = next((line for line, _ in EXAMPLES if line.split()[1] == name), "")
        command.epilog = command.epilog or (f"example: {example}" if example else None)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    returns the exit code: 0; 1 where it found something amiss; 2 for a user's mistake
    """
    die_with_torchrun()
    if argv is None:
        argv = sys.argv[1:]
    arguments = parser().parse_args(plan.overrides_first(argv))
    quiet_libraries()
    named: dict[str, Path] = {}
    try:
        named |= options.with_paths(arguments)
        return arguments.action(arguments) or 0
    except OneRankError:  # printed by that rank; the others learn of it by its end
        return 2
    # raised on every rank, see World.on_main and World.raise_if_any_failed
    except UserError as error:
        if arguments.command in ALONE and "TORCHELASTIC_RUN_ID" not in os.environ:
            _complain(str(error))
            return 2
        if rank() == 0:
            for line in error.lines if isinstance(error, UserErrors) else [str(error)]:
                _complain(line)
        return after_rank_0(2)
    except OSError as error:
        mistake = _mistake(error, named)
        if mistake is None:
            raise
        _complain(str(mistake))
        return 2


def _mistake(error: OSError, named: Mapping[str, Path]) -> UserError | None:
    """The line for an error of the operating system; None: it is about no path of the user's.

    named: the command line's paths, by option
    """
    from fastgrpo.core.config.paths import refusal

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        from fastgrpo.parallel.world import no_space

        return no_space(error.filename)
    return refusal(error, named)


def quiet_libraries() -> None:
    """Progress bars and notices of libraries would bury the run's own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # none is changed
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _complain(message: str) -> None:
    """Print a user's mistake, and have torchrun's report of failures end with it."""
    print(f"fastgrpo: {message}", file=sys.stderr)
    tell_torchrun(f"fastgrpo: {message}")


def console(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command as this process, and end the process whatever comes.

    An error that is no user's mistake is printed with its traceback, exit code 1. Nothing is torn
    down after it: where one rank fails alone, its communicators would wait for the others. Ctrl-C
    is one line and exit code 130.
    """
    ctrl_c, reason = CtrlC(), None
    try:
        output.guard()
        code = main(argv)
        reason = output.refused()
    except SystemExit as end:  # the command line itself is wrong, or --help
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        if not ctrl_c.received and not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        code = 1
    ended = "fastgrpo: ended by Ctrl-C\n" if SPOKEN_FOR not in os.environ and rank() == 0 else ""
    ctrl_c.end_at_once(ended)
    if ctrl_c.received:
        sys.stderr.write(ended)
        code = INTERRUPTED
    elif reason := reason or output.refused():
        print(f"fastgrpo: standard output: {reason}; what it should say is lost", file=sys.stderr)
        code = code or 1
    leave(code)
