"""How much of the scoring an iteration hides: a pretended rollout, and a reward made to take as
long.

    python -m benchmarks.rewards.overlap [batches]

Rollout and reward only sleep, the reward behind a real server over loopback, so the figure is the
machinery's own. With n rollout batches nothing can hide the last batch's reward: at best the
iteration takes 1 + 1/n of the longer.
"""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch
import uvicorn
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.policy import Decoded
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.parallel.world import open_world
from fastgrpo.rewards.serving.client.client import RewardClient
from fastgrpo.rewards.serving.loaded_reward import Served
from fastgrpo.rewards.serving.server.admission import Limits
from fastgrpo.rewards.serving.server.app import make_app
from fastgrpo.rewards.serving.server.process import serving
from fastgrpo.training.scoring.scorer import Scorer

BATCH, ROLLOUT_S = 4, 0.5
TOKEN = "benchmark"


class Sleeping(Reward):
    """Takes as long for a batch as the rollout takes for it."""

    names = ("sum",)

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        time.sleep(ROLLOUT_S * len(pixels) / BATCH)
        return Scores({"sum": sums(pixels)}, torch.ones(len(pixels), dtype=torch.bool))


def sums(pixels: Tensor) -> Tensor:
    """The sum of each clip's pixels.  pixels: uint8 [B, F, H, W, 3];  returns float32 [B]"""
    return pixels.flatten(1).sum(1).float()


@contextlib.contextmanager
def running(spec: RewardSpec) -> Iterator[str]:
    """A server of the reward in a thread of this process; gives its url."""
    limits = Limits()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            serving(make_app([Served(Sleeping(), spec)], TOKEN, limits), limits)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def main() -> None:
    batches = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    total = batches * BATCH
    spec = RewardSpec(name="sleeping", weights={"sum": 1.0}, batch_size=BATCH)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (total, 9, 64, 64, 3), dtype=torch.uint8, generator=generator)
    with (
        open_world() as world,
        running(spec) as url,
        RewardClient([url], TOKEN, ["sleeping"]) as client,
    ):
        client.wait_ready(10.0)
        scorer = Scorer([client], [spec], 8.0, world)
        start = time.perf_counter()
        for first in range(0, total, BATCH):
            time.sleep(ROLLOUT_S)  # the rollout and the decoding
            slots = list(range(first, first + BATCH))
            decoded = Decoded(pixels[slots], torch.ones(BATCH) > 0)
            scorer.submit(slots, torch.zeros(BATCH, 1), decoded, ["p"] * BATCH)
        rolled = time.perf_counter() - start
        scored = scorer.collect(total)
        whole = time.perf_counter() - start
        scorer.close()
    assert torch.equal(scored.values["sum"], sums(pixels))
    longer = max(rolled, scored.seconds)
    print(f"{batches} batches of {BATCH}: rollout {rolled:.2f} s, scoring {scored.seconds:.2f} s")
    print(
        f"iteration {whole:.2f} s = {whole / longer:.3f} of the longer; at best "
        f"{1 + 1 / batches:.3f}"
    )
    print(
        f"scoring/hidden_share {scored.hidden_share:.3f}; scores equal to those made without "
        "overlap"
    )


if __name__ == "__main__":
    main()
