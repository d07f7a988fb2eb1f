"""What Prometheus reads at /metrics. Names are vLLM's after the colon, so that dashboards need another prefix only."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rdlm.serve.worker import End, Item, Token

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
_TOKENS = tuple(2**i for i in range(16))


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
      gauges: name and meaning of each number that is read when Prometheus asks, and how to read it.
      lanes: read then, too.
    """

    def __init__(self, gauges: dict[tuple[str, str], Callable[[], float]], lanes: Collector):
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rdlm:{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"rdlm:{name}", text, labels, buckets=buckets, registry=self._registry)

        for (name, text), read in gauges.items():
            Gauge(f"rdlm:{name}", text, registry=self._registry).set_function(read)
        self._registry.register(lanes)
        self.http = counter("http_requests", "Requests by path and status; 499: the client left", "path", "status")
        self.ended = counter("request_success", "Answers that are complete", "finished_reason")
        self.failed = counter("request_failure", "Requests that began and failed", "code")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.looked_up = counter("prefix_cache_queries", "Tokens of all prompts, once for each answer")
        self.cached = counter("prefix_cache_hits", "Those that the prompt cache held, of answers that are complete")
        self.new_tokens = counter("generation_tokens", "New tokens")
        self.steps = histogram("recurrences_per_token", "Recurrences of new tokens", _DEPTHS, "exit")
        self.first = histogram("time_to_first_token_seconds", "From the request to its first token", _SECONDS)
        self.between = histogram("inter_token_latency_seconds", "From one token of an answer to the next", _FAST)
        self.whole = histogram("e2e_request_latency_seconds", "From the request to its last token", _SECONDS)
        self.prompt_sizes = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.new_sizes = histogram("request_generation_tokens", "New tokens of an answer", _TOKENS)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class LaneGauges(Collector):
    """The lanes of each engine, those that are busy by depth, and how often one was taken from a request.

    An engine is named by its kind of exit rule.

    Args:
      lanes: of each engine.
      max_steps: most recurrences of a token.
      read: by engine, the recurrences of each busy lane's latest token; 0: it has none yet.
      preempted: how often a request gave its lane to another.
    """

    def __init__(
        self,
        lanes: int,
        max_steps: int,
        read: Callable[[], Mapping[str, Sequence[int]]],
        preempted: Callable[[], int],
    ):
        self._lanes, self._read, self._preempted = lanes, read, preempted
        self._labels = [_bucket(0), *(_bucket(1 << i) for i in range((max_steps - 1).bit_length() + 1))]

    def collect(self) -> Iterator[Metric]:
        """All engines as they are at one moment, also where nothing is busy."""
        lanes = GaugeMetricFamily("rdlm:lanes", "Lanes", labels=["engine"])
        text = "Lanes with a request, by the recurrences of its latest token; prompt: it has no token yet"
        busy = GaugeMetricFamily("rdlm:lanes_busy", text, labels=["engine", "recurrences"])
        for engine, steps in self._read().items():
            lanes.add_metric([engine], self._lanes)
            counts = collections.Counter(map(_bucket, steps))
            for label in self._labels:
                busy.add_metric([engine, label], counts[label])
        yield lanes
        yield busy
        text = "How often a request gave its lane and its pages to others, to go on later"
        yield CounterMetricFamily("rdlm:num_preemptions", text, self._preempted())


def _bucket(steps: int) -> str:
    """Recurrences between powers of two: 5, 6, 7 and 8 are "5-8"."""
    if steps == 0:
        return "prompt"
    last = 1 << (steps - 1).bit_length()
    return str(last) if last <= 2 else f"{last // 2 + 1}-{last}"


class AnswerClock:
    """Measures one answer, from when it is asked for.

    Args:
      metrics: where it is counted.
      exit: name of its exit rule.
    """

    def __init__(self, metrics: Metrics, exit: str):
        self._metrics, self._steps = metrics, metrics.steps.labels(exit)
        self._began = self._last = time.perf_counter()
        self._count = 0

    def count(self, items: Sequence[Item]) -> None:
        """Items that have just come; those that come together share the time since the last ones."""
        metrics, now = self._metrics, time.perf_counter()
        tokens = [item for item in items if isinstance(item, Token)]
        for token in tokens:
            self._steps.observe(token.steps)
            if self._count == 0:
                metrics.first.observe(now - self._began)
            else:
                metrics.between.observe((now - self._last) / len(tokens))
            self._count += 1
        if tokens:
            self._last = now
            metrics.new_tokens.inc(len(tokens))
        for item in items:
            if isinstance(item, End):
                metrics.whole.observe(now - self._began)
                metrics.new_sizes.observe(self._count)
                metrics.cached.inc(item.cached)
                if item.reason is not None:
                    metrics.ended.labels(item.reason).inc()
