"""What operators see: the numbers, their bounds and their price."""

import timeit

from prometheus_client.parser import text_string_to_metric_families

from grasp_cube.serving.metrics import CONTENT_TYPE, ServerMetrics


def make(**options) -> ServerMetrics:
    return ServerMetrics(**({"queue": lambda: 3, "sessions": lambda: 2} | options))


def samples(metrics: ServerMetrics) -> dict:
    """{(name, label values): value} as a scraper reads it."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_every_number_is_on_the_page():
    """Counts, histograms in seconds, gauges read at the moment."""
    metrics = make(device_memory=lambda: 1.5e9)
    metrics.received("infer")
    metrics.received("infer")
    metrics.answered(queue_ms=2, infer_ms=60, total_ms=70, batch_size=3)
    metrics.failed("OVERLOADED")
    seen = samples(metrics)
    assert seen["grasp_cube_requests_total", "infer"] == 2
    assert seen["grasp_cube_requests_total", "reset"] == 0
    assert seen["grasp_cube_errors_total", "OVERLOADED"] == 1
    assert seen["grasp_cube_batch_size_bucket", "2.0"] == 0
    assert seen["grasp_cube_batch_size_bucket", "4.0"] == 1
    assert seen[("grasp_cube_queue_seconds_sum",)] == 0.002
    assert seen[("grasp_cube_inference_seconds_sum",)] == 0.06
    assert seen["grasp_cube_inference_seconds_bucket", "0.05"] == 0
    assert seen["grasp_cube_total_seconds_bucket", "0.1"] == 1
    assert seen[("grasp_cube_queue_length",)] == 3
    assert seen[("grasp_cube_sessions",)] == 2
    assert seen[("grasp_cube_device_memory_bytes",)] == 1.5e9
    assert CONTENT_TYPE.startswith("text/plain")


def test_two_servers_do_not_add_up():
    """Each has a registry of its own; without a device there is no memory gauge."""
    first, second = make(), make()
    first.received("infer")
    assert samples(second)["grasp_cube_requests_total", "infer"] == 0
    assert ("grasp_cube_device_memory_bytes",) not in samples(second)


def test_clients_cannot_make_up_series():
    """An unknown operation or code is `other`."""
    metrics = make()
    before = set(samples(metrics))
    metrics.received("x" * 1000)
    metrics.failed("MADE_UP")
    after = samples(metrics)
    assert set(after) == before
    assert after["grasp_cube_requests_total", "other"] == 1
    assert after["grasp_cube_errors_total", "other"] == 1


def test_a_gauge_that_fails_spoils_nothing():
    """It is NaN; the others are there."""

    def lost() -> float:
        raise RuntimeError("the driver is gone")

    seen = samples(make(device_memory=lost))
    assert seen[("grasp_cube_device_memory_bytes",)] != seen[("grasp_cube_device_memory_bytes",)]
    assert seen[("grasp_cube_queue_length",)] == 3


def test_a_request_costs_microseconds():
    """Counting one request and its answer: under 20 µs, by the best of many runs, however busy the machine is."""
    metrics = make()

    def request() -> None:
        metrics.received("infer")
        metrics.answered(queue_ms=1.2, infer_ms=55, total_ms=61, batch_size=4)

    assert min(timeit.repeat(request, number=200, repeat=50)) / 200 < 20e-6
