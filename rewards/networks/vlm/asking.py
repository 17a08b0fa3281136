"""A reward that asks a served vision-language model questions about clips.

Each question about each clip is a request of its own: the clip's chosen frames as pictures, then
the question. The score is the expected answer by the probabilities of the first token, so that no
text is read and none of the spread between clips is lost to rounding.
"""

import base64
import hashlib
import io
import logging
import math
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import Unavailable
from fastgrpo.core.reward import Reward, Scores
from fastgrpo.rewards.common import clips, frames, weight_files
from fastgrpo.rewards.networks.vlm.answers import NoScore, Scale, request
from fastgrpo.rewards.networks.vlm.options import PROMPT, JudgeOptions, filled, open_endpoints

FRAMES = "middle"
"""One picture, since some servers take only one per request unless they are told otherwise."""
KEPT = 4096  # answers, so that clips that are scored again after an outage ask only what is missing


@dataclass(frozen=True)
class Question:
    """What is asked about every clip, and which answers count."""

    name: str
    text: str  # {prompt} stands for the clip's prompt
    scale: Scale


class Asking(Reward):
    """A reward of one or several questions; a subclass says what it makes of their answers."""

    names: tuple[str, ...] = ()  # set by a subclass

    def __init__(
        self,
        spec: RewardSpec,
        chosen: JudgeOptions,
        questions: Sequence[Question],
        settings: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """Nothing is sent to the endpoints yet.

        settings: what else changes scores, for the fingerprint
        """
        self.questions = tuple(questions)
        self.rule = frames.rule_of(spec, FRAMES)
        self.endpoints = open_endpoints(chosen)
        self.model = chosen.model
        self.floor = chosen.floor
        self.at_once = chosen.at_once
        thinking = {"enable_thinking": chosen.thinking}
        self.extra = {} if chosen.thinking is None else {"chat_template_kwargs": thinking}
        self.reads_prompts = any(PROMPT in question.text for question in questions)
        self.fingerprint = weight_files.fingerprint(
            [],
            {
                "model": chosen.model,
                "questions": [[one.name, one.text, dict(one.scale.values)] for one in questions],
                "floor": chosen.floor,
                "thinking": chosen.thinking,
                "frames": self.rule,
                **settings,
            },
        )
        self._log = logging.getLogger(type(self).__module__)
        self._answers: OrderedDict[bytes, float | str] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def combine(self, answers: Tensor) -> Tensor:
        """The scores that the answers make.

        answers: float64 [questions, B], each in [0, 1], NaN where there is none
        returns [parts, B] by `names`, NaN where there is none
        """

    def __call__(self, pixels: Tensor, prompts: Sequence[str], fps: float) -> Scores:
        """Scores of B clips, float32 [B] for each part; a clip without an answer is invalid.

        pixels: uint8 [B, F, H, W, 3];  prompts: B texts;  fps: frames per second, not read
        Raises Unavailable while no endpoint answers, UserError where they refuse what the options
        say, and ValueError for pixels of another form.
        """
        clips.check(pixels, prompts)
        before = self.endpoints.answered
        self.endpoints.begin()
        with ThreadPoolExecutor(self.at_once, thread_name_prefix="asking") as threads:
            # of one clip after the other: the pictures of few are in memory at a time
            answers = [
                [
                    threads.submit(self._answer, question, clip, prompt)
                    for question in self.questions
                ]
                for clip, prompt in zip(map(Pictures, self._chosen(pixels)), prompts, strict=True)
            ]
            try:
                table = [[one.result() for one in of_clip] for of_clip in answers]
            except Unavailable as trouble:
                raise Unavailable(str(trouble), self.endpoints.answered > before) from None
            finally:
                threads.shutdown(cancel_futures=True)
        scores = self.combine(torch.tensor(table, dtype=torch.float64).T)
        valid = torch.isfinite(scores).all(0)
        values = scores.masked_fill(~valid, math.nan).float()
        return Scores({part: values[n].clone() for n, part in enumerate(self.names)}, valid)

    def frames_used(self, frames_there: int, fps: float) -> list[int]:
        """Indices of the frames that the model sees."""
        return frames.choose(self.rule, frames_there)

    def _chosen(self, pixels: Tensor) -> Tensor:
        """The frames that the model sees.  pixels: uint8 [B, F, H, W, 3];  returns [B, n, H, W, 3]"""
        return pixels[:, frames.choose(self.rule, pixels.shape[1])].cpu()

    def _answer(self, question: Question, clip: "Pictures", prompt: str) -> float:
        """The answer's value in [0, 1]; NaN, and a line in the log, where there is none."""
        text = filled(question.text, prompt)
        key = hashlib.sha256(clip.digest + question.name.encode() + b"\0" + text.encode()).digest()
        with self._lock:
            found = self._answers.get(key)
        if found is None:
            try:
                words = self.endpoints.ask(request(self.model, clip.urls, text, self.extra))
            except NoScore as reason:  # not kept: the next time it may be answered
                return self._no_score(question, str(reason))
            try:
                found = question.scale.score(words, self.floor)
            except NoScore as reason:
                found = str(reason)
            self._keep(key, found)
        return self._no_score(question, found) if isinstance(found, str) else found

    def _no_score(self, question: Question, reason: str) -> float:
        """NaN, and a line in the log."""
        self._log.warning("%s: %s; a clip has no score", question.name, reason)
        return math.nan

    def _keep(self, key: bytes, found: float | str) -> None:
        with self._lock:
            self._answers[key] = found
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)


class Pictures:
    """A clip's frames as PNG in data URLs, made when first asked for.

    PNG keeps every bit, and the sides' ratio is the clip's own.
    """

    def __init__(self, clip: Tensor) -> None:
        """clip: uint8 [n, H, W, 3]"""
        self._clip = clip.contiguous()
        self.digest = hashlib.sha256(
            repr(tuple(clip.shape)).encode() + self._clip.numpy().tobytes()
        ).digest()
        self._urls: list[str] = []
        self._lock = threading.Lock()

    @property
    def urls(self) -> list[str]:
        """A data URL for each frame."""
        with self._lock:
            if not self._urls:
                self._urls = [data_url(frame) for frame in self._clip]
            return self._urls


def data_url(frame: Tensor) -> str:
    """A picture, uint8 [H, W, 3], as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
