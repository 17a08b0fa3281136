"""`python -m fastgrpo.data.tiny_world`: train the tiny networks and write their folder."""

import sys

from fastgrpo.data.tiny_world.make import main

if __name__ == "__main__":
    sys.exit(main())
