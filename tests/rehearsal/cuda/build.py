"""Compiles rehearsal.cpp against the installed torch, once per content and version of torch.

Nothing here imports torch: the library must be loaded before torch asks for CUDA.
"""

import hashlib
import importlib.machinery
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("rehearsal.cpp")
FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-w")


class BuildError(Exception):
    """The compiler refused the source."""


def torch_folder() -> Path:
    """The installed package of torch, found without importing it."""
    spec = importlib.machinery.PathFinder.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def obstacle() -> str | None:
    """Why nothing can be rehearsed here, in one line; None: nothing is in the way."""
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "rehearsal skipped: this torch has a CUDA of its own; install the CPU build"
    if not library().exists() and compiler() is None:
        return "rehearsal skipped: no C++ compiler; install g++, or name one in CXX"
    return None


def compiler() -> str | None:
    """The path of the C++ compiler; None: there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cache_folder() -> Path:
    """Where compiled libraries are kept: fastgrpo/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgrpo"


def library() -> Path:
    """The compiled library of this source and this torch, whether or not it is there."""
    told = f"{importlib.metadata.version('torch')} {torch_folder()} {FLAGS}"
    digest = hashlib.sha256(SOURCE.read_bytes() + told.encode()).hexdigest()[:16]
    return cache_folder() / f"rehearsal-{digest}.so"


def build() -> Path:
    """Compile where that was not done yet, which takes some 15 s.  returns the library

    Raises BuildError with the compiler's last lines.
    """
    target, torch = library(), torch_folder()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}")
    include = torch / "include"
    command = [
        compiler() or "g++",
        *FLAGS,
        f"-I{include}",
        f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-L{torch / 'lib'}",
        "-o",
        str(fresh),
        str(SOURCE),
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{torch / 'lib'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        raise BuildError("\n".join(done.stderr.splitlines()[-20:]))
    os.replace(fresh, target)
    return target
