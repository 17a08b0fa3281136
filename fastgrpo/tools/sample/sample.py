"""Clips and images by the ODE sampler, on any number of ranks: the sampling itself and its files.

A clip's noise is keyed by its seed alone, a prompt is encoded by itself, and batches are fixed
before they are dealt
out: the same prompt and seed give the same clip, bit for bit, on one rank or many.
"""

import gc
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from fastgrpo import models
from fastgrpo.algorithm import noise
from fastgrpo.core import config, files
from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Policy, Prompt, move, stack
from fastgrpo.data import prompts as prompt_file
from fastgrpo.data import video
from fastgrpo.models.loading import policies
from fastgrpo.parallel.world import World, open_world
from fastgrpo.tools.sample import contact_sheet
from fastgrpo.tools.sample.source import Asked, Snapshot, Source, find
from fastgrpo.training import rollout

MANIFEST = "manifest.json"
SHEET = "sheet.png"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The samples to make, as the command line says it."""

    prompts: tuple[str, ...] = ()
    file: str | None = None
    image: Path | None = None  # the reference image of every one of `prompts`
    # at most this many prompts; None: all, of held-out ones as many as are evaluated
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 1
    out: Path | None = None
    against_base: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Clip:
    """One sample."""

    number: int
    prompt: Prompt
    seed: int
    stem: str  # of its files

    @property
    def caption(self) -> str:
        return f"seed {self.seed}: {self.prompt.text}"


@dataclass(frozen=True)
class Work:
    """All that is to be sampled, the same on every rank."""

    source: Source
    clips: list[Clip]  # prompt by prompt, seed by seed
    batches: list[range]  # of clips; each of one prompt
    against_base: bool


@dataclass(frozen=True)
class Share:
    """The part of the work that one rank does, and its conditions."""

    work: Work
    batches: list[range]
    conditions: Mapping[Prompt, Condition]
    negative: Condition | None  # None: without classifier-free guidance


@dataclass(frozen=True, kw_only=True)
class Job(Work):
    """All that is to be sampled, and the folder for it."""

    out: Path
    overwrite: bool

    @property
    def suffix(self) -> str:
        return ".png" if self.source.video.frames == 1 else ".mp4"


@dataclass(frozen=True)
class Drawn:
    """The samples of one prompt and noise, of the base model first where it is compared.

    rows: uint8 [F, H, W, 3] each, on the CPU
    """

    number: int  # of the clip
    rows: list[Tensor]
    finite: list[bool]  # whether the latents of each row were; pixels of others mean nothing


@dataclass(frozen=True)
class Sampled:
    """The folder that was written."""

    folder: Path
    clips: int
    main: bool  # whether this is the rank that prints


def sample(choice: Asked, wanted: Wanted) -> Sampled:
    """Sample, and publish files, sheet and manifest as one folder.

    Raises UserError on every rank for a mistake that any rank meets.
    """
    with open_world() as world, ExitStack() as stack:
        job = world.on_main(lambda: plan(find(choice), wanted))
        replaces = MANIFEST if job.overwrite else None
        folder = world.on_main(
            lambda: stack.enter_context(files.whole_folder(job.out, "--out", replaces))
        )
        mistake, strips = None, {}
        try:
            strips = draw(job, folder, world)
        except UserError as error:
            mistake = error
        except OSError as error:
            mistake = files.refused(job.out, "--out", error)
        world.raise_if_any_failed(mistake)
        everything = gather(job, strips, world)
        world.on_main(lambda: describe(job, folder, everything))
        return Sampled(job.out, len(job.clips), world.main)


def plan(source: Source, wanted: Wanted) -> Job:
    """Fix prompts, seeds, files and batches. Raises UserError for what does not go together."""
    if wanted.against_base and source.base is None:
        raise UserError(
            "--against-base: the source is a base model, or has no recipe that names its own; "
            "leave it out."
        )
    out = wanted.out or source.folder
    if out is None:
        raise UserError("--out: missing; name the folder for the samples.")
    if not wanted.overwrite and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out={out}: exists already; give --overwrite, or choose another folder.")
    if len(set(wanted.seeds)) < len(wanted.seeds):
        raise UserError(
            f"--seeds={' '.join(map(str, wanted.seeds))}: one is named twice; the clips would be "
            "the same."
        )
    clips, batches = deal(choose_prompts(source, wanted), wanted.seeds, wanted.batch_size)
    return Job(
        source=source,
        clips=clips,
        batches=batches,
        against_base=wanted.against_base,
        out=out,
        overwrite=wanted.overwrite,
    )


def deal(
    prompts: Sequence[Prompt], seeds: Sequence[int], size: int
) -> tuple[list[Clip], list[range]]:
    """A clip per prompt and seed, and the batches in which the clips are drawn.

    size: the most clips of a batch, all of one prompt
    """
    clips = [
        Clip(n * len(seeds) + i, prompt, seed, f"{n:03d}-{slug(prompt.text)}-seed{seed}")
        for n, prompt in enumerate(prompts)
        for i, seed in enumerate(seeds)
    ]
    per_prompt = len(seeds)
    batches = [
        range(start, min(start + size, first + per_prompt))
        for first in range(0, len(clips), per_prompt)
        for start in range(first, first + per_prompt, size)
    ]
    return clips, batches


def choose_prompts(source: Source, wanted: Wanted) -> list[Prompt]:
    """The prompts of the command line, of a file, or the recipe's held-out ones."""
    if wanted.prompts and wanted.file:
        raise UserError("--prompts: give --prompt or --prompts, not both.")
    if wanted.image is not None and not wanted.prompts:
        raise UserError("--image: is for --prompt; a file of prompts names its own images.")
    family = source.snapshot.model.family
    if wanted.image is not None and not models.reads_image(family):
        raise UserError(f"--image={wanted.image}: {family} takes no reference image; leave it out.")
    limit = wanted.limit
    if wanted.prompts:
        chosen = [Prompt(text, wanted.image, "--prompt") for text in wanted.prompts]
    elif wanted.file:
        settings = source.prompts or config.Prompts(train=wanted.file)
        chosen = prompt_file.read(settings, wanted.file, "--prompts", None).prompts
    elif source.prompts:
        chosen = prompt_file.split(source.prompts).heldout
        limit = limit or source.count
    else:
        raise UserError(
            "--prompt: missing; without a recipe, give --prompt TEXT or --prompts FILE."
        )
    return chosen[:limit]


def slug(text: str) -> str:
    """The beginning of a prompt, fit for a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:40].rstrip("-") or "prompt"


def draw(job: Job, folder: Path, world: World) -> dict[int, Tensor]:
    """Write this rank's clips to `folder`.

    returns number -> thumbnails uint8 [R, f, h, w, 3]; R = 2 with the base, else 1
    """
    strips = {}
    for drawn in generate(job, world):
        write(job, job.clips[drawn.number], drawn.rows, folder)
        strips[drawn.number] = torch.stack(
            [contact_sheet.thumbnails(row, job.source.video) for row in drawn.rows]
        )
    return strips


def generate(work: Work, world: World) -> Iterator[Drawn]:
    """This rank's clips, one by one.

    Base and trained network are never in memory at once: the base model's latents wait on the host.
    """
    batches = [work.batches[i] for i in world.share(len(work.batches))]
    if not batches:
        return
    source = work.source
    model = source.snapshot.model
    distinct = dict.fromkeys(work.clips[batch.start].prompt for batch in batches)
    with policies.encoder(model, source.video, world.device) as encode:
        conditions = {prompt: encode([prompt])[0] for prompt in distinct}
        negative = None
        if model.cfg > 1:
            negative = move(encode.negative(model.negative_prompt or ""), world.device)
    share = Share(work, batches, conditions, negative)
    before = {}
    if work.against_base:
        assert source.base is not None
        before = latents_of(source.base, share, world)[1]
        gc.collect()
    policy, after = latents_of(source.snapshot, share, world)
    for number, latent in after.items():
        latents = [before[number], latent] if work.against_base else [latent]
        rows = [policy.decode(x[None].to(world.device))[0].cpu() for x in latents]
        yield Drawn(number, rows, [bool(torch.isfinite(x).all()) for x in latents])


def latents_of(weights: Snapshot, share: Share, world: World) -> tuple[Policy, dict[int, Tensor]]:
    """Load a policy and sample.

    returns the policy, and number of a clip -> its latents [C, F, H, W] on the host
    """
    policy = weights.load(world.device)
    policy.negative = share.negative
    source, clips = share.work.source, share.work.clips
    shape = policy.latent_shape(source.video)
    grid = policy.time_grid(source.steps, source.shift, shape).to(world.device)
    shown = world.main and sys.stderr.isatty()
    latents: dict[int, Tensor] = {}
    for batch in track(share.batches, f"sampling {weights.label}", disable=not shown):
        x = noise.normal([noise_key(clips[n].seed) for n in batch], shape).to(world.device)
        condition = move(stack([share.conditions[clips[n].prompt] for n in batch]), world.device)
        latents |= zip(batch, rollout.sample_ode(policy, x, grid, condition).cpu(), strict=True)
    return policy, latents


def noise_key(seed: int) -> noise.Key:
    """Key of a clip's initial noise, which is drawn on the CPU: the same on every device."""
    return ("sample", seed)


def write(job: Job, clip: Clip, rows: Sequence[Tensor], folder: Path) -> None:
    """Write a clip's files.

    rows: uint8 [F, H, W, 3], the base model's first where it is compared
    """
    pictures = {"": rows[-1]}
    if len(rows) == 2:
        assert job.source.base is not None
        labels = (job.source.base.label, job.source.snapshot.label)
        pictures |= {
            "-base": rows[0],
            "-beside": contact_sheet.side_by_side(rows[0], rows[1], labels),
        }
    for ending, pixels in pictures.items():
        file = folder / f"{clip.stem}{ending}{job.suffix}"
        if job.suffix == ".png":
            video.write_png(file, pixels[0])
        else:
            video.write_mp4(file, pixels, job.source.video.fps)


def gather(job: Job, strips: Mapping[int, Tensor], world: World) -> Tensor:
    """Every rank's thumbnails.  returns uint8 [N, R, f, h, w, 3]"""
    shape = (2 if job.against_base else 1, *contact_sheet.thumbnail_shape(job.source.video))
    numbers = sorted(strips)
    rows = (
        torch.stack([strips[n] for n in numbers])
        if numbers
        else torch.zeros(0, *shape, dtype=torch.uint8)
    )
    return world.combine(rows, numbers, len(job.clips))


def describe(job: Job, folder: Path, strips: Tensor) -> None:
    """Write the contact sheet and the manifest.  strips: uint8 [N, R, f, h, w, 3]"""
    source, size = job.source, job.source.video
    model = source.snapshot.model
    title = source.snapshot.label
    if job.against_base:
        title = f"above: base, below: {title}"
    contact_sheet.write_sheet(folder / SHEET, strips, [clip.caption for clip in job.clips], title)
    endings = {"file": "", **({"base": "-base", "beside": "-beside"} if job.against_base else {})}
    settings = {
        **model.model_dump(
            include={"family", "path", "network", "dtype", "guidance", "cfg", "negative_prompt"}
        ),
        **size.model_dump(),
        "steps": source.steps,
        "shift": source.shift,
    }
    samples = [
        {
            "prompt": clip.prompt.text,
            "image": str(clip.prompt.image) if clip.prompt.image else None,
            "seed": clip.seed,
            **{key: f"{clip.stem}{ending}{job.suffix}" for key, ending in endings.items()},
        }
        for clip in job.clips
    ]
    checkpoint = source.snapshot.checkpoint
    manifest = {
        "weights": source.snapshot.label,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "settings": settings,
        "sheet": SHEET,
        "samples": samples,
    }
    (folder / MANIFEST).write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
