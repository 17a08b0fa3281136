"""Encoders with several networks: each in a pass of its own, so that one is in memory at a time.

A pass gives some tensors of each prompt's condition; together they are what the network takes. Who
has many prompts sends all of them through one pass before the next, see
`fastgrpo.training.conditions.make`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastgrpo.core.errors import UserError
from fastgrpo.core.policy import Condition, Encoder, Prompt
from fastgrpo.models.placement.text_network import TextNetwork


@dataclass(frozen=True)
class Pass:
    """One network's part of the work."""

    networks: tuple[TextNetwork, ...]  # placed before the pass; at most one here
    run: Callable[[Sequence[Prompt]], list[Condition]]
    free: Callable[[], None]  # gives back what the pass alone needs
    negative: Callable[[str], Condition] | None = None
    """The unconditional branch's part, of its text; None: as of a prompt with that text."""

    def of_negative(self, text: str) -> Condition:
        """The unconditional branch's part of the condition."""
        return self.run([Prompt(text)])[0] if self.negative is None else self.negative(text)


class InPasses(ABC):
    """An `Encoder` of several networks."""

    batch: int  # prompts per forward pass of a network

    @abstractmethod
    def passes(self) -> Sequence[Pass]:
        """The passes in their order: the one with the largest tensors last."""

    @abstractmethod
    def cut(self, text: str) -> dict[str, tuple[int, int]]:
        """The networks that see less than the whole text, see `Encoder`."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a prompt that the networks cannot take."""
        for prompt in prompts:
            if not self.has_tokens(prompt.text):
                raise UserError(
                    f"prompts: '{prompt.text}' has no tokens for the text encoder; leave it out."
                )

    def has_tokens(self, text: str) -> bool:
        """Whether a prompt's text has what the networks need; a family may need nothing of it."""
        return True

    def joined(self, features: Condition) -> Condition:
        """A prompt's condition from what all passes gave for it."""
        return features

    def __call__(self, prompts: Sequence[Prompt]) -> list[Condition]:
        self.check(prompts)
        found: list[Condition] = [{} for _ in prompts]
        for one in self.passes():
            given = one.run(prompts)
            found = [{**before, **now} for before, now in zip(found, given, strict=True)]
        return [self.joined(features) for features in found]

    def negative(self, text: str) -> Condition:
        """The condition of the unconditional branch of classifier-free guidance."""
        features: Condition = {}
        for one in self.passes():
            features = {**features, **one.of_negative(text)}
        return self.joined(features)

    def reading(
        self, network: TextNetwork, features: Callable[[list[str]], list[Condition]]
    ) -> Pass:
        """The pass of a network that reads the prompts' texts, `batch` at a time.

        features: texts -> a part of each one's condition
        """

        def run(prompts: Sequence[Prompt]) -> list[Condition]:
            texts = [prompt.text for prompt in prompts]
            starts = range(0, len(texts), self.batch)
            return [one for s in starts for one in features(texts[s : s + self.batch])]

        return Pass((network,), run, network.free)


def passes_of(encoder: Encoder) -> Sequence[Pass]:
    """An encoder's passes, the first of which checks the prompts, too.

    All is one pass of an encoder that is none of `InPasses`: its networks are placed as they are
    called, and no rank waits for another.
    """
    if not isinstance(encoder, InPasses):
        whole = Pass((), encoder, lambda: None)
        return (replace(whole, negative=encoder.negative),)

    def checked(prompts: Sequence[Prompt]) -> list[Condition]:
        encoder.check(prompts)
        return first.run(prompts)

    first, *rest = encoder.passes()
    return (replace(first, run=checked, negative=first.of_negative), *rest)


def joined(encoder: Encoder, features: Condition) -> Condition:
    """A prompt's condition from what all of an encoder's passes gave for it."""
    return encoder.joined(features) if isinstance(encoder, InPasses) else features
