"""What a chat completion says with its first token: probabilities, and the score that they make."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastgrpo.core.errors import UserError
from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.persist import Bad

MARKS = str.maketrans("Ġ▁Ċ", "   ")
"""How tokenizers write a space or a new line before a word."""
ROUNDING = 1e-2  # by which probabilities of the servers' bfloat16 may add up to more than 1


class NoScore(Exception):
    """A question that a clip gets no score by; its text is the reason."""


@dataclass(frozen=True)
class Scale:
    """The answers that count, each with its value in [0, 1]."""

    values: Mapping[str, float]  # answer, in lower case -> value

    def score(self, first: Mapping[str, float], floor: float) -> float:
        """Expected value of the answer: sum of value x p over the sum of p.

        first: probability of each first word
        Raises NoScore where the answers have less than `floor` of the probability together.
        """
        total = sum(first.get(answer, 0.0) for answer in self.values)
        if total < floor or total == 0.0:
            likeliest = max(first, key=lambda word: first[word])
            raise NoScore(
                f"{' and '.join(self.values)} have {total:.2g} of the probability of the first "
                f"token, below floor={floor:g}; the likeliest is {likeliest[:20]!r}"
            )
        return sum(value * first.get(answer, 0.0) for answer, value in self.values.items()) / total


def scale_of(answer: str, where: str) -> Scale:
    """The scale that an option names: "yes/no", or digits such as "1-5", of which the lowest is 0
    and the highest 1.

    Raises UserError, which names `where`, for another text.
    """
    if answer == "yes/no":
        return Scale({"yes": 1.0, "no": 0.0})
    digits = re.fullmatch(r"(\d)-(\d)", answer, re.ASCII)
    if digits is None or digits[1] >= digits[2]:
        raise UserError(
            f"{where}={answer}: no scale; use yes/no, or the lowest and the highest digit, such as "
            "1-5."
        )
    low, high = int(digits[1]), int(digits[2])
    return Scale({str(k): (k - low) / (high - low) for k in range(low, high + 1)})


def first_words(body: bytes) -> dict[str, float]:
    """Probability of each word that may come first, among the tokens that the answer lists.

    Tokens that differ by spaces or capitals alone are the same word, and their probabilities add up.
    Raises Bad for anything but a well-formed answer.
    """
    try:
        answer = wire.read_json("answer", body)
    except wire.WireError as error:
        raise Bad(str(error)) from None
    words: dict[str, float] = {}
    for token, logprob in _listed(answer):
        word = token.translate(MARKS).strip().lower()
        words[word] = words.get(word, 0.0) + math.exp(logprob)
    if (total := sum(words.values())) > 1.0 + ROUNDING:
        raise Bad(f"the answer's probabilities add up to {total:.3g}")
    return words


def _listed(answer: Mapping[str, object]) -> list[tuple[str, float]]:
    """(token, log-probability) of the likeliest first tokens."""
    node: object = answer
    for step in ("choices", 0, "logprobs", "content", 0, "top_logprobs"):
        if isinstance(step, int):
            node = node[step] if isinstance(node, list) and len(node) > step else None
        else:
            node = wire.entry(node, step)
    if not isinstance(node, list) or not node:
        raise Bad("the answer has no top_logprobs, as of a server that gives no log-probabilities")
    pairs = [(wire.entry(one, "token"), wire.entry(one, "logprob")) for one in node]
    found: list[tuple[str, float]] = []
    for token, logprob in pairs:
        if not isinstance(token, str) or not wire.number(logprob):
            raise Bad("the answer's top_logprobs have a token without a finite log-probability")
        number = float(str(logprob))
        if number > ROUNDING:
            raise Bad(f"the answer has a log-probability of {number:.3g}, above 0")
        found.append((token, number))
    return found


def request(model: str, images: list[str], question: str, extra: Mapping[str, object]) -> bytes:
    """The body of a chat completion of one token.

    images: data URLs, before the question;  extra: further keys
    """
    content: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in images
    ]
    content.append({"type": "text", "text": question})
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,  # said, since some servers take a default from the model's folder
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,  # the most that the API allows
        "seed": 0,
    }
    return json.dumps({**body, **extra}).encode()
