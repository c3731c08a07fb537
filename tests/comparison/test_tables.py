from __future__ import annotations

from dataclasses import replace

import pytest
from tests.comparison.results import result, seeds

from lowbit.comparison.tables import make_tables


def test_rows_are_ordered_by_their_mean_and_differences_are_paired() -> None:
    found = make_tables([*seeds([0.5, 0.6, 0.7], "lsq"), *seeds([0.6, 0.7, 0.8], "pact")], baseline="lsq")
    (table,) = found.tables
    assert [row.label for row in table.rows] == ["pact", "lsq"]
    difference = table.rows[0].difference
    assert difference is not None and difference.mean == pytest.approx(0.1) and difference.is_shown
    assert table.rows[1].difference is None and table.baseline == "lsq"
    assert [row.rank for row in table.rows] == [1, 2] and table.float_value == 0.95
    assert found.warnings == [] and found.separated == [] and table.title == "digits, 4/4, training, aligned"


def test_a_metric_of_which_less_is_better_turns_the_order() -> None:
    results = [replace(one, higher_is_better=False) for one in [*seeds([0.5] * 3, "lsq"), *seeds([0.6] * 3, "pact")]]
    assert [row.label for row in make_tables(results).tables[0].rows] == ["lsq", "pact"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"terms": {"first_layer": "float/float"}}, "first layer differs (lsq: 8/8; pact: float/float)"),
        ({"terms": {"images": 60}}, "images differs (lsq: 50; pact: 60)"),
        ({"terms": {"float_share": 0.2}}, "float share differs (lsq: 0.0; pact: 0.2)"),
        ({"facts": {"weights": "v" * 64}}, "weights differs (lsq: wwwwwwwwww; pact: vvvvvvvvvv)"),
        ({"facts": {"data": "e" * 64}}, "data differs"),
        ({"facts": {"configurations": 7}}, "configurations differs (lsq: 1; pact: 7)"),
        ({"settings": {"recipe": {"epochs": 3}}}, "settings differ (recipe.epochs: None, 3)"),
    ],
)
def test_rows_on_unequal_terms_are_never_in_one_table(changes: dict[str, object], told: str) -> None:
    found = make_tables([*seeds([0.5] * 3, "lsq"), *seeds([0.6] * 3, "pact", **changes)])  # type: ignore[arg-type]
    assert [[row.label for row in table.rows] for table in found.tables] == [["lsq"], ["pact"]]
    assert len(found.separated) == 1 and told in found.separated[0]


def test_tracks_and_bits_never_mix() -> None:
    found = make_tables([result(), result(label="pact", track="published"), result(label="ewgs", bits=(2, 2))])
    assert [[row.label for row in table.rows] for table in found.tables] == [["ewgs"], ["lsq"], ["pact"]]


def test_granularity_is_shown_and_separates_only_where_it_is_asked_to() -> None:
    results = [*seeds([0.5] * 3, "lsq"), *seeds([0.6] * 3, "pact", terms={"granularity": "per_channel / per_tensor"})]
    assert len(make_tables(results).tables) == 1
    found = make_tables(results, equal=["granularity"])
    assert len(found.tables) == 2 and "granularity differs" in found.separated[0]


def test_methods_that_failed_stay_visible_with_their_reason() -> None:
    (table,) = make_tables([*seeds([0.5] * 3, "lsq"), *[result(None, "pact", seed=seed, reason="no memory") for seed in range(3)]]).tables
    row = table.rows[-1]
    assert (row.label, row.spread, row.rank, [one.reason for one in row.unfinished]) == ("pact", None, None, ["no memory"] * 3)


def test_a_method_that_diverged_for_one_seed_counts_the_others() -> None:
    (table,) = make_tables([*seeds([0.5] * 3), result(0.1, seed=3, status="diverged")]).tables
    assert table.rows[0].spread is not None and table.rows[0].spread.count == 3 and len(table.rows[0].unfinished) == 1


def test_older_results_of_a_changed_method_are_superseded() -> None:
    old, new = result(0.5, facts={"source": "old"}), result(0.6, facts={"source": "new"})
    for order in ([old, new], [new, old]):
        found = make_tables(order, current=[new.key])
        assert found.superseded == 1 and found.tables[0].rows[0].values == {0: 0.6}


def test_one_label_with_two_sets_of_options_is_two_rows() -> None:
    (table,) = make_tables([*seeds([0.5] * 3), *seeds([0.6] * 3, options={"a": 1})]).tables
    assert [row.label for row in table.rows] == ["lsq (a=1)", "lsq"]


def test_doubtful_results_are_warned_of() -> None:
    few = make_tables(seeds([0.5, 0.6]))
    assert few.warnings == ["fewer than 3 seeds, so that no difference can be shown: digits, 4/4, training, aligned"]
    two_over_four = make_tables([*seeds([0.5, 0.51, 0.5]), *seeds([0.7, 0.71, 0.7], bits=(2, 2))])
    assert "lsq on digits: 2/2 is better than 4/4 (0.7033 and 0.5033), beyond the spread over seeds" in two_over_four.warnings
    within = make_tables([*seeds([0.5, 0.7, 0.6]), *seeds([0.6, 0.65, 0.7], bits=(2, 2))])
    assert within.warnings == []
    machines = make_tables([*seeds([0.5] * 3), *seeds([0.5] * 3, "pact", machine={"processor": "q", "lowbit": "1"})])
    assert any("different machines" in text and "p, q" in text for text in machines.warnings)
    versions = make_tables([*seeds([0.5] * 3), *seeds([0.5] * 3, "pact", machine={"processor": "p", "lowbit": "2"})])
    assert any("versions of lowbit: 1, 2" in text for text in versions.warnings)
    weights = make_tables([*seeds([0.5] * 3), *seeds([0.5] * 3, "pact", facts={"weights": "v" * 64})])
    assert any("different weights" in text for text in weights.warnings)
    images = make_tables([*seeds([0.5] * 3), *seeds([0.5] * 3, "pact", terms={"images": 60})])
    assert any("images seen differ (50, 60)" in text for text in images.warnings)


def test_random_weights_of_the_seed_are_equal_terms() -> None:
    results = [
        result(0.5, label, seed=seed, facts={"weights": str(seed), "weights_follow_seed": True})
        for label in ("lsq", "pact")
        for seed in range(3)
    ]
    found = make_tables(results)
    assert len(found.tables) == 1 and found.warnings == []
