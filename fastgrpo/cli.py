"""The `fastgrpo` command. A user's mistake is one line on stderr and exit code 2."""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastgrpo.commands import add_export, add_sample, add_status, run_export, run_sample, run_status
from fastgrpo.core.errors import UserError
from fastgrpo.core.processes import OneRankError, after_rank_0, die_with_torchrun, leave, rank
from fastgrpo.judging import add_evaluate, add_score, run_evaluate, run_score
from fastgrpo.planning import add_plan, overrides_first, run_plan

if TYPE_CHECKING:
    from fastgrpo.core.config import RewardSpec

EPILOG = """examples:
  fastgrpo train launch/t2v_tiny.toml                           one process, the tiny world
  fastgrpo train launch/t2v_tiny.toml run.dir=runs/a run.seed=1 rewards.0.where=process
  torchrun --nproc-per-node 2 launch/t2v_tiny.sh                the same recipe on two ranks
  fastgrpo preflight launch/t2v_tiny.toml                       is this recipe correct on this machine
  fastgrpo plan launch/t2v_hunyuan.toml --gpus 64 --gpu h800    does it fit, how long will it take
  fastgrpo embed launch/t2v_tiny.toml                           encode its prompts beforehand
  fastgrpo sample runs/t2v_tiny --against-base                  held-out clips, beside the base model's
  fastgrpo export runs/t2v_tiny exported                        a folder that diffusers loads
  fastgrpo score clip.mp4 --reward tiny_world --prompt "..."    what a reward says of a file
  fastgrpo evaluate runs/t2v_tiny                               base against trained, by several rewards
  fastgrpo report runs/t2v_tiny                                 the report of a finished or running run
  fastgrpo status runs/t2v_tiny                                 where each rank is: does it hang, and which one
  fastgrpo keys                                                 every recipe key, its default and meaning
"""


def parser() -> argparse.ArgumentParser:
    """All sub-commands and their help."""
    top = argparse.ArgumentParser(
        prog="fastgrpo",
        description="Reinforcement learning for video and image generators: GRPO on the SDE trajectories of flow and "
        "diffusion models (DanceGRPO).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="run a recipe, resuming where it stopped",
        description="Run a recipe in this process, or, under torchrun, as one of its ranks. A run folder that "
        "already holds a checkpoint of the same recipe is resumed. Ends with the held-out rewards before and after, in "
        "run.dir/summary.json and run.dir/report.html.",
    )
    check = commands.add_parser(
        "check",
        help="check a recipe and print it resolved",
        description="Read a recipe with its overrides, check it and the files it names, and print it in full. Nothing "
        "is loaded and nothing is written.",
    )
    preflight = commands.add_parser(
        "preflight",
        help="check a recipe on this machine before training",
        description="Before GPUs are burnt: ratio 1 at the recipe's batch sizes, gradients and weights equal on "
        "replicas, shared sequences equal to whole ones, noise, the rewards' golden clips, decoding, a checkpoint "
        "saved and loaded, room for checkpoints, and seconds and memory per phase. A green or red line each, with the "
        "remedy. Alone on a machine with several GPUs it starts one process per GPU; under torchrun it is one of the "
        "ranks. The exit code is 1 where a line is red. See docs/preflight.md.",
    )
    embed = commands.add_parser(
        "embed",
        help="encode a recipe's prompts beforehand",
        description="Put every prompt of a recipe through the model's text encoders and keep the conditions in "
        "prompts.cache, or else in run.dir/embeddings. `train` does the same where it is missing. Runs in this process "
        "or, under torchrun, over all ranks; started again after a kill it goes on with what is missing.",
    )
    for command in (train, check, preflight, embed):
        command.add_argument("recipe", type=Path, help="a TOML file, such as launch/t2v_tiny.toml")
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="a recipe key to set; `fastgrpo keys` lists them"
        )

    add_plan(commands)
    add_sample(commands)
    add_export(commands)
    add_score(commands)
    add_evaluate(commands)

    commands.add_parser(
        "keys",
        help="list every recipe key",
        description="Every key of a recipe, by section: name, default, meaning.",
    )

    serve = commands.add_parser(
        "serve-rewards",
        help="serve rewards over HTTP",
        description="Serve rewards over HTTP: the ones named, with their settings at their defaults, or with --recipe "
        'those of a recipe that have where = "server". The bearer token is read from --token-file, or from the '
        "environment variable FASTGRPO_TOKEN. Binding beyond this machine needs --token-file. SIGTERM ends it in good "
        "order. See docs/reward_server.md.",
    )
    serve.add_argument(
        "rewards",
        nargs="*",
        metavar="NAME",
        help="files of rewards/, such as tiny_world; with --recipe: section.key=value overrides",
    )
    serve.add_argument("--recipe", type=Path, help="serve this recipe's [[rewards]], with their settings")
    serve.add_argument("--only", action="append", metavar="NAME", help="of the recipe's rewards only this one; repeat")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=int, default=8700, help="0 takes a free one (default: %(default)s)")
    serve.add_argument("--token-file", type=Path, help="file with the bearer token that clients must send")
    serve.add_argument("--ready-file", type=Path, help="written with url and pid once the server listens")
    serve.add_argument(
        "--max-waiting", type=int, default=1024, metavar="MIB", help="clips read or waiting (default: %(default)s MiB)"
    )
    serve.add_argument(
        "--batch-wait", type=float, default=10.0, metavar="MS",
        help="how long a clip waits for others of its shape (default: %(default)g ms)",
    )  # fmt: skip

    convert = commands.add_parser(
        "convert-videoalign",
        help="make VideoAlign's published checkpoint one safetensors file",
        description="Fold the adapters of a published VideoAlign (VideoReward) folder into its weights and write them "
        "as one safetensors file with its origin. A server loads that instead, without a pickle; scores are equal.",
    )
    convert.add_argument("source", metavar="SRC", type=Path, help="the folder with model_config.json and checkpoint-N")
    convert.add_argument("target", metavar="DST", type=Path, help="a new folder, or SRC itself")
    convert.add_argument("--base", help="folder or hub id of Qwen2-VL-2B-Instruct (default: what SRC names)")
    convert.add_argument(
        "--dtype", choices=("bfloat16",), help="a smaller file, for rewards.dtype=bfloat16 alone (default: exact)"
    )

    report = commands.add_parser(
        "report",
        help="write the HTML report of a run",
        description="Write run.dir/report.html, one self-contained page, from the files of a finished or running run.",
    )
    report.add_argument("run", type=Path, help="a run folder, such as runs/t2v_tiny")

    add_status(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  returns the exit code: 0, or 2 for a user's mistake, told in one line by one rank"""
    die_with_torchrun()
    arguments = parser().parse_args(overrides_first(sys.argv[1:] if argv is None else argv))
    try:
        run(arguments)
    except OneRankError:  # which that rank has told; the others learn of it by its end
        return 2
    except UserError as error:  # raised on every rank, see World.on_main and World.agree
        if rank() == 0:
            _complain(str(error))
        return after_rank_0(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        from fastgrpo.parallel.world import no_space

        _complain(str(no_space(error.filename)))
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Dispatch. Heavy imports happen here, so that --help is quick."""
    match arguments.command:
        case "train":
            quiet_libraries()
            from fastgrpo.core import config
            from fastgrpo.train import train

            summary = train(config.load(arguments.recipe, arguments.overrides))
            if summary is not None and rank() == 0:
                print_summary(summary, config.load(arguments.recipe, arguments.overrides).run.dir)
        case "check":
            from fastgrpo.core import config
            from fastgrpo.data import prompts

            recipe = config.load(arguments.recipe, arguments.overrides)
            print(f"# {prompts.split(recipe.prompts).summary}")
            print(recipe.to_toml(), end="")
        case "preflight":
            quiet_libraries()
            from fastgrpo import preflight_run, processes
            from fastgrpo.core import config

            recipe = config.load(arguments.recipe, arguments.overrides)
            if (count := processes.processes_to_start(os.environ)) > 1:
                again = ["-m", "fastgrpo.cli", "preflight", str(arguments.recipe), *arguments.overrides]
                processes.replace_by_torchrun(again, count)
            if not preflight_run.run(recipe):
                leave(1)
        case "plan":
            if not run_plan(arguments):
                sys.exit(1)
        case "embed":
            quiet_libraries()
            from fastgrpo.core import config
            from fastgrpo.training.conditions.encode import embed

            embed(config.load(arguments.recipe, arguments.overrides))
        case "sample":
            quiet_libraries()
            run_sample(arguments)
        case "export":
            quiet_libraries()
            run_export(arguments)
        case "score":
            quiet_libraries()
            run_score(arguments)
        case "evaluate":
            quiet_libraries()
            run_evaluate(arguments)
        case "keys":
            from fastgrpo.core import config

            print(config.describe())
        case "serve-rewards":
            serve_rewards(arguments)
        case "convert-videoalign":
            quiet_libraries()
            from fastgrpo.rewards.networks.videoalign.convert import convert

            print(convert(arguments.source, arguments.target, arguments.base, arguments.dtype))
        case "report":
            from fastgrpo.tools.report.report import write_report

            print(write_report(arguments.run))
        case "status":
            if not run_status(arguments):
                sys.exit(1)


def serve_rewards(arguments: argparse.Namespace) -> None:
    from fastgrpo.rewards.serving.server import app
    from fastgrpo.rewards.serving.server.admission import Limits
    from fastgrpo.training.sources import read_token

    file = arguments.token_file
    if file is None and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(f"--host={arguments.host}: reachable from other machines; give --token-file, too.")
    token = os.environ.get("FASTGRPO_TOKEN", "")
    if file is not None:
        try:
            token = read_token(file)
        except UserError as error:  # its key of a recipe is an option here
            raise UserError(str(error).replace("server.token_file", "--token-file", 1)) from None
    if not token:
        raise UserError("--token-file: no token; give a file with one, or set FASTGRPO_TOKEN.")
    if not token.isascii() or not token.isprintable():
        raise UserError("FASTGRPO_TOKEN: no usable token; set it to one line of printable characters.")
    if arguments.max_waiting < 1 or not 0 <= arguments.batch_wait <= 10_000:
        raise UserError("--max-waiting, --batch-wait: must be at least 1 MiB, and 0 to 10000 ms.")
    limits = Limits(max_waiting=arguments.max_waiting * 2**20, batch_wait_s=arguments.batch_wait / 1e3)
    app.serve(served_specs(arguments), arguments.host, arguments.port, token, arguments.ready_file, limits)


def served_specs(arguments: argparse.Namespace) -> "list[RewardSpec]":
    """The rewards that serve-rewards is asked for."""
    from fastgrpo.core import config
    from fastgrpo.rewards import plain

    if arguments.recipe is None:
        if not arguments.rewards or arguments.only:
            raise UserError("serve-rewards: nothing to serve; name rewards, or give --recipe (and then --only).")
        return [plain(name) for name in arguments.rewards]
    recipe = config.load(arguments.recipe, arguments.rewards)
    specs = [spec for spec in recipe.rewards if spec.where == "server"]
    missing = [name for name in arguments.only or () if name not in [spec.name for spec in specs]]
    if not specs:
        raise UserError(
            f"--recipe={arguments.recipe}: no reward with where='server'; it has none. Add rewards.0.where=server to "
            f"serve {recipe.rewards[0].name}."
        )
    if missing:
        has = ", ".join(spec.name for spec in specs)
        raise UserError(f"--only={missing[0]}: {arguments.recipe} has no such reward with where='server', only {has}.")
    return [spec for spec in specs if not arguments.only or spec.name in arguments.only]


def quiet_libraries() -> None:
    """Progress bars and notices of libraries would bury the run's own lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # none is changed
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def print_summary(summary: dict[str, object], folder: Path) -> None:
    """The held-out rewards before and after, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out reward, before and after training (ODE sampler, same prompts and seeds)")
    for column in ("part", "before", "after", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "part" else "right")
    before, after, difference, interval = (summary[key] for key in ("before", "after", "difference", "ci95"))
    assert isinstance(before, dict) and isinstance(after, dict)
    assert isinstance(difference, dict) and isinstance(interval, dict)
    for part in before:
        low, high = interval[part]
        table.add_row(
            part, f"{before[part]:.3f}", f"{after[part]:.3f}", f"{difference[part]:+.3f}", f"{low:+.3f} .. {high:+.3f}"
        )
    console = Console()
    console.print(table)
    console.print(f"{summary['iterations']} iterations, {summary['wall_seconds']:.0f} s of training", highlight=False)
    for name in ("report.html", "summary.json"):
        console.print(f"{folder / name}", highlight=False)


def _complain(message: str) -> None:
    print(f"fastgrpo: {message}", file=sys.stderr)


def console() -> NoReturn:
    """The `fastgrpo` command as a process."""
    leave(main())


if __name__ == "__main__":
    console()
