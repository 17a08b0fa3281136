"""A checklist of yes-or-no questions to a served vision-language model, with a weight for each.

Part checklist: mean of w (2 p - 1), p = P(yes) / (P(yes) + P(no)) at the first token, as vlm_judge
has it; parts q1, q2, ...: the p of each question. With VisionReward's questions and weights it is
still another model's opinion: VisionReward's own is `vision_reward`.
"""

import torch
from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.rewards.common import checklist, options
from fastgrpo.rewards.networks.vlm.answers import scale_of
from fastgrpo.rewards.networks.vlm.asking import Asking, Question
from fastgrpo.rewards.networks.vlm.options import FREE, JudgeOptions, refuse_weights

FREE_OPTIONS = FREE


class Options(JudgeOptions):
    """`rewards.options` of checklist."""

    questions: str = ""
    """Text file with one question a line; {prompt} or [[prompt]] stands for the clip's prompt."""
    question_weights: str = ""
    """JSON file with a list of one weight for each question."""


class Checklist(Asking):
    """A judge of several questions."""

    def __init__(
        self, spec: RewardSpec, chosen: Options, questions: list[Question], weights: Tensor
    ) -> None:
        """weights: float64 [questions]"""
        super().__init__(spec, chosen, questions, {"weights": weights.tolist()})
        self.weights = weights
        self.names = ("checklist", *(question.name for question in questions))

    def combine(self, answers: Tensor) -> Tensor:
        """The weighted mean, NaN where an answer is missing, and the answers.

        answers: float64 [questions, B];  returns float64 [1 + questions, B]
        """
        return torch.cat([checklist.signed_mean(answers, self.weights)[None], answers])


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings and files with which `load` would fail; nothing is asked."""
    names = load(spec).names
    known = (*names, *(f"{part}_above" for part in spec.threshold))
    unknown = [part for part in (*spec.weights, *spec.threshold) if part not in known]
    if unknown:
        raise UserError(
            f"rewards.weights: checklist has no part '{unknown[0]}'; its parts are checklist and "
            f"q1 to {names[-1]}."
        )


def load(spec: RewardSpec) -> Checklist:
    """The reward of the file's name; nothing is sent to the endpoints yet."""
    refuse_weights(spec)
    chosen = options.parse(spec, Options)
    for name in ("questions", "question_weights"):
        if not getattr(chosen, name):
            raise UserError(
                f"rewards.options.{name}: missing; name the file, in VisionReward's form: one "
                "question a line, and a JSON list of their weights."
            )
    texts = checklist.read_questions(chosen.questions, "rewards.options.questions")
    where = "rewards.options.question_weights"
    weights = checklist.read_weights(chosen.question_weights, where, len(texts))
    scale = scale_of("yes/no", "")
    asked = [Question(f"q{n}", text, scale) for n, text in enumerate(texts, 1)]
    return Checklist(spec, chosen, asked, weights)
