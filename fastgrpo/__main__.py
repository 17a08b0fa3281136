"""`python -m fastgrpo`."""

from fastgrpo.cli.__main__ import console

if __name__ == "__main__":
    console()
