"""The folder of a study: clips of two models under names that say nothing, a page, and a key.

    FOLDER/page/      for raters: index.html and clips/, which works from a disk, without a server
    FOLDER/votes/     for the files that raters send back
    FOLDER/key.json   which clip is whose; not for raters

Both models draw the same prompts from the same noise with the deterministic sampler of `fastgrpo
sample`, and the pairs are fixed before the first vote.
"""

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastgrpo.checkpoint.reader import Step
from fastgrpo.core import files
from fastgrpo.core.errors import UserError
from fastgrpo.data import video
from fastgrpo.data.images import read_image
from fastgrpo.parallel.world import World, open_world
from fastgrpo.tools.evaluate.study import page
from fastgrpo.tools.evaluate.study.blinding import AGAINST, KEY, RUN, Key, Pair, opaque, study_id
from fastgrpo.tools.sample import sample
from fastgrpo.tools.sample.source import Asked, Source, find
from fastgrpo.tools.sample.work import Clip, Job

PAGE, CLIPS, VOTES = "page", "clips", "votes"
QUESTION = "Which one is better for this text?"
WRITTEN = 946_684_800
"""The date of all files that raters get, in Unix seconds: the real ones tell who came first."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The study that the command line asks for."""

    pairs: int
    against: Step | None = None  # a checkpoint of the same run; None: the base model
    file: str | None = None  # of prompts; None: the recipe's held-out ones
    out: Path | None = None
    question: str = QUESTION


@dataclass(frozen=True)
class Built:
    """The folder that was written."""

    folder: Path
    pairs: int
    not_finite: int  # pairs left out, since a clip of theirs is not finite
    main: bool  # whether this is the rank that prints


def build(asked: Asked, wanted: Wanted) -> Built:
    """Draw the pairs in this process or over torchrun's ranks, and publish the folder as a whole.

    Raises UserError on every rank for a mistake that any rank meets.
    """
    with open_world() as world, ExitStack() as stack:
        job = world.on_main(lambda: prepare(asked, wanted))
        secret = world.on_main(lambda: secrets.token_hex(32))
        folder = world.on_main(lambda: stack.enter_context(files.whole_folder(job.out, "--out")))
        drawn, mistake = dict[int, list[bool]](), None
        try:
            drawn = draw(job, folder / PAGE / CLIPS, secret, world)
        except UserError as error:
            mistake = error
        except OSError as error:
            mistake = files.refused(job.out, "--out", error)
        world.raise_if_any_failed(mistake)
        rows = torch.zeros(len(drawn), 2, dtype=torch.uint8)
        for row, number in enumerate(sorted(drawn)):
            rows[row] = torch.tensor(drawn[number])
        finite = world.combine(rows, sorted(drawn), len(job.clips)) > 0
        sample.check_finite(job, finite)
        usable = finite.all(1).tolist()
        world.on_main(lambda: publish(folder, make_key(job, wanted.question, secret, usable), job))
        return Built(job.out, sum(usable), len(usable) - sum(usable), world.main)


def prepare(asked: Asked, wanted: Wanted) -> Job:
    """Choose weights, prompts and seeds without loading them.

    Every prompt gets a pair before any gets a second one, from the next seed.
    Raises UserError for options that do not go together.
    """
    source = _compared(asked, wanted)
    out = wanted.out
    if out is None and source.folder is not None:
        out = source.folder.parent.parent / "studies" / source.folder.name
    if out is None:
        raise UserError("--out: missing; name the folder for the study.")
    files.check_free(out, "--out", None)
    if not wanted.question.strip():
        raise UserError("--question: is empty; write what raters are to judge, or leave it out.")
    prompts = sample.choose_prompts(source, sample.Wanted(file=wanted.file, limit=wanted.pairs))
    seeds, more = divmod(wanted.pairs, len(prompts))
    clips = list[Clip]()
    for n, prompt in enumerate(prompts):
        clips += [Clip(len(clips) + i, prompt, i, "") for i in range(seeds + (n < more))]
    return Job(
        source=source,
        clips=clips,
        batches=[range(n, n + 1) for n in range(len(clips))],
        against_base=True,
        out=out,
        overwrite=False,
    )


def _compared(asked: Asked, wanted: Wanted) -> Source:
    """The run's weights, with those that they are compared with in the place of the base model."""
    source = find(asked)
    if source.base is None:
        raise UserError(
            f"source={asked.source}: a base model, or a folder without a recipe that names its "
            "own; give a run folder or an export."
        )
    if wanted.against is None:
        return source
    other = find(replace(asked, step=wanted.against)).snapshot
    if other.checkpoint == source.snapshot.checkpoint:
        raise UserError(
            f"--against={wanted.against}: is the checkpoint that is compared with it; name "
            "another, or base."
        )
    return replace(source, base=other)


def draw(job: Job, folder: Path, secret: str, world: World) -> dict[int, list[bool]]:
    """Write this rank's clips.

    returns, by number of the pair, whether the clips of AGAINST and RUN are finite
    """
    folder.mkdir(parents=True, exist_ok=True)
    finite = {}
    for drawn in sample.generate(sample.encoded(job, world), world):
        finite[drawn.number] = drawn.finite
        if not all(drawn.finite):
            continue
        for model, pixels in zip((AGAINST, RUN), drawn.rows, strict=True):
            file = folder / clip_name(job, secret, drawn.number, model)
            if job.suffix == ".png":
                video.write_png(file, pixels[0])
            else:
                video.write_mp4(file, pixels, job.source.video.fps)
    return finite


def clip_name(job: Job, secret: str, number: int, model: str) -> str:
    """The name of a clip's file."""
    return opaque(secret, "clip", number, model) + job.suffix


def make_key(job: Job, question: str, secret: str, usable: Sequence[bool]) -> Key:
    """The key of the pairs whose clips are finite."""
    source = job.source
    assert source.base is not None
    model = source.snapshot.model.model_dump(
        include={"family", "path", "network", "dtype", "guidance", "cfg", "negative_prompt"}
    )
    settings = model | source.video.model_dump() | {"steps": source.steps, "shift": source.shift}
    pairs = [
        Pair(
            pair=opaque(secret, "pair", clip.number),
            prompt=clip.prompt.text,
            seed=clip.seed,
            run=clip_name(job, secret, clip.number, RUN),
            against=clip_name(job, secret, clip.number, AGAINST),
            image=f"{opaque(secret, 'image', clip.number)}.png" if clip.prompt.image else None,
        )
        for clip in job.clips
        if usable[clip.number]
    ]
    return Key(
        secret=secret,
        labels={RUN: source.snapshot.label, AGAINST: source.base.label},
        question=question.strip(),
        settings=settings,
        pairs=pairs,
        not_finite=[clip.caption for clip in job.clips if not usable[clip.number]],
    )


def publish(folder: Path, key: Key, job: Job) -> None:
    """Write reference images, page and key around the clips."""
    images = {opaque(key.secret, "image", clip.number): clip.prompt.image for clip in job.clips}
    for pair in key.pairs:
        if pair.image is not None:
            image = images[pair.image.removesuffix(".png")]
            assert image is not None
            pixels = read_image(image)  # none of what else the file says
            video.write_png(folder / PAGE / CLIPS / pair.image, pixels)
    write(folder, key)


def write(folder: Path, key: Key) -> None:
    """Write page and key around a folder of clips, and give all that raters get one date."""
    content = key.to_json()
    file = folder / KEY
    file.touch(mode=0o600)
    file.write_text(content, encoding="utf-8")
    (folder / VOTES).mkdir()
    study = study_id(content)
    (folder / PAGE / "index.html").write_text(page.html(key, study, CLIPS), encoding="utf-8")
    for path in (folder / PAGE).rglob("*"):
        os.utime(path, (WRITTEN, WRITTEN))
