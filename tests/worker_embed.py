"""Ranks of tests/test_embeddings.py, forked from one process that has imported everything.

argv: number of ranks, port of the first, recipe, overrides
"""

import os
import sys
from pathlib import Path

from fastgrpo import config
from fastgrpo.embed import embed
from fastgrpo.models import family

if __name__ == "__main__":
    ranks, port = int(sys.argv[1]), sys.argv[2]
    recipe = config.load(Path(sys.argv[3]), sys.argv[4:])
    family(recipe.model.family)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in world.items()} | {"MASTER_PORT": port}
            embed(recipe)
            os._exit(0)
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
