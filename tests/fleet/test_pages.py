"""The figures of all replicas on one page."""

from prometheus_client.parser import text_string_to_metric_families

from grasp_cube.fleet.pages import gathered
from grasp_cube.serving.metrics import ServerMetrics


def page(answers: int) -> str:
    metrics = ServerMetrics(queue=lambda: answers, sessions=lambda: 1)
    for _ in range(answers):
        metrics.received("infer")
        metrics.answered(queue_ms=1, infer_ms=20, total_ms=22, batch_size=1)
    return metrics.render().decode()


def test_each_figure_names_its_replica_and_its_policy() -> None:
    """Every sample of every replica is there once, under one header for each family."""
    text = gathered({("a", "lift"): page(2), ("b", "sort"): page(3)}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {
        (sample.name, sample.labels["replica"], sample.labels["policy"]): sample.value
        for family in families.values()
        for sample in family.samples
        if sample.labels.get("op", "infer") == "infer" and "code" not in sample.labels
    }
    assert samples["grasp_cube_requests_total", "a", "lift"] == 2
    assert samples["grasp_cube_requests_total", "b", "sort"] == 3
    assert samples["grasp_cube_total_seconds_count", "b", "sort"] == 3
    assert samples["grasp_cube_queue_length", "a", "lift"] == 2
    lines = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(lines) == len(set(lines))
    alone = {family.name: len(family.samples) for family in text_string_to_metric_families(page(2))}
    assert {name: len(family.samples) for name, family in families.items()} == {
        name: 2 * count for name, count in alone.items()
    }
