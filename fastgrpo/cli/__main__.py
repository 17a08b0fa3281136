"""`python -m fastgrpo.cli`, and the `fastgrpo` command: from here on Ctrl-C is one line."""

import os
import sys
from typing import NoReturn


def console() -> NoReturn:
    """Run one command as this process; see `main.console`."""
    try:
        from fastgrpo.cli.main import console as run
    except KeyboardInterrupt:  # nothing has begun
        sys.stderr.write("fastgrpo: ended by Ctrl-C\n")
        os._exit(130)
    run()


if __name__ == "__main__":
    console()
