"""`fastgrpo sample` and `fastgrpo export`."""

import argparse
import re
from collections.abc import Callable
from typing import Any

from fastgrpo.cli.options import (
    add_which_weights,
    check_folder_target,
    path,
    positive,
    step_of,
    text_of,
)
from fastgrpo.core.errors import UserError
from fastgrpo.core.units import GIB, MIB

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": MIB, "GIB": GIB}
SETTINGS: dict[str, tuple[Callable[[str], object], str]] = {
    "frames": (int, "frames of a clip; 1 = image"),
    "height": (int, "pixels"),
    "width": (int, "pixels"),
    "fps": (float, "frames per second of the files"),
    "steps": (int, "denoising steps"),
    "shift": (float, "time-grid shift"),
    "guidance": (float, "embedded guidance"),
    "cfg": (float, "classifier-free guidance scale; 1 = off"),
    "negative-prompt": (str, "text of the unconditional branch"),
    "dtype": (str, "float32 or bfloat16"),
}
"""Options of `fastgrpo sample` in place of a recipe's keys: type and help."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parsers of both."""
    _add_sample(commands)
    _add_export(commands)


def _add_sample(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo sample`."""
    command = commands.add_parser(
        "sample",
        help="clips or images from a base model, a checkpoint or an export",
        description="Sample with the ODE sampler: mp4 or png files, a contact sheet and a manifest "
        "in one folder. Runs in this process or, under torchrun, over all ranks: prompt and seed "
        "give the same clip on any number.",
    )
    command.set_defaults(action=_run_sample)
    command.add_argument(
        "source",
        type=path("source", hub=True),
        help="a recipe (its base model), a run folder, an export or another folder in the "
        "diffusers layout",
    )
    _add_what(command)
    add_which_weights(command)
    add = command.add_argument_group("how, in place of the recipe's").add_argument
    for key, (kind, text) in SETTINGS.items():
        add(f"--{key}", type=kind, metavar=key.upper(), help=text)
    add(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="any recipe key; may be repeated",
    )
    add(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="clips of one prompt per forward pass (default: 1)",
    )
    add = command.add_argument_group("a folder without a recipe").add_argument
    add(
        "--recipe",
        type=path("--recipe"),
        metavar="FILE",
        help="the recipe of a folder in the diffusers layout",
    )
    add("--family", metavar="NAME", help="or only its family, with --frames, --height and --width")


def _add_what(command: argparse.ArgumentParser) -> None:
    """The options that say what is sampled, and where to."""
    add = command.add_argument_group("what").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    add(
        "--prompts",
        type=path("--prompts"),
        metavar="FILE",
        help="a file of prompts (default: the recipe's held-out ones)",
    )
    add(
        "--image",
        type=path("--image"),
        metavar="FILE",
        help="reference image of every --prompt, for image-to-video",
    )
    add("--limit", type=positive, metavar="N", help="the first N prompts")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="SEED",
        help="one clip per prompt and seed (default: 0)",
    )
    add(
        "--against-base",
        action="store_true",
        help="also the base model's clip of the same noise, side by side",
    )
    add(
        "--out",
        type=path("--out"),
        metavar="DIR",
        help="folder to write (default for a run: RUN/samples/step-N)",
    )
    add("--overwrite", action="store_true", help="replace the samples in that folder")


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `fastgrpo export`."""
    command = commands.add_parser(
        "export",
        help="a checkpoint as a folder that diffusers loads",
        description="Write a run's checkpoint as a folder that DiffusionPipeline.from_pretrained "
        "loads, the network as safetensors and the other parts copied from the base model. One "
        "tensor is in memory at a time.",
    )
    command.set_defaults(action=_run_export)
    command.add_argument("run", type=path("run"), help="a run folder")
    command.add_argument("folder", type=path("DST"), metavar="dst", help="folder to make")
    add_which_weights(command)
    add = command.add_argument
    add(
        "--lora",
        choices=("apart", "merged"),
        help="adapters as a file of their own (default), or folded into the base",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the network (%(default)s)",
    )
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a file of weights, such as 5GB (default: %(default)s)",
    )
    add(
        "--link",
        action="store_true",
        help="hard links for the other parts; editing them in place changes the base, too",
    )


def _run_sample(arguments: argparse.Namespace) -> None:
    """`fastgrpo sample`: print where the samples are."""
    from diffusers.utils import logging

    from fastgrpo.tools.sample.sample import Wanted, sample
    from fastgrpo.tools.sample.sample_files import MANIFEST, SHEET
    from fastgrpo.tools.sample.source import Asked

    choice = Asked(
        source=str(arguments.source),
        step=step_of(arguments.step),
        raw=arguments.raw_weights,
        recipe=arguments.recipe,
        family=arguments.family,
        changes=changes(arguments),
        overrides=tuple(arguments.set),
    )
    wanted = Wanted(
        prompts=tuple(arguments.prompt),
        file=text_of(arguments.prompts),
        image=arguments.image,
        limit=arguments.limit,
        seeds=tuple(arguments.seeds),
        batch_size=arguments.batch_size,
        out=arguments.out,
        against_base=arguments.against_base,
        overwrite=arguments.overwrite,
    )
    logging.disable_progress_bar()  # every rank would show its own
    done = sample(choice, wanted)
    if done.main:
        drawn = f"{done.clips} sample{'s' * (done.clips != 1)}"
        print(f"{drawn}, {SHEET} and {MANIFEST} in {done.folder}")
        if done.not_finite:
            print(
                f"{done.not_finite} of them are not finite (NaN or infinity in latents or pixels): "
                f'their files mean nothing, and {MANIFEST} marks them with "finite": false'
            )


def _run_export(arguments: argparse.Namespace) -> None:
    """`fastgrpo export`: print where the folder is."""
    from fastgrpo.tools.export.export import Export, export

    wanted = Export(
        run=arguments.run,
        folder=arguments.folder,
        step=step_of(arguments.step),
        raw=arguments.raw_weights,
        lora=arguments.lora,
        dtype=arguments.dtype,
        max_shard_bytes=shard_bytes(arguments.max_shard_size),
        link=arguments.link,
    )
    check_folder_target("DST", arguments.folder)
    print(export(wanted))


def changes(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The options that stand in place of a recipe's keys, by section."""
    keys = {
        "video": ("frames", "height", "width", "fps"),
        "rollout": ("steps", "shift"),
        "model": ("guidance", "cfg", "negative_prompt", "dtype"),
    }
    options = {
        section: {key: getattr(arguments, key) for key in names} for section, names in keys.items()
    }
    return {
        section: {k: v for k, v in values.items() if v is not None}
        for section, values in options.items()
    }


def shard_bytes(text: str) -> int:
    """The value of --max-shard-size in bytes: "5GB" is 5 * 10^9, "5GiB" 5 * 2^30."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size={text}: not a size; write it as 5GB or 500MB.")
    return size
