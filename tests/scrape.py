"""What Prometheus reads, as numbers that a test can ask for."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """One answer of a metrics endpoint.

    Attributes:
        text: as it came.
        samples: labels and value of each sample, by its name.
        types: of each family, by its name.
    """

    text: str
    samples: dict[str, list[tuple[dict[str, str], float]]]
    types: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Scrape:
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        types: dict[str, str] = {}
        for family in text_string_to_metric_families(text):
            types[family.name] = family.type
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return cls(text, samples, types)

    @classmethod
    def of(cls, url: str) -> Scrape:
        with urllib.request.urlopen(url, timeout=10) as response:
            return cls.parse(response.read().decode())

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels, whatever else they have; 0 if there are none."""
        return sum(value for given, value in self.samples.get(name, []) if labels.items() <= given.items())

    def by(self, name: str, *labels: str) -> dict[str | tuple[str, ...], float]:
        """The samples of a metric that are not 0, by the values of these labels."""
        found = {tuple(given[label] for label in labels): value for given, value in self.samples.get(name, []) if value}
        return {key[0] if len(labels) == 1 else key: value for key, value in found.items()}
