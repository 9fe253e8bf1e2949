"""Reading what the service tells Prometheus."""

from prometheus_client.parser import text_string_to_metric_families

from tests.app.service import Service
from tests.system.service import until

Labels = frozenset[tuple[str, str]]


class Scrape:
    """One reading, by name and labels."""

    def __init__(self, body: str) -> None:
        self.body = body
        self.families = list(text_string_to_metric_families(body))
        self._samples: dict[tuple[str, Labels], float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples[name, frozenset(labels.items())]

    def has(self, name: str) -> bool:
        return any(found == name for found, _ in self._samples)


def scrape(service: Service, *, database_up: bool = True) -> Scrape:
    """As the database stands; on a busy machine it may not answer in time at first."""

    def look() -> Scrape | None:
        response = service.http.get("/metrics")
        assert response.status_code == 200, response.text
        found = Scrape(response.text)
        return found if found("flatlora_database_up") == database_up else None

    found = until(look, seconds=30, every=0.5)
    assert found
    return found
