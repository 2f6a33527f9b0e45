"""The text for Prometheus, read back by its own parser: names, types and numbers."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.histogram import FirstToken
from bridge.watching.measured import Distribution, Measured, MeasuredModel, Requests

parser = pytest.importorskip("prometheus_client.parser")
prometheus = pytest.importorskip("bridge.watching.prometheus")

KNOWN = {  # name: type, as the projects have them that people's dashboards are made for
    "llamacpp:prompt_tokens_total": "counter",
    "llamacpp:prompt_tokens_cached_total": "counter",
    "llamacpp:prompt_seconds_total": "counter",
    "llamacpp:tokens_predicted_total": "counter",
    "llamacpp:tokens_predicted_seconds_total": "counter",
    "llamacpp:n_decode_total": "counter",
    "llamacpp:requests_processing": "gauge",
    "llamacpp:requests_deferred": "gauge",
    "llamacpp:n_busy_slots_per_decode": "gauge",
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:time_to_first_token_seconds_bucket": "histogram",
    "vllm:inter_token_latency_seconds_count": "histogram",
    "vllm:e2e_request_latency_seconds_sum": "histogram",
    "process_resident_memory_bytes": "gauge",
    "llama_bridge_build_info": "gauge",
}


def measured(*models: MeasuredModel, **more: Any) -> Measured:
    fields = {
        "version": "1.2", "uptime_s": 60.0, "memory": 1, "clients": 2, "connections": 9, "refused": {},
        "bytes_received": 10, "bytes_sent": 20,
        "jobs": {}, "requests": [], "request_seconds": {}, "models": list(models),
    }  # fmt: skip
    return Measured(**fields | more)


def a_model(name: str, **more: Any) -> MeasuredModel:
    nothing = Distribution(FirstToken.BOUNDS, [0] * 23, 0.0)
    times = dict.fromkeys(("first_token", "between_tokens", "end_to_end"), nothing)
    integers = {name: 0 for name, kind in MeasuredModel.__annotations__.items() if kind in ("int", "float")}
    return MeasuredModel(**{**integers, **times, "name": name, "loaded": True, **more})


def samples(told: Measured) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(prometheus.exposition(told))
        for sample in family.samples
    }


def test_names_and_types() -> None:
    families = parser.text_string_to_metric_families(prometheus.exposition(measured(a_model("a"))))
    there = {sample.name: family.type for family in families for sample in family.samples}
    assert {name: there.get(name) for name in KNOWN} == KNOWN
    ours = {name for name in there if not name.startswith(("process_", "llama_bridge_", "llamacpp:", "vllm:"))}
    assert not ours


def test_each_family_stands_there_once() -> None:
    text = prometheus.exposition(measured(a_model("a"), a_model("b")))
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


def test_values() -> None:
    told = samples(
        measured(
            a_model("a", running=3, cells_running=50, cells=200, decodes=4, busy_slots=10),
            a_model("b", tokens=7),
            requests=[Requests("INFER", "a", "ok", 5), Requests("PING", None, "ok", 6)],
            refused={"overloaded": 2},
            jobs={"queued": 3, "running": 0},
        )
    )
    assert told["vllm:kv_cache_usage_perc", (("model_name", "a"),)] == 0.25
    assert told["vllm:kv_cache_usage_perc", (("model_name", "b"),)] == 0
    assert told["llamacpp:n_busy_slots_per_decode", (("model", "a"),)] == 2.5
    assert told["llamacpp:tokens_predicted_total", (("model", "b"),)] == 7
    assert told["llama_bridge_requests_total", (("model", "a"), ("outcome", "ok"), ("verb", "INFER"))] == 5
    assert told["llama_bridge_requests_total", (("model", ""), ("outcome", "ok"), ("verb", "PING"))] == 6
    assert [told["llama_bridge_jobs", (("state", state),)] for state in ("queued", "running")] == [3, 0]
    assert told["llama_bridge_refused_total", (("code", "overloaded"),)] == 2


def test_histograms_are_cumulative() -> None:
    histogram = FirstToken()
    for seconds in (0.0005, 0.003, 0.003, 1e6):
        histogram.observe(seconds)
    told = samples(measured(a_model("a", first_token=Distribution.of(histogram))))
    name = "vllm:time_to_first_token_seconds"
    buckets = {dict(labels)["le"]: value for (one, labels), value in told.items() if one == f"{name}_bucket"}
    assert (buckets["0.001"], buckets["0.005"], buckets["2560.0"], buckets["+Inf"]) == (1, 3, 3, 4)
    assert told[f"{name}_count", (("model_name", "a"),)] == 4
    assert told[f"{name}_sum", (("model_name", "a"),)] == pytest.approx(1e6)


def test_any_name_can_be_a_label() -> None:
    name = 'q"uo\\te{}=,ö'
    assert samples(measured(a_model(name, tokens=1)))["llamacpp:tokens_predicted_total", (("model", name),)] == 1
