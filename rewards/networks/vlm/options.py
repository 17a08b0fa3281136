"""`rewards.options` that every reward with a vision-language model behind an endpoint takes."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fastgrpo.core.config import RewardSpec, Section
from fastgrpo.core.errors import UserError
from fastgrpo.rewards.networks.vlm import endpoints

Positive = Annotated[float, Field(gt=0, le=1000)]

FREE = (
    "endpoints",
    "key_file",
    "timeout_s",
    "patience_s",
    "at_once",
    "question_file",
    "questions",
    "question_weights",
)
"""Options with which a run may go on otherwise: the fingerprint has what they decide of scores."""

PROMPT = "{prompt}"
"""What stands in a question for the clip's prompt."""


class JudgeOptions(Section):
    """The endpoint, its model, and how an answer is had of it."""

    endpoints: str = ""
    """Addresses of servers with OpenAI's API and the same model, such as http://host:8000/v1, with
    spaces between them. Without a path /v1 is meant."""
    model: str = ""
    """The model's name, as the server calls it."""
    key_file: str | None = None
    """File with the key for the endpoints. None: FASTGRPO_JUDGE_KEY has it, or they want none."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Probability that the answers of the scale must have together; below it there is no score."""
    thinking: bool | None = None
    """false: ask the chat template for no thoughts (enable_thinking). None: nothing is asked, as
    OpenAI's own API wants it."""
    timeout_s: Positive = 30.0
    """Seconds for one request."""
    patience_s: Positive = 10.0
    """Seconds for which a failing request is sent again before the clips wait for the judge."""
    at_once: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests under way at a time, of this process."""


def open_endpoints(chosen: JudgeOptions) -> endpoints.Endpoints:
    """The endpoints that the options name; nothing is sent to them yet.

    Raises UserError for a missing model, an address that is none, and a file without a key.
    """
    if not chosen.model.strip():
        raise UserError("rewards.options.model: missing; give the name that the endpoint serves.")
    return endpoints.Endpoints(
        endpoints.urls_of(chosen.endpoints),
        endpoints.key_of(chosen.key_file),
        chosen.timeout_s,
        chosen.patience_s,
    )


def refuse_weights(spec: RewardSpec) -> None:
    """Raise UserError for keys of the spec about weights: these are the endpoint's."""
    if spec.path is not None:
        raise UserError(
            f"rewards.path={spec.path}: {spec.name} has no weights here; leave it out, and name the "
            "judge by rewards.options.endpoints and rewards.options.model."
        )


def read_text(file: str, where: str) -> str:
    """A text file's content. Raises UserError, which names the option `where`."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where}={file}: cannot be read ({error}); name a text file in UTF-8."
        ) from None
    if not text:
        raise UserError(f"{where}={file}: empty; write the question into it.")
    return text


def filled(question: str, prompt: str) -> str:
    """A question with a clip's prompt in its place.

    Control characters and what a chat template may take for its own tokens (<|im_end|>) are left out
    of the prompt.
    """
    clean = re.sub(r"<[^<>\s]{0,40}>", " ", prompt.encode("utf-8", "replace").decode())
    clean = "".join(letter if letter.isprintable() else " " for letter in clean)
    return question.replace(PROMPT, " ".join(clean.split()))
