"""A served vision-language model as judge, by the question that the recipe asks. Part judge.

The score is the expected answer by the probabilities of the first token: P(yes) / (P(yes) + P(no)),
or the mean of the digits of a scale, put into [0, 1]. Where the answers of the scale have too little
of the probability together, a clip has no score. The model runs behind any server with OpenAI's chat
completions that gives log-probabilities, such as vLLM; see docs/guides/rewards/vlm_judge.md.
"""

from torch import Tensor

from fastgrpo.core.config import RewardSpec
from fastgrpo.core.errors import UserError
from fastgrpo.rewards.common import options
from fastgrpo.rewards.networks.vlm.answers import scale_of
from fastgrpo.rewards.networks.vlm.asking import Asking, Question
from fastgrpo.rewards.networks.vlm.options import FREE, JudgeOptions, read_text, refuse_weights

PARTS = ("judge",)
FREE_OPTIONS = FREE


class Options(JudgeOptions):
    """`rewards.options` of vlm_judge."""

    question: str = ""
    """What is asked about every clip; {prompt} stands for its prompt."""
    question_file: str | None = None
    """File with the question, in place of `question`."""
    answer: str = "yes/no"
    """The answers that count: yes/no, or digits from the lowest to the highest, such as 1-5."""


class VlmJudge(Asking):
    """A judge of one question."""

    names: tuple[str, ...] = PARTS

    def combine(self, answers: Tensor) -> Tensor:
        """The answers themselves.  answers: float64 [1, B]"""
        return answers


def check_spec(spec: RewardSpec) -> None:
    """Raise UserError for settings and files with which `load` would fail; nothing is asked."""
    load(spec)


def load(spec: RewardSpec) -> VlmJudge:
    """The reward of the file's name; nothing is sent to the endpoints yet."""
    refuse_weights(spec)
    chosen = options.parse(spec, Options)
    question = Question(
        PARTS[0], _question(chosen), scale_of(chosen.answer, "rewards.options.answer")
    )
    return VlmJudge(spec, chosen, [question])


def _question(chosen: Options) -> str:
    """The question's text. Raises UserError where there is none, or two."""
    if chosen.question_file is None:
        if chosen.question.strip():
            return chosen.question
        raise UserError(
            "rewards.options.question: missing; write what the judge is asked, with {prompt} for the "
            "clip's prompt, or name a file by question_file."
        )
    if chosen.question:
        raise UserError(
            "rewards.options.question: there is a question_file, too; leave one of them out."
        )
    return read_text(chosen.question_file, "rewards.options.question_file")
