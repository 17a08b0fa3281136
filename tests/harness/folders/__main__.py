"""python -m tests.harness.folders FAMILY FOLDER: write a tiny random checkpoint, to try a launch
file with.
"""

import argparse
import importlib
from pathlib import Path

from fastgrpo import models

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.harness.folders",
        description="Write a tiny random model folder, to try a launch file with.",
    )
    parser.add_argument("family", choices=models.known())
    parser.add_argument("folder", type=Path, help="a new folder")
    chosen = parser.parse_args()
    importlib.import_module(f"tests.harness.folders.{chosen.family}").write(chosen.folder)
