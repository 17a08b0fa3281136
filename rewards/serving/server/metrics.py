"""What a reward server counts, for Prometheus. No prompt, token or address is ever a label."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from fastgrpo.core.reward import Scores

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Meters:
    """The counters of one server."""

    def __init__(
        self, bytes_in_flight: Callable[[], float], clips_waiting: Callable[[], float]
    ) -> None:
        """Make the counters.

        bytes_in_flight, clips_waiting: asked each time that someone reads the metrics
        """
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "reward_requests", "Requests to score, by status", ["status"], registry=registry
        )
        self.request_seconds = Histogram(
            "reward_request_seconds",
            "From a request's headers to its scores",
            buckets=SECONDS,
            registry=registry,
        )
        self.clips = Counter("reward_clips", "Clips scored", ["reward"], registry=registry)
        self.invalid = Counter(
            "reward_invalid_clips", "Clips without any score", ["reward"], registry=registry
        )
        self.missing = Counter(
            "reward_missing_scores",
            "Scores that clips with others lack",
            ["reward", "part"],
            registry=registry,
        )
        self.expired = Counter(
            "reward_expired_clips", "Clips whose sender had given up", ["reward"], registry=registry
        )
        self.batch_clips = Histogram(
            "reward_batch_clips", "Clips of a batch", ["reward"], buckets=SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "reward_batch_seconds",
            "Scoring a batch",
            ["reward"],
            buckets=SECONDS,
            registry=registry,
        )
        self.score = Summary("reward_score", "Valid scores", ["reward", "part"], registry=registry)
        Gauge("reward_bytes_in_flight", "Bytes read or waiting", registry=registry).set_function(
            bytes_in_flight
        )
        Gauge(
            "reward_clips_waiting", "Clips that wait to be scored", registry=registry
        ).set_function(clips_waiting)

    def request(self, status: int, seconds: float) -> None:
        self.requests.labels(str(status)).inc()
        if status == 200:
            self.request_seconds.observe(seconds)

    def batch(self, reward: str, scores: Scores, seconds: float) -> None:
        """Count a batch that was scored."""
        count = len(scores.valid)
        self.clips.labels(reward).inc(count)
        self.invalid.labels(reward).inc(count - int(scores.valid.sum()))
        self.batch_clips.labels(reward).observe(count)
        self.batch_seconds.labels(reward).observe(seconds)
        for part, values in scores.values.items():
            summary, own = self.score.labels(reward, part), values[scores.valid]
            self.missing.labels(reward, part).inc(int(own.isnan().sum()))
            for value in own[~own.isnan()].tolist():
                summary.observe(value)

    def text(self) -> bytes:
        """All counters in Prometheus' text format."""
        return generate_latest(self.registry)
