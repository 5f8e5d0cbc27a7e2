"""Tables as people and papers read them, and the file of the contract."""

import json

import pytest

from deepcluster.evaluation.results import Results, Table, shown, tables_of

FOUND = Results(
    protocol="linear",
    data={"train_images": 12},
    settings={"epochs": 90},
    results={"top-1": {"conv1": 0.1234, "conv2": 0.5}, "nmi": 0.25, "loss": {"conv2": float("nan")}},
    headline=("top-1", "conv2"),
    notes=("a class was left out",),
)


def test_shares_are_printed_in_percent_and_measures_of_clusters_as_they_are() -> None:
    assert shown("top-1", 0.12345) == "12.3%"
    assert shown("nmi", 0.12345) == "0.123"
    assert shown("adjusted_rand", -0.01) == "-0.010"
    assert shown("top-1", None) == shown("top-1", float("nan")) == "–"


def test_a_row_a_measure_and_a_column_a_stage() -> None:
    by_stage, alone, odd = tables_of(FOUND.results)
    assert list(by_stage.header) == ["", "conv1", "conv2"]
    assert [list(row) for row in by_stage.rows] == [["top-1", "12.3%", "50.0%"]]
    assert by_stage.render() == "       conv1  conv2\ntop-1  12.3%  50.0%"
    assert [list(row) for row in (*alone.rows, *odd.rows)] == [["nmi", "0.250"], ["loss", "–"]]
    assert alone.render("markdown") == "|  | value |\n| --- | ---: |\n| nmi | 0.250 |"


def test_no_column_mixes_shares_and_percent_without_a_sign() -> None:
    (table,) = tables_of({"nmi": 0.164, "accuracy": 0.273})
    assert table.render() == "          value\nnmi       0.164\naccuracy  27.3%"
    assert r"accuracy & 27.3\% \\" in table.render("latex")


def test_many_cases_are_rows_of_which_some_are_shown() -> None:
    epochs = {f"epoch {epoch}": epoch / 100 for epoch in range(1, 46)}
    (table,) = tables_of({"nmi of the run": epochs, "purity of the run": epochs}, most_rows=5)
    assert list(table.header) == ["", "nmi of the run", "purity of the run"]
    assert [list(row) for row in table.rows] == [
        [f"epoch {epoch}", f"0.{epoch:02}0", f"{epoch}.0%"] for epoch in (1, 12, 23, 34, 45)
    ]
    (whole,) = tables_of({"nmi": {f"epoch {epoch}": 0.5 for epoch in range(10)}})
    assert len(whole.rows) == 10


def test_what_latex_and_markdown_would_read_as_commands_is_escaped() -> None:
    table = Table(["a|b", "50 %"], [["run_1\\x", "{~^&#$}"]])
    assert r"a\|b" in table.render("markdown")
    latex = table.render("latex")
    assert r"a|b & 50 \% \\" in latex
    assert r"run\_1\textbackslash{}x & \{\textasciitilde{}\textasciicircum{}\&\#\$\} \\" in latex


def test_plain_values_for_json_and_back() -> None:
    content = json.loads(json.dumps(FOUND.as_dict(), allow_nan=False))
    assert content["results"] == {"top-1": {"conv1": 0.1234, "conv2": 0.5}, "nmi": 0.25, "loss": {"conv2": None}}
    again = Results.from_dict(content)
    assert tables_of(again.results) == tables_of(FOUND.results)
    assert (again.best(), again.headline, again.notes) == (0.5, FOUND.headline, FOUND.notes)


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_every_cell_is_there_in_every_form(form: str) -> None:
    for table in tables_of(FOUND.results):
        text = table.render(form).replace(r"\%", "%")
        assert all(cell in text for row in table.rows for cell in row)
