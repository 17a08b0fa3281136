"""Which model made which clip: known to the key alone, and drawn from its secret.

The clips of a pair get names by HMAC-SHA256 of the key's secret, and all that raters see is sorted
by these names: neither the page nor the names, dates and order of its files tell the models apart.
The study's id is the SHA-256 of the key's file. The page and every vote carry it, so that the key
cannot be changed once votes are in.

For each rater the page draws the order of the pairs, and the side of a pair's first name, from a
public hash of the study, the rater and the pair: every rater sees sides of their own, and whoever
holds the votes can draw them again.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.core.errors import UserError
from fastgrpo.core.files import load_json

KEY = "key.json"
RUN, AGAINST = "run", "against"
"""The two models of a pair: the one that the command names, and the one it is compared with."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two clips of one prompt and noise."""

    pair: str  # its name
    prompt: str
    seed: int
    run: str  # the name of this model's clip
    against: str
    image: str | None = None  # the name of the prompt's reference image

    @property
    def names(self) -> tuple[str, str]:
        """The names of both clips, in an order that says nothing."""
        first, second = sorted((self.run, self.against))
        return first, second

    def model(self, name: str) -> str:
        """The model of a clip by its name: RUN or AGAINST."""
        return RUN if name == self.run else AGAINST

    @staticmethod
    def other(model: str) -> str:
        """The other model of the two."""
        return AGAINST if model == RUN else RUN


@dataclass(frozen=True, kw_only=True)
class Key:
    """All that must stay unknown to raters until their votes are in."""

    secret: str  # hexadecimal
    labels: dict[str, str]  # of RUN and AGAINST
    question: str
    settings: dict[str, Any]  # of the model and the sampler
    pairs: list[Pair]
    not_finite: list[str] = field(default_factory=list)  # captions of pairs that were left out

    def to_json(self) -> str:
        """The content of the key's file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def opaque(secret: str, *parts: object) -> str:
    """A name that tells nothing of `parts` to whoever does not have the secret."""
    text = json.dumps(parts).encode()
    return hmac.new(bytes.fromhex(secret), text, hashlib.sha256).hexdigest()[:16]


def study_id(content: str) -> str:
    """The id of the study with this content of its key's file."""
    return hashlib.sha256(content.encode()).hexdigest()


def read_key(folder: Path) -> tuple[Key, str]:
    """The key of a study's folder, and the study's id. Raises UserError where there is none."""
    file = folder / KEY
    try:
        content = load_json(file)
        pairs = [Pair(**pair) for pair in content.pop("pairs")]
        key = Key(**content, pairs=pairs)
        assert key.labels.keys() == {RUN, AGAINST} and pairs
        return key, study_id(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--read={folder}: {KEY} cannot be read ({error.strerror}); give a folder that "
            "`fastgrpo study` wrote."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        raise UserError(f"{file}: not the key of a study; restore the file as written.") from None


def public_hash(text: str) -> int:
    """FNV-1a over UTF-8 and the finalizer of MurmurHash3, 32 bits, as the page computes it."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    for shift, factor in ((16, 2246822507), (13, 3266489909)):
        value = (value ^ value >> shift) * factor & 0xFFFFFFFF
    return value ^ value >> 16


def shown(study: str, rater: str, pair: Pair) -> tuple[str, str]:
    """The names of the left and the right clip, as the page shows the pair to this rater."""
    first, second = pair.names
    swapped = public_hash(f"{study}/{rater}/side/{pair.pair}") & 1
    return (second, first) if swapped else (first, second)


def order(study: str, rater: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs in the order in which the page shows them to this rater."""
    place: Mapping[str, int] = {
        one.pair: public_hash(f"{study}/{rater}/order/{one.pair}") for one in pairs
    }
    return sorted(pairs, key=lambda one: (place[one.pair], one.pair))
