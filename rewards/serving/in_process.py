"""Rewards in the trainer's own process: no server, and the same scores bit for bit."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.core.reward import ImageEncoder, Reward, RewardWrapper, Scores
from fastgrpo.rewards.serving.judge import OUTAGE_S, judge_batch, patiently, told
from fastgrpo.rewards.serving.loaded_reward import Served, golden_clip, load_served
from fastgrpo.rewards.serving.visiting import VisitingWeights

log = logging.getLogger(__name__)


class ScorerInProcess:
    """Scores by rewards that this process holds.

    Weights of a reward with device="auto" share the trainer's GPU: they come there when scoring
    begins and leave it at `release`, so that the update has the memory. Scoring has a CUDA stream
    of its own and waits for no rollout.
    """

    at_once = 1  # rewards need not be thread-safe

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        device: torch.device | None = None,
        outage_s: float = OUTAGE_S,
    ) -> None:
        """Load the rewards.

        device: the trainer's. None: the CPU
        outage_s: seconds without any answer to a reward that asks elsewhere
        Raises UserError for a mistake in a spec.
        """
        self.device = device or torch.device("cpu")
        self.outage_s = outage_s
        self.served = {spec.name: load_served(spec) for spec in specs}
        self.names = tuple(self.served)
        self._lock = threading.Lock()
        self._trouble = ""  # what a reward raised last
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        shared = [one.reward for one in self.served.values() if one.spec.device == "auto"]
        modules = [module for reward in shared for module in reward.modules()]
        self._visiting = VisitingWeights(modules, self.device) if self._stream else None

    @property
    def shares_device(self) -> bool:
        """True: scoring takes memory of the trainer's own device."""
        return True

    @property
    def arriving(self) -> int:
        """Bytes of weights that scoring will bring to the trainer's GPU; 0 while they are there."""
        return 0 if self._visiting is None or self._visiting.here else self._visiting.size

    def score(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> dict[str, Scores]:
        """Scores of B clips by each reward, NaN and invalid where a reward had none.

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: frames per second
        Raises UserError where the GPU has no room for a reward, and where what a reward asks
        elsewhere has not answered for `outage_s`.
        """
        with self._present():
            result: dict[str, Scores] = {}
            for name, one in self.served.items():
                size = one.spec.batch_size
                with room_for(one.spec):
                    parts = [
                        self._judge(one, pixels[i : i + size], prompts[i : i + size], fps)
                        for i in range(0, len(pixels), size)
                    ]
                result[name] = join(parts)
            return result

    def differentiable(
        self, frames: Tensor, prompts: Sequence[str], fps: float
    ) -> dict[str, Tensor]:
        """Scores of B clips by part with their gradient, of the rewards that have a weight.

        On the present stream; the rewards' weights stay where they score until `release`.
        frames: float32 [B, F, H, W, 3], 0 to 255;  returns float32 [B] each
        """
        with self._present():
            pass
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        found: dict[str, Tensor] = {}
        for one in self.served.values():
            if any(one.spec.weights.values()):
                with room_for(one.spec):
                    rate = one.spec.fps or fps
                    found |= one.reward.differentiable(frames, prompts, rate)
        return found

    def _judge(self, one: Served, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """One reward's scores of one batch.  pixels: uint8 [B, F, H, W, 3]"""
        judge = partial(
            judge_batch,
            one.reward,
            pixels,
            prompts,
            one.spec.fps or fps,
            tell=partial(self._tell, one),
        )
        return patiently(one.name, judge, self.outage_s)

    def try_out(self, frames: int, size: tuple[int, int], fps: float) -> None:
        """Score a clip of noise in a run's form by each reward, before anything else is loaded.

        size: height and width
        Raises UserError where a reward raises, or gives other than one score for each clip.
        """
        drawn = torch.Generator().manual_seed(0)
        clip = torch.randint(0, 256, (frames, *size, 3), dtype=torch.uint8, generator=drawn)
        try:
            with self._present():
                for one in self.served.values():
                    with room_for(one.spec):
                        prompt, rate = golden_clip(one.reward)[1], one.spec.fps or fps
                        trial = partial(one.try_out, clip, prompt, rate)
                        patiently(one.name, trial, self.outage_s)
        finally:
            self.release()

    @property
    def has_vectors(self) -> bool:
        """Whether one of the rewards is a CLIP, which has image vectors."""
        return self._clip() is not None

    def image_vectors(self, pixels: Tensor) -> Tensor:
        """The mean unit vector of each clip's frames, by the first reward that is a CLIP.

        pixels: uint8 [B, F, H, W, 3];  returns float32 [B, E], on the CPU
        """
        clip = self._clip()
        assert clip is not None
        with self._present(), torch.inference_mode():
            vectors = clip.image_features(rearrange(pixels, "b f h w c -> (b f) h w c"))
        return rearrange(vectors, "(b f) e -> b f e", b=len(pixels)).mean(1).clone()

    def _clip(self) -> ImageEncoder | None:
        """The first reward that is a CLIP, also one with a threshold."""
        for one in self.served.values():
            reward = one.reward
            while isinstance(reward, RewardWrapper):
                reward = reward.reward
            if isinstance(reward, ImageEncoder):
                return reward
        return None

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Alone with the rewards, on their stream, with all weights where they score."""
        with self._lock, torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self._stream is not None:
                torch.cuda.set_device(self.device)  # of this thread
            if self._visiting is not None and not self._visiting.here:
                with room_for(next(iter(self.served.values())).spec):
                    self._visiting.come()
            yield

    def _tell(self, one: Served, reward: Reward, error: Exception, count: int) -> None:
        """Log what a reward raised, with its text: prompts are no secret in the run's own log."""
        self._trouble = f"{one.name}: {told(error, one.file)}"
        log.warning("rewards.name=%s; %d clips have no score", self._trouble, count)

    @property
    def hint(self) -> str:
        """Why clips have no score."""
        return self._trouble or "the rewards raised nothing here: they gave NaN, or no valid score"

    def release(self) -> None:
        """Give the trainer's GPU its memory back until the next scores are wanted."""
        with self._lock:
            if self._visiting is not None and self._visiting.here:
                self._visiting.leave()

    def take_events(self) -> dict[str, int]:
        """Counts of what went wrong: none, since nothing is sent."""
        return {}


@contextmanager
def room_for(spec: RewardSpec) -> Iterator[None]:
    """Raise UserError where the GPU has no memory left: every clip would be without a score."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"rewards.batch_size={spec.batch_size}: the GPU has no room for {spec.name}; lower it, "
            "or give it its own device."
        ) from None


def join(batches: Sequence[Scores]) -> Scores:
    """The scores of consecutive batches, float32 [B] each, as one."""
    values = {
        part: torch.cat([batch.values[part] for batch in batches]) for part in batches[0].values
    }
    return Scores(values, torch.cat([batch.valid for batch in batches]))
