"""The engine that reads text: RapidOCR's PP-OCRv6 on the CPU, from the files in its own package.

rapidocr 3.10 carries the small detection and recognition models and downloads others; the files are
named here, so that nothing is ever fetched. It comes from the world of OpenCV and takes BGR.
"""

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrpo.core.errors import UserError

Picture = NDArray[np.uint8]  # [H, W, 3], RGB
Engine = Callable[[Picture], str]

PACKAGES = ("rapidocr", "onnxruntime")
MODELS = ("PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx")
LIBRARIES = (*PACKAGES, "opencv-python-headless", "pyclipper", "shapely")
"""What decides, beside the models, what is read."""


def check_installed() -> None:
    """Raise UserError where the packages of the extra are missing; they are not imported."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"rewards.name=ocr: needs {' and '.join(missing)}, not installed here; "
            "pip install 'fastgrpo[ocr]'."
        )


def model_files() -> tuple[Path, Path]:
    """The detection and the recognition model inside rapidocr's package.

    Raises UserError where that version of it has others.
    """
    check_installed()
    about = importlib.util.find_spec("rapidocr")
    assert about is not None and about.origin is not None
    folder = Path(about.origin).parent / "models"
    files = [folder / name for name in MODELS]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"rewards.name=ocr: rapidocr {version('rapidocr')} has no {absent[0]} in it; "
            "pip install 'rapidocr>=3.10,<3.11'."
        )
    return files[0], files[1]


def versions() -> dict[str, str]:
    """The libraries of which another version may read otherwise."""
    return {name: version(name) for name in LIBRARIES}


def build(threads: int) -> Engine:
    """The engine: a picture to the lines that it shows, joined, from top to bottom.

    threads: of one picture
    """
    detection, recognition = model_files()
    settings = {
        "Global.use_cls": False,  # lines are not turned upside down, as in flow_grpo
        "Global.text_score": 0.0,
        "Global.log_level": "error",
        "Det.model_path": str(detection),
        "Rec.model_path": str(recognition),
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    # by name: the package is an extra, and need not be there
    return _Lines(importlib.import_module("rapidocr").RapidOCR(params=settings))


class _Lines:
    """RapidOCR as an Engine."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, picture: Picture) -> str:
        """The text of a picture, empty where it shows none."""
        found = self.model(np.ascontiguousarray(picture[..., ::-1]))
        lines = zip(found.txts or (), found.scores or (), strict=True)  # None: there are none
        return "".join(line for line, confidence in lines if confidence > 0)
