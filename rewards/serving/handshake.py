"""What a server's /v1/spec says of its rewards, and whether two servers hold the same ones."""

from collections.abc import Mapping
from typing import Any

from fastgrpo.rewards.serving import wire
from fastgrpo.rewards.serving.client.persist import ReplicaMismatch

Spec = dict[str, dict[str, Any]]  # reward -> what /v1/spec says of it
GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Tolerance of the golden clip's scores, by dtype: another GPU rounds otherwise."""


def read_spec(body: bytes) -> Spec:
    """The rewards of a /v1/spec answer. Raises WireError for any other bytes."""
    rewards = wire.read_json("spec", body).get("rewards")
    if not isinstance(rewards, dict) or not all(isinstance(one, dict) for one in rewards.values()):
        wire.refuse("spec", "no rewards")
    for name, one in rewards.items():
        parts, golden = one.get("parts"), one.get("golden")
        if (
            not isinstance(parts, list)
            or not parts
            or not all(isinstance(part, str) for part in parts)
        ):
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


def compare(name: str, expected: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ReplicaMismatch where two replicas' rewards differ in identity or golden scores.

    expected, other: what /v1/spec says of the reward `name`
    """
    if other["parts"] != expected["parts"] or other["identity"] != expected["identity"]:
        raise ReplicaMismatch(differs(name))
    tolerance = GOLDEN_TOLERANCE.get(str(expected.get("dtype")), 0.0)
    for part, score in expected["golden"].items():
        other_score = other["golden"].get(part)
        if (score is None) != (other_score is None):
            raise ReplicaMismatch(f"its '{name}' scores the golden clip where another does not")
        if score is not None and abs(score - other_score) > tolerance * max(1.0, abs(score)):
            raise ReplicaMismatch(
                f"its '{name}' gives the golden clip {part}={other_score:.6g} where another gives "
                f"{score:.6g}"
            )


def differs(name: str) -> str:
    """Message for a reward whose identity is not the others'."""
    return f"its '{name}' differs from that of the other servers, in version, weights or settings"
