"""python -m tests.folders FAMILY FOLDER: write a tiny random checkpoint of a family, to try a launch file with."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    family, folder = sys.argv[1:]
    importlib.import_module(f"tests.folders.{family}").write(Path(folder))
