"""`python -m fastgrpo.cli`."""

from fastgrpo.cli.main import console

if __name__ == "__main__":
    console()
