"""Every architecture of the installed transformers: what is selected, and what never may be."""

from transformers import CONFIG_MAPPING

from tests.architectures import survey

# Of 489 types (transformers 5.17) and 549 (5.23) that have projections in numbered layers; benchmarks/results has all.
FEWEST = 470


def test_projections_are_selected_and_nothing_else():
    rows = [survey(model_type) for model_type in sorted(CONFIG_MAPPING)]
    built = [row for row in rows if "skipped" not in row]
    assert not [(row["type"], row["wrong"]) for row in built if row["wrong"]]
    projections = [(row["selected"], row["selected"] + sum(row["left"].values())) for row in built]
    assert sum(selected >= 0.99 * total for selected, total in projections if total) >= FEWEST
