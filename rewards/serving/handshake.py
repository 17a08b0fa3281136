"""What a server says of its rewards (/v1/spec), and whether two servers hold the same ones."""

from collections.abc import Mapping
from typing import Any

from fastgrpo.rewards.serving import wire

Spec = dict[str, dict[str, Any]]  # reward -> what /v1/spec says of it
GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of the golden clip's scores: another GPU rounds otherwise


class Unlike(Exception):
    """A replica whose scores are not those of the others."""


def read_spec(body: bytes) -> Spec:
    """The rewards of a /v1/spec answer. Raises WireError for what is none."""
    rewards = wire.read_json("spec", body).get("rewards")
    if not isinstance(rewards, dict) or not all(isinstance(one, dict) for one in rewards.values()):
        wire.refuse("spec", "no rewards")
    for name, one in rewards.items():
        parts, golden = one.get("parts"), one.get("golden")
        if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
            wire.refuse("spec", f"no parts of '{name}'")
        if not isinstance(one.get("identity"), str) or not isinstance(golden, dict):
            wire.refuse("spec", f"no identity or golden scores of '{name}'")
        if not all(score is None or wire.number(score) for score in golden.values()):
            wire.refuse("spec", f"golden scores of '{name}' that are no numbers")
        looks_at = one.get("looks_at")
        if looks_at is not None and not (
            isinstance(looks_at, list) and all(type(i) is int and i >= 0 for i in looks_at)
        ):
            wire.refuse("spec", f"frames of '{name}' that are no indices")
    return rewards


def compare(name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise Unlike where two replicas' rewards are not the same, by their identity or by the golden clip."""
    if found["parts"] != expected["parts"] or found["identity"] != expected["identity"]:
        raise Unlike(differs(name))
    tolerance = GOLDEN_TOLERANCE.get(str(expected.get("dtype")), 0.0)
    for part, score in expected["golden"].items():
        other = found["golden"].get(part)
        if (score is None) != (other is None):
            raise Unlike(f"its '{name}' scores the golden clip where another does not")
        if score is not None and abs(score - other) > tolerance * max(1.0, abs(score)):
            raise Unlike(f"its '{name}' gives the golden clip {part}={other:.6g} where another gives {score:.6g}")


def differs(name: str) -> str:
    return f"its '{name}' differs from that of the other servers, in version, weights or settings"
