"""Clips and images by the ODE sampler, on any number of ranks: the sampling itself and its files.

A clip's noise is keyed by its seed alone, a prompt is encoded by itself, and batches are fixed
before they are dealt
out: the same prompt and seed give the same clip, bit for bit, on one rank or many.
"""

import gc
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
from fastgrpo.core.policy import Condition, Encoder, Policy, Prompt, experts_of, move, stack
from fastgrpo.data import prompts as prompt_file
from fastgrpo.models.loading import policies
from fastgrpo.parallel.world import World, open_world
from fastgrpo.tools.sample import contact_sheet
from fastgrpo.tools.sample.sample_files import MANIFEST, describe, write
from fastgrpo.tools.sample.source import Asked, Snapshot, Source, find
from fastgrpo.tools.sample.work import UNCUT, Clip, Cut, Job, Work
from fastgrpo.training import rollout
from fastgrpo.training.conditions import cut_prompts


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
class Share:
    """The part of the work that one rank does, and its conditions."""

    work: Work
    batches: list[range]
    conditions: Mapping[Prompt, Condition]
    negative: Condition | None  # None: without classifier-free guidance
    cut: Cut = UNCUT


@dataclass(frozen=True)
class Drawn:
    """The samples of one prompt and noise, of the base model first where it is compared.

    rows: uint8 [F, H, W, 3] each, on the CPU
    """

    number: int  # of the clip
    rows: list[Tensor]
    finite: list[bool]  # whether latents and pixels of each row were; others mean nothing


@dataclass(frozen=True)
class Shown:
    """What sheet and manifest show of a clip.

    thumbnails: uint8 [R, f, h, w, 3]; R = 2 with the base, else 1
    """

    thumbnails: Tensor
    finite: list[bool]  # R


@dataclass(frozen=True)
class Sampled:
    """The folder that was written."""

    folder: Path
    clips: int
    not_finite: int  # of the clips, on either side
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
        mistake, shown, cut = None, dict[int, Shown](), UNCUT
        try:
            shown, cut = draw(job, folder, world)
        except UserError as error:
            mistake = error
        except OSError as error:
            mistake = files.refused(job.out, "--out", error)
        world.raise_if_any_failed(mistake)
        strips, finite = gather(job, shown, world)
        check_finite(job, finite)
        world.on_main(lambda: describe(job, folder, strips, finite, cut))
        lost = int((~finite.all(1)).sum())
        return Sampled(job.out, len(job.clips), lost, world.main)


def check_finite(work: Work, finite: Tensor) -> None:
    """Raise UserError where no clip of a side is finite.  finite: bool [N, R]"""
    for column, side in enumerate(finite.unbind(1)):
        snapshot = work.source.base if column < finite.shape[1] - 1 else work.source.snapshot
        if snapshot is not None and not side.any():
            raise UserError(
                f"model: no sample of {snapshot.label} is finite, so that there is nothing to "
                "show: its weights are damaged or have exploded, or overflow in model.dtype; "
                "choose another --step or model.dtype=float32."
            )


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
        selected = prompt_file.read(settings, wanted.file, "--prompts", None)
        chosen = selected.prompts
        if selected.remarks:
            print(f"--prompts: {len(chosen):,} prompts{selected.remarks}", file=sys.stderr)
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


def draw(job: Job, folder: Path, world: World) -> tuple[dict[int, Shown], Cut]:
    """Write this rank's clips to `folder`.

    returns what to show of each, by number; and the texts that are cut
    """
    shown = {}
    share = encoded(job, world, job.out / MANIFEST)
    for drawn in generate(share, world):
        write(job, job.clips[drawn.number], drawn.rows, folder)
        strip = [contact_sheet.thumbnails(row, job.source.video) for row in drawn.rows]
        shown[drawn.number] = Shown(torch.stack(strip), drawn.finite)
    return shown, share.cut


def encoded(work: Work, world: World, listed: Path | None = None) -> Share:
    """This rank's part of the work, its prompts encoded; the main rank tells which are cut.

    listed: the file that will name all of these
    """
    batches = [work.batches[i] for i in world.share(len(work.batches))]
    if not batches:
        return Share(work, batches, {}, None)
    model, cut = work.source.snapshot.model, UNCUT
    distinct = dict.fromkeys(work.clips[batch.start].prompt for batch in batches)
    with policies.encoder(model, work.source.video, world.device) as encode:
        conditions = {prompt: encode([prompt])[0] for prompt in distinct}
        if world.main:
            cut = find_cut(encode, work)
            tell_cut(cut, work, listed)
        negative = None
        if model.cfg > 1:
            negative = move(encode.negative(model.negative_prompt or ""), world.device)
    return Share(work, batches, conditions, negative, cut)


def generate(share: Share, world: World) -> Iterator[Drawn]:
    """This rank's clips, one by one.

    Base and trained network are never in memory at once: the base model's latents wait on the host.
    """
    work, before = share.work, dict[int, Tensor]()
    if not share.batches:
        return
    source = work.source
    if work.against_base:
        assert source.base is not None
        before = latents_of(source.base, share, world)[1]
        gc.collect()
    policy, after = latents_of(source.snapshot, share, world)
    for number, latent in after.items():
        latents = [before[number], latent] if work.against_base else [latent]
        about = move(stack([share.conditions[work.clips[number].prompt]]), world.device)
        decoded = [policy.decode(x[None].to(world.device), about) for x in latents]
        finite = [
            bool(torch.isfinite(x).all()) and bool(own.finite[0])
            for x, own in zip(latents, decoded, strict=True)
        ]
        yield Drawn(number, [own.pixels[0].cpu() for own in decoded], finite)


def find_cut(encoder: Encoder, work: Work) -> Cut:
    """The prompts of all ranks, and the negative one, that are longer than an encoder sees."""
    every = dict.fromkeys(clip.prompt for clip in work.clips)
    model = work.source.snapshot.model
    return Cut(
        {prompt: seen for prompt in every if (seen := encoder.cut(prompt.text))},
        encoder.cut(model.negative_prompt or "") if model.cfg > 1 else {},
    )


def tell_cut(cut: Cut, work: Work, listed: Path | None) -> None:
    """Count the prompts that are cut, name some, and say where all are named."""
    every = list(dict.fromkeys(clip.prompt for clip in work.clips))
    numbers = {every.index(prompt): seen for prompt, seen in cut.prompts.items()}
    lines = [cut_prompts.summary(numbers, every, listed)]
    if cut.negative:
        lines.append(f"model.negative_prompt is cut: {cut_prompts.counts(cut.negative)}")
    for line in filter(None, lines):
        print(line, file=sys.stderr)


def latents_of(weights: Snapshot, share: Share, world: World) -> tuple[Policy, dict[int, Tensor]]:
    """Load a policy and sample.

    returns the policy, and number of a clip -> its latents [C, F, H, W] on the host
    """
    policy = weights.load(world.device)
    policy.negative = share.negative
    source, clips = share.work.source, share.work.clips
    shape = policy.latent_shape(source.video)
    times = policy.time_grid(source.steps, source.shift, shape)
    grid, experts = times.to(world.device), experts_of(policy.network, times)
    shown = world.main and sys.stderr.isatty()
    latents: dict[int, Tensor] = {}
    for batch in track(share.batches, f"sampling {weights.label}", disable=not shown):
        x = noise.normal([noise_key(clips[n].seed) for n in batch], shape).to(world.device)
        condition = move(stack([share.conditions[clips[n].prompt] for n in batch]), world.device)
        drawn = rollout.sample_ode(policy, x, grid, condition, experts=experts)
        latents |= zip(batch, drawn.cpu(), strict=True)
    return policy, latents


def noise_key(seed: int) -> noise.Key:
    """Key of a clip's initial noise, which is drawn on the CPU: the same on every device."""
    return ("sample", seed)


def gather(job: Job, shown: Mapping[int, Shown], world: World) -> tuple[Tensor, Tensor]:
    """Every rank's thumbnails, uint8 [N, R, f, h, w, 3], and whether they are finite, bool [N, R]"""
    sides, numbers = 2 if job.against_base else 1, sorted(shown)
    rows = torch.zeros(0, sides, *contact_sheet.thumbnail_shape(job.source.video)).byte()
    finite = torch.zeros(0, sides, dtype=torch.uint8)
    if numbers:
        rows = torch.stack([shown[n].thumbnails for n in numbers])
        finite = torch.tensor([shown[n].finite for n in numbers]).byte()
    total = len(job.clips)
    return world.combine(rows, numbers, total), world.combine(finite, numbers, total) > 0
