"""What the reward server tells Prometheus: requests, latencies, queue, batches, tokens, users, engine (S21)."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_server.engine import EngineCounts
from reward_server.serving import Served, Serving
from tagpr.prmu.wire import HEALTH_PATH, METRICS_PATH, SCORE_PATH, SWAP_PATH, VERSION_PATH

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ROUTES = {SCORE_PATH, HEALTH_PATH, VERSION_PATH, METRICS_PATH, SWAP_PATH}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        serving: the checkpoint that is served, now and after an exchange.
        waiting: items of all requests that are being answered.
    """

    def __init__(self, serving: Serving, waiting: Callable[[], int]) -> None:
        serving.current.batcher.observe = self.batch
        self._registry = CollectorRegistry()
        prefix = "tagpr_prmu"
        self.requests = Counter(
            f"{prefix}_requests", "HTTP requests", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            f"{prefix}_request_seconds",
            "Time from a request's first byte to its answer",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.items = Counter(f"{prefix}_items", "Items that were scored", registry=self._registry)
        self.unknown = Counter(
            f"{prefix}_unknown_user_items", "Items of users without a row", registry=self._registry
        )
        self.refused = Counter(
            f"{prefix}_refused", "Requests without scores, by reason", ["code"], registry=self._registry
        )
        self.batches = Histogram(
            f"{prefix}_batch_items",
            "Items that the engine was given at once",
            buckets=ITEMS,
            registry=self._registry,
        )
        self.batch_seconds = Histogram(
            f"{prefix}_batch_seconds",
            "Time of the engine for one batch",
            buckets=SECONDS,
            registry=self._registry,
        )
        queue = Gauge(f"{prefix}_queue_items", "Items that are being answered", registry=self._registry)
        queue.set_function(waiting)
        self._registry.register(_Engine(serving))

    def batch(self, items: int, seconds: float) -> None:
        """Count a batch of the engine; called from its thread."""
        self.batches.observe(items)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """Reads the engine when asked, as it can be another one by then; token counts go on over an exchange."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._seen: Served | None = None
        self._last = self._before = EngineCounts()

    def describe(self) -> list[Metric]:
        """Nothing: without it the registry would collect at registration, before there is an engine."""
        return []

    def collect(self) -> list[Metric]:
        """Counts and state of the engine that serves now."""
        served = self._serving.current
        if self._seen is not served:
            self._before = EngineCounts(
                self._before.tokens + self._last.tokens, self._before.cached_tokens + self._last.cached_tokens
            )
            self._seen = served
        self._last = served.batcher.counts()
        tokens = self._before.tokens + self._last.tokens
        cached = self._before.cached_tokens + self._last.cached_tokens
        share = cached / tokens if tokens else 0.0
        prefix = "tagpr_prmu"
        return [
            CounterMetricFamily(f"{prefix}_tokens", "Tokens of all inputs", value=tokens),
            CounterMetricFamily(f"{prefix}_cached_tokens", "Tokens that a shared prefix saved", value=cached),
            GaugeMetricFamily(f"{prefix}_cached_token_share", "Saved tokens of all tokens", value=share),
            CounterMetricFamily(f"{prefix}_swaps", "Checkpoints exchanged", value=self._serving.swaps),
            GaugeMetricFamily(
                f"{prefix}_engine_up", "Whether the engine runs", value=float(served.batcher.alive)
            ),
            GaugeMetricFamily(
                f"{prefix}_engine_busy_seconds", "Time on the batch in hand", value=served.batcher.busy_s()
            ),
            InfoMetricFamily(
                f"{prefix}_model",
                "What is served",
                value={"version": served.version, "engine": served.engine},
            ),
        ]


class Counting:
    """Counts and times every request, refused ones included; unknown paths share one name."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"
        status = "none"
        began = time.monotonic()

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - began)
