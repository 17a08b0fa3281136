"""`fastgrpo init`."""

import argparse
import shlex

from fastgrpo.cli.options import path, positive
from fastgrpo.core.errors import UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo init`."""
    command = commands.add_parser(
        "init",
        help="make a folder with a recipe and its launch file to begin from",
        description="Write a recipe that comes with the package, its launch file, a prompt file, a "
        "reward of your own that works and a README of the next commands into a folder, anywhere. "
        "With --gpus and --gpu the keys of speed and memory are those that `fastgrpo plan --tune` "
        "finds, and the launch file asks slurm for these nodes. No file is replaced.",
        epilog="example: fastgrpo init mine --from t2v_hunyuan --gpus 32 --gpu h100",
    )
    command.set_defaults(action=_run_init)
    add_to = command.add_argument
    add_to(
        "folder",
        metavar="FOLDER",
        type=path("FOLDER"),
        help="a new folder, or one without these files",
    )
    add_to(
        "--from",
        dest="source",
        default="t2v_tiny",
        metavar="RECIPE",
        help="t2v_tiny (default), t2v_hunyuan, one_card/t2i_sd or another of the recipes that come along",
    )
    add_to("--gpus", type=positive, metavar="N", help="how many GPUs it is to run on")
    add_to("--gpu", metavar="NAME", help="which, by a name of `fastgrpo plan`")
    add_to(
        "--gpus-per-node",
        type=positive,
        default=8,
        metavar="N",
        help="GPUs of a node (default: %(default)s)",
    )


def _run_init(arguments: argparse.Namespace) -> None:
    from fastgrpo.tools.start.init import Hardware, init

    gpus, gpu = arguments.gpus, arguments.gpu
    if (gpus is None) != (gpu is None):
        given, lacking = ("--gpus", "--gpu") if gpu is None else ("--gpu", "--gpus")
        raise UserError(f"{given}: says nothing alone; add {lacking}, too.")
    hardware = None if gpus is None else Hardware(gpus, gpu, arguments.gpus_per_node)
    files = init(arguments.folder, arguments.source, hardware)
    for file in files:
        print(file)
    folder = shlex.quote(str(arguments.folder))
    print(f"next: cd {folder}, and what README.md says there")
