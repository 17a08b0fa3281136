"""python -m tests.rehearsal.materials KIND FOLDER: what a job reads, written into a new folder.

KIND: a model family, or one of images, scorers, token.
"""

import importlib
import sys
from pathlib import Path

TOKEN = "a token of at least sixteen characters"


def write(kind: str, folder: Path) -> None:
    """Write a tiny random model, weights of a reward, a prompt file, or a token."""
    if kind == "images":
        from tests.harness.folders.launch_files import with_images

        folder.mkdir(parents=True)
        with_images(folder)
    elif kind == "token":
        folder.mkdir(parents=True)
        (folder / "token").write_text(TOKEN)
    elif kind == "scorers":
        _write_scorers(folder)
    else:
        importlib.import_module(f"tests.harness.folders.{kind}").write(folder)


def _write_scorers(folder: Path) -> None:
    """Write weights of VideoAlign and HPS, and `overrides`, a line that puts them into a recipe."""
    from tests.harness.weights import clip, videoalign

    folder.mkdir(parents=True)
    videoalign.write(folder / "videoalign")
    clip.write_hps(folder / "hps")
    options = ",".join(
        f'{key}="{value}"' for key, value in videoalign.options(folder / "videoalign").items()
    )
    rewards = [
        f'name="videoalign",path="{folder}/videoalign",dtype="bfloat16",'
        f"weights={{VQ=1.0,MQ=1.0}},options={{{options}}}",
        f'name="hps",path="{folder}/hps",weights={{HPS=1.0}}',
        'name="video_stats",weights={sharpness=1.0}',
    ]
    entries = ",".join(f'{{where="process",{entry}}}' for entry in rewards)
    (folder / "overrides").write_text(f"rewards=[{entries}]\n")


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
