"""The results of a protocol, as JSON and as tables in text, Markdown or LaTeX."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from deepcluster.core import html

if TYPE_CHECKING:
    from PIL.Image import Image

# Measures that are printed as plain numbers; all others are shares, printed in percent.
PLAIN = ("nmi", "adjusted_rand", "clusters")

# More cases than this are rows of a table, not columns; of more than this only some are shown.
FEW, MANY = 8, 36
LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {c: "\\" + c for c in "&%$#_{}"}
)

Measured = float | Mapping[str, float]


@dataclass(frozen=True)
class Results:
    """The results of a protocol.

    Attributes:
        protocol: its name on the command line.
        data: the data set, in words and numbers.
        settings: everything that the numbers depend on.
        results: shares (0 to 1) or plain numbers by measure; by measure and stage (or other case) where there are several.
        headline: the measure, and its stage where there are several, that a summary shows.
        notes: what a reader must know, such as classes that were left out.
        pictures: predictions on a few images, by the name of the file without ending; not in the JSON file.
    """

    protocol: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Mapping[str, Measured]
    headline: tuple[str, ...]
    notes: Sequence[str] = field(default_factory=tuple)
    pictures: Mapping[str, "Image"] = field(default_factory=dict)

    def best(self) -> float:
        """Return the value of the headline."""
        value: Any = self.results
        for name in self.headline:
            value = value[name]
        return float(value)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as in the JSON file."""
        return {
            "protocol": self.protocol,
            "data": dict(self.data),
            "settings": dict(self.settings),
            "results": {
                name: {case: _number(one) for case, one in value.items()} if isinstance(value, Mapping) else _number(value)
                for name, value in self.results.items()
            },
            "headline": list(self.headline),
            "notes": list(self.notes),
        }

    def _repr_html_(self) -> str:
        tables = [html.table(dict(zip(one.header, row, strict=True)) for row in one.rows) for one in tables_of(self.results)]
        notes = (html.line(note, faint=True) for note in self.notes)
        return html.block(html.line(self.protocol, bold=True), *tables, *notes)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Results":
        """Return the results of what `as_dict` returned."""
        words = {"headline": tuple(content["headline"]), "notes": tuple(content["notes"])}
        return cls(**{one.name: content[one.name] for one in fields(cls) if one.name in content} | words)


def by_case(value: Measured | None) -> Mapping[str, float | None]:
    """Return the values of a measure by case; a plain number has the case ""."""
    return value if isinstance(value, Mapping) else {"": value}


def _number(value: float) -> float | None:
    """Return what JSON can hold: null for NaN."""
    return None if value != value else value


@dataclass(frozen=True)
class Table:
    """Cells as they are printed; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def render(self, form: str = "text") -> str:
        """Return the table as text, markdown or latex."""
        return {"text": self._text, "markdown": self._markdown, "latex": self._latex}[form]()

    def _text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        is_left = self._holds_words()
        return "\n".join(
            "  ".join(
                cell.ljust(width) if left else cell.rjust(width)
                for cell, width, left in zip(line, widths, is_left, strict=True)
            ).rstrip()
            for line in lines
        )

    def _holds_words(self) -> list[bool]:
        """Return for each column whether it is the first, or has a cell that is no number."""
        return [
            column == 0 or any(re.fullmatch(r"[-+]?[\d.,]+%?|–", line[column]) is None for line in self.rows)
            for column in range(len(self.header))
        ]

    def _markdown(self) -> str:
        lines = [self.header, ["---" if left else "---:" for left in self._holds_words()], *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)

    def _latex(self) -> str:
        body = [" & ".join(cell.translate(LATEX) for cell in line) + r" \\" for line in [self.header, *self.rows]]
        columns = "".join("l" if left else "r" for left in self._holds_words())
        top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule"]
        return "\n".join([*top, *body[1:], r"\bottomrule", r"\end{tabular}"])


def shown(measure: str, value: float | None) -> str:
    """Return a value as it is printed: shares in percent with one decimal and the sign, missing values as a dash."""
    if value is None or value != value:
        return "–"
    if measure == "clusters":
        return f"{value:,.0f}"
    return f"{value:.3f}" if measure.startswith(PLAIN) else f"{value:.1%}"


def tables_of(results: Mapping[str, Measured], *, most_rows: int = 16) -> list[Table]:
    """Return results as tables: one per set of measures that have the same cases.

    A few cases (stages) are columns and the measures rows; many are rows, and of very many (epochs) some, evenly spread.

    Args:
        most_rows: number of rows shown of very many.
    """
    tables: dict[tuple[str, ...], dict[str, Mapping[str, float | None]]] = {}
    for measure, value in results.items():
        values = by_case(value)
        tables.setdefault(tuple(values), {})[measure] = values
    return [_table(cases, measures, most_rows) for cases, measures in tables.items() if cases]


def _table(cases: Sequence[str], measures: Mapping[str, Mapping[str, float | None]], most_rows: int) -> Table:
    names = [measure.replace("_", " ") for measure in measures]
    if len(cases) <= FEW:
        rows = [
            [name, *(shown(measure, values[case]) for case in cases)]
            for name, (measure, values) in zip(names, measures.items(), strict=True)
        ]
        return Table(["", *(case or "value" for case in cases)], rows)
    last, most = len(cases) - 1, most_rows if len(cases) > MANY else len(cases)
    some = [cases[round(row * last / (most - 1))] for row in range(most)]
    return Table(["", *names], [[case, *(shown(measure, by[case]) for measure, by in measures.items())] for case in some])
