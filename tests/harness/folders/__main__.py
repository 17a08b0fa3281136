"""python -m tests.harness.folders FAMILY FOLDER: write a tiny random checkpoint, to try a launch
file with.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    family, folder = sys.argv[1:]
    importlib.import_module(f"tests.harness.folders.{family}").write(Path(folder))
