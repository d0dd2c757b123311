"""The server's numbers as Prometheus reads them. Gathered when asked for, so that calls pay nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from attnd_server.config import ServerConfig
from attnd_server.execution.executor import Executor
from attnd_server.kv.caches import CacheTable
from attnd_server.observe.counts import Metrics
from attnd_server.observe.histogram import Histogram
from attnd_server.observe.verify import Verifier

# Of the backend, for calls that only store.
NO_BACKEND = "none"
US_PER_S = 1e6


class ServerCollector(Collector):
    """Everything about one server. No label says who called, or for which cache."""

    def __init__(
        self,
        metrics: Metrics,
        executor: Executor,
        caches: CacheTable,
        config: ServerConfig,
        verifier: Verifier | None = None,
    ) -> None:
        """Reads from all of these."""
        self._metrics = metrics
        self._executor = executor
        self._caches = caches
        self._config = config
        self._verifier = verifier

    def collect(self) -> Iterator[Metric]:
        """All metrics, with their values now."""
        yield from self._calls()
        yield from self._refusals()
        yield from self._queue()
        yield from self._device()
        yield from self._kernels()
        yield from self._verification()
        yield from self._memory()
        yield from self._rpcs()

    def _calls(self) -> Iterable[Metric]:
        labels = ["plane", "backend"]
        calls = CounterMetricFamily("attnd_calls", "Calls served: one layer of one step each.", labels=labels)
        received = CounterMetricFamily("attnd_call_received_bytes", "Bytes of q, k and v.", labels=labels)
        sent = CounterMetricFamily("attnd_call_sent_bytes", "Bytes of output and lse.", labels=labels)
        phases = HistogramMetricFamily(
            "attnd_call_phase_seconds",
            "Time of a call. queue: waiting for the executor; copy_in: bringing q, k and v to the device; kernel: "
            "storing and attending; copy_out: bringing results back; of all calls that share the launch. "
            "Copies are 0 where the device computes in place. On the cuda plane a step waits once, and each of its "
            "calls has an equal part of its time as kernel, what the worker did between the layers included.",
            labels=[*labels, "phase"],
        )
        for tally in list(self._metrics.calls.values()):
            values = [tally.plane, NO_BACKEND if tally.backend is None else tally.backend.value]
            calls.add_metric(values, sum(tally.kernel_us.counts))
            received.add_metric(values, tally.received_bytes)
            sent.add_metric(values, tally.sent_bytes)
            _add(phases, [*values, "queue"], tally.queue_us, US_PER_S)
            _add(phases, [*values, "copy_in"], tally.copy_in_us, US_PER_S)
            _add(phases, [*values, "kernel"], tally.kernel_us, US_PER_S)
            _add(phases, [*values, "copy_out"], tally.copy_out_us, US_PER_S)
        launches = HistogramMetricFamily(
            "attnd_calls_per_launch", "Calls that shared a launch on the device.", labels=[]
        )
        _add(launches, [], self._metrics.launches)
        return calls, received, sent, phases, launches

    def _refusals(self) -> Iterable[Metric]:
        refusals = CounterMetricFamily("attnd_refusals", "Errors that clients were told, by class.", labels=["reason"])
        for kind, count in list(self._metrics.refusals.items()):
            refusals.add_metric([kind.__name__], count)
        yield refusals

    def _queue(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("attnd_queue_depth", "Calls that wait for the device.", self._executor.queue_depth)
        limit = self._config.max_queue_depth
        yield GaugeMetricFamily("attnd_queue_depth_limit", "Most calls that may wait for the device.", limit)

    def _device(self) -> Iterable[Metric]:
        text = "1, or 0 once the device has failed: then the server ends."
        yield GaugeMetricFamily("attnd_device_healthy", text, 0 if self._executor.faults.reason else 1)

    def _kernels(self) -> Iterable[Metric]:
        if self._executor.kernels is None:
            return
        states = self._executor.kernels.states()
        text = "Kernels of the device. waiting: to be looked for or compiled; failed: cannot be had."
        kernels = GaugeMetricFamily("attnd_kernels", text, labels=["state"])
        kernels.add_metric(["loaded"], states.num_loaded)
        kernels.add_metric(["waiting"], states.num_waiting)
        kernels.add_metric(["compiling"], len(states.compiling))
        kernels.add_metric(["failed"], len(states.failed))
        yield kernels
        yield CounterMetricFamily("attnd_kernels_compiled", "Kernels that were compiled.", states.num_compiled)
        text = "Kernels that were found in the kernel cache, and not compiled."
        yield CounterMetricFamily("attnd_kernels_found", text, states.num_found)

    def _verification(self) -> Iterable[Metric]:
        labels = ["backend"]
        ratios = HistogramMetricFamily(
            "attnd_verify_error_ratio",
            "Greatest error of each sample that was verified, as a multiple of what is tolerated.",
            labels=labels,
        )
        mismatches = CounterMetricFamily("attnd_verify_mismatches", "Samples whose output was wrong.", labels=labels)
        text = "Numbers of verified outputs that are NaN or infinite, also where the caller's own make them."
        not_finite = CounterMetricFamily("attnd_verify_not_finite", text, labels=labels)
        text = "Rows of heads that were not compared: a caller's numbers make sums that float32 does not hold."
        beyond = CounterMetricFamily("attnd_verify_beyond_float32", text, labels=labels)
        text = "Samples that were not verified. queue_full: too many wait; too_big: one head's context is too long."
        dropped = CounterMetricFamily("attnd_verify_dropped", text, labels=[*labels, "reason"])
        for backend, tally in ({} if self._verifier is None else self._verifier.tallies).items():
            _add(ratios, [backend.value], tally.ratios)
            mismatches.add_metric([backend.value], tally.mismatches)
            not_finite.add_metric([backend.value], tally.not_finite)
            beyond.add_metric([backend.value], tally.beyond)
            for reason, count in tally.dropped.items():
                dropped.add_metric([backend.value, reason], count)
        return ratios, mismatches, not_finite, beyond, dropped

    def _memory(self) -> Iterable[Metric]:
        caches = self._caches.all()
        graphs = self._executor.graphs.all()
        gauges: dict[str, tuple[str, int]] = {
            "attnd_caches": ("Caches that are leased.", len(caches)),
            "attnd_caches_limit": ("Most caches at one time.", self._config.max_caches),
            "attnd_pages": ("Pages of all caches.", sum(cache.shape.num_pages for cache in caches)),
            "attnd_pages_in_use": (
                "Pages into which something was stored.",
                sum(each.num_pages_written for each in caches),
            ),
            "attnd_kv_memory_bytes": (
                "Memory that caches take, buffers of their graphs included.",
                sum(cache.num_bytes for cache in caches),
            ),
            "attnd_kv_memory_limit_bytes": ("Memory that caches may take.", self._caches.kv_bytes),
            "attnd_graphs": ("Graphs that warm-ups captured.", sum(each.num_graphs for each in graphs)),
            "attnd_graph_memory_bytes": ("Memory of their buffers.", sum(cache.num_graph_bytes for cache in caches)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)

    def _rpcs(self) -> Iterable[Metric]:
        labels = ["grpc_method", "grpc_status"]
        started = CounterMetricFamily("grpc_server_call_started", "RPCs that began.", labels=labels[:1])
        seconds = HistogramMetricFamily("grpc_server_call_duration_seconds", "Time of a whole RPC.", labels=labels)
        sent = HistogramMetricFamily(
            "grpc_server_call_sent_total_compressed_message_size_bytes", "All responses of an RPC.", labels=labels
        )
        received = HistogramMetricFamily(
            "grpc_server_call_rcvd_total_compressed_message_size_bytes", "All requests of an RPC.", labels=labels
        )
        for method, count in list(self._metrics.rpcs_started.items()):
            started.add_metric([method], count)
        for (method, status), tally in list(self._metrics.rpcs.items()):
            _add(seconds, [method, status], tally.seconds)
            _add(sent, [method, status], tally.sent_bytes)
            _add(received, [method, status], tally.received_bytes)
        return started, seconds, sent, received


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram, per_unit: float = 1.0) -> None:
    """Adds a histogram in the cumulative form of Prometheus; `per_unit` of its values are one of Prometheus's unit."""
    names = [*(str(bound / per_unit) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(names, accumulate(histogram.counts), strict=True))
    family.add_metric(labels, buckets, histogram.sum / per_unit)
