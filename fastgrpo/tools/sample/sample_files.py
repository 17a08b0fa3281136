"""The files of samples: clips or pictures, the contact sheet, and the manifest that tells of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastgrpo.data import video
from fastgrpo.tools.sample import contact_sheet
from fastgrpo.tools.sample.work import Clip, Cut, Job

MANIFEST = "manifest.json"
SHEET = "sheet.png"


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


def describe(job: Job, folder: Path, strips: Tensor, finite: Tensor, cut: Cut) -> None:
    """Write the contact sheet and the manifest.

    strips: uint8 [N, R, f, h, w, 3];  finite: bool [N, R], the base model's first
    cut: the texts that are marked, with the tokens that each encoder sees, and those of the text
    """
    source, size = job.source, job.source.video
    model = source.snapshot.model
    title = source.snapshot.label
    if job.against_base:
        title = f"above: base, below: {title}"
    captions = [
        clip.caption if all(own) else f"NOT FINITE, {clip.caption}"
        for clip, own in zip(job.clips, finite.tolist(), strict=True)
    ]
    contact_sheet.write_sheet(folder / SHEET, strips, captions, title)
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
            **cut.marks(clip.prompt),
            "image": str(clip.prompt.image) if clip.prompt.image else None,
            "seed": clip.seed,
            "finite": own[-1],
            **({"base_finite": own[0]} if job.against_base else {}),
            **{key: f"{clip.stem}{ending}{job.suffix}" for key, ending in endings.items()},
        }
        for clip, own in zip(job.clips, finite.tolist(), strict=True)
    ]
    checkpoint = source.snapshot.checkpoint
    manifest = {
        "weights": source.snapshot.label,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "settings": settings,
        **({"negative_tokens_seen": cut.negative} if cut.negative else {}),
        "sheet": SHEET,
        "samples": samples,
    }
    (folder / MANIFEST).write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
