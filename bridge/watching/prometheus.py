"""METRICS in Prometheus' text format: names of our own, and those that people's dashboards have already.

``llamacpp:`` are llama-server's (tools/server/server-task.cpp), ``vllm:`` those of vLLM (vllm/v1/metrics/loggers.py):
the same names for the same things, with a label for the model. The times are under vLLM's names alone.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/. Imports prometheus_client, which takes time
and 3 MB: so this module is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from bridge.watching.measured import Distribution, Measured, MeasuredModel

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_Value = Callable[[MeasuredModel], float]

# Of a model: name, label, what it is, value. A counter's name gets _total behind it.
_COUNTERS: list[tuple[str, str, str, _Value]] = [
    ("llama_bridge_prompt_tokens", "model", "Tokens of prompts that were computed", lambda one: one.prompt_tokens),
    ("llama_bridge_completion_tokens", "model", "Tokens of answers", lambda one: one.tokens),
    ("llama_bridge_cache_queries", "model", "Tokens of prompts looked for in the cache", lambda one: one.cache_queries),
    ("llama_bridge_cache_hits", "model", "Tokens of prompts found in the cache", lambda one: one.cache_hits),
    ("llama_bridge_decodes", "model", "Batches computed", lambda one: one.decodes),
    ("llama_bridge_busy_slots", "model", "Slots that ran, summed over the batches", lambda one: one.busy_slots),
    ("llama_bridge_loads", "model", "Times that the model was loaded", lambda one: one.loads),
    ("llama_bridge_load_failures", "model", "Times that it could not be loaded", lambda one: one.load_failures),
    ("llama_bridge_restarts", "model", "Times that it was started anew after a crash", lambda one: one.restarts),
    ("llama_bridge_evictions", "model", "Times that it made room for another", lambda one: one.evictions),
    ("llama_bridge_expiries", "model", "Times that it left because nobody used it", lambda one: one.expiries),
    ("llamacpp:prompt_tokens", "model", "Prompt tokens processed, without cached ones", lambda one: one.prompt_tokens),
    ("llamacpp:prompt_tokens_cached", "model", "Prompt tokens taken from the cache", lambda one: one.cache_hits),
    ("llamacpp:prompt_seconds", "model", "Time spent on prompts", lambda one: one.prompt_seconds),
    ("llamacpp:tokens_predicted", "model", "Tokens generated", lambda one: one.tokens),
    ("llamacpp:tokens_predicted_seconds", "model", "Time spent generating", lambda one: one.token_seconds),
    ("llamacpp:n_decode", "model", "Calls of llama_decode", lambda one: one.decodes),
    ("vllm:prefix_cache_queries", "model_name", "Prefix cache queries, in tokens", lambda one: one.cache_queries),
    ("vllm:prefix_cache_hits", "model_name", "Prefix cache hits, in tokens", lambda one: one.cache_hits),
]
_GAUGES: list[tuple[str, str, str, _Value]] = [
    ("llama_bridge_running", "model", "Requests that are computed", lambda one: one.running),
    ("llama_bridge_queued", "model", "Requests that wait for a slot", lambda one: one.queued),
    ("llama_bridge_slots", "model", "Requests that can be computed at once", lambda one: one.slots),
    ("llama_bridge_loaded", "model", "1 if the model is loaded", lambda one: one.loaded),
    ("llama_bridge_waiting_for_load", "model", "Requests that wait for the model", lambda one: one.waiting),
    ("llama_bridge_kv_cells", "model", "Cells of the KV cache", lambda one: one.cells),
    ("llama_bridge_kv_cells_running", "model", "Those of requests that run", lambda one: one.cells_running),
    ("llama_bridge_kv_cells_kept", "model", "Those kept for others to start from", lambda one: one.cells_kept),
    ("llama_bridge_model_memory_bytes", "model", "Memory of its process", lambda one: one.memory),
    ("llama_bridge_model_planned_memory_bytes", "model", "Memory set aside for it", lambda one: one.planned_memory),
    ("llama_bridge_model_planned_gpu_bytes", "model", "The same of GPUs", lambda one: one.planned_gpu_memory),
    ("llamacpp:requests_processing", "model", "Requests processing", lambda one: one.running),
    ("llamacpp:requests_deferred", "model", "Requests deferred", lambda one: one.queued),
    ("llamacpp:n_tokens_max", "model", "Longest sequence seen, prompt and answer", lambda one: one.longest),
    ("llamacpp:n_busy_slots_per_decode", "model", "Per batch", lambda one: _ratio(one.busy_slots, one.decodes)),
    ("vllm:num_requests_running", "model_name", "Requests in execution batches", lambda one: one.running),
    ("vllm:num_requests_waiting", "model_name", "Requests waiting to be processed", lambda one: one.queued),
    ("vllm:kv_cache_usage_perc", "model_name", "1 is all", lambda one: _ratio(one.cells_running, one.cells)),
]
_TIMES: list[tuple[str, str, Callable[[MeasuredModel], Distribution]]] = [
    ("vllm:time_to_first_token_seconds", "Time to first token", lambda one: one.first_token),
    ("vllm:inter_token_latency_seconds", "Time from token to token", lambda one: one.between_tokens),
    ("vllm:e2e_request_latency_seconds", "Time of whole requests", lambda one: one.end_to_end),
]


def exposition(measured: Measured) -> str:
    """Takes milliseconds where models are many, so it is called in a thread."""
    registry = CollectorRegistry()
    registry.register(_Families(measured))
    ProcessCollector(registry=registry)
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    def collect(self) -> Iterator[Metric]:
        yield from _of_daemon(self._measured)
        yield from _of_models(self._measured.models)


def _of_daemon(measured: Measured) -> Iterator[Metric]:
    yield InfoMetricFamily("llama_bridge_build", "Its version", {"version": measured.version})
    yield GaugeMetricFamily("llama_bridge_uptime_seconds", "Time since its start", measured.uptime_s)
    yield GaugeMetricFamily("llama_bridge_clients", "Connected clients", measured.clients)
    yield CounterMetricFamily("llama_bridge_connections", "Clients that were let in", measured.connections)
    yield CounterMetricFamily("llama_bridge_received_bytes", "Bytes from clients", measured.bytes_received)
    yield CounterMetricFamily("llama_bridge_sent_bytes", "Bytes to clients", measured.bytes_sent)
    jobs = GaugeMetricFamily("llama_bridge_jobs", "Jobs there are", labels=("state",))
    for state, count in measured.jobs.items():
        jobs.add_metric((state,), count)
    yield jobs
    refused = CounterMetricFamily("llama_bridge_refused", "Clients that were turned away", labels=("code",))
    for code, count in measured.refused.items():
        refused.add_metric((code,), count)
    yield refused
    requests = CounterMetricFamily(
        "llama_bridge_requests", "Requests, by how they ended", labels=("verb", "model", "outcome")
    )
    for one in measured.requests:
        requests.add_metric((one.verb, one.model or "", one.outcome), one.count)
    yield requests
    times = HistogramMetricFamily("llama_bridge_request_seconds", "From line to last reply", labels=("verb",))
    for verb, distribution in measured.request_seconds.items():
        times.add_metric((verb,), _cumulative(distribution), distribution.sum)
    yield times


def _of_models(models: list[MeasuredModel]) -> Iterator[Metric]:
    for kind, rows in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
        for name, label, about, value in rows:
            family = kind(name, about, labels=(label,))
            for model in models:
                family.add_metric((model.name,), value(model))
            yield family
    for name, about, distribution_of in _TIMES:
        times = HistogramMetricFamily(name, about, labels=("model_name",))
        for model in models:
            distribution = distribution_of(model)
            times.add_metric((model.name,), _cumulative(distribution), distribution.sum)
        yield times


def _ratio(part: int, whole: int) -> float:
    return part / max(whole, 1)


def _cumulative(distribution: Distribution) -> list[tuple[str, float]]:
    """Upper bounds and how many values are not above them."""
    bounds = [*map(repr, distribution.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(distribution.counts)), strict=True))
