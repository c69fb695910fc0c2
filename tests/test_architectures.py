"""Every architecture of the installed transformers: what is selected, and what never may be."""

import pytest
from transformers import CONFIG_MAPPING

from tests.architectures import survey

# Of 489 types (transformers 5.17) and 549 (5.23) that have projections in numbered layers; benchmarks/results has all.
FEWEST = 470
SAMPLED = 4  # one type in so many, in `make test`; `make survey` goes through all


def selected_and_total(model_types):
    """Return how much projection weight is selected, and all of it, of each type that can be built and has some."""
    built = [row for row in map(survey, model_types) if "skipped" not in row]
    assert not [(row["type"], row["wrong"]) for row in built if row["wrong"]]
    projections = [(row["selected"], row["selected"] + sum(row["left"].values())) for row in built]
    return [(selected, total) for selected, total in projections if total]


@pytest.mark.survey
def test_projections_are_selected_and_nothing_else():
    projections = selected_and_total(sorted(CONFIG_MAPPING))
    assert sum(selected >= 0.99 * total for selected, total in projections) >= FEWEST


def test_projections_of_a_sample_are_selected_and_nothing_else():
    projections = selected_and_total(sorted(CONFIG_MAPPING)[::SAMPLED])
    assert sum(selected >= 0.99 * total for selected, total in projections) >= 0.9 * len(projections) > 0
