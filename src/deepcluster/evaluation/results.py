"""What a protocol gives, and how it is printed and written: as text, Markdown or LaTeX, and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepcluster.saving import write_whole

# Measures that are printed as they are; all others are shares, printed in percent.
PLAIN = ("nmi", "adjusted_rand", "clusters")
FORMATS = ("text", "markdown", "latex")

Measured = float | Mapping[str, float]


@dataclass(frozen=True)
class Results:
    """What a protocol found.

    Attributes:
        protocol: its name on the command line.
        data: what it was measured on, in words and numbers.
        settings: all that the numbers depend on.
        results: shares (0 to 1) or plain numbers by measure; of several stages (or other cases) by measure and stage.
        headline: the one measure, and its stage where there are several, that a summary shows.
        notes: what a reader must know, such as a class that was left out.
    """

    protocol: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Mapping[str, Measured]
    headline: tuple[str, ...]
    notes: Sequence[str] = field(default_factory=tuple)

    def best(self) -> float:
        """The value of the headline."""
        value: Any = self.results
        for name in self.headline:
            value = value[name]
        return float(value)

    def write(self, path: Path, *, model: str, seconds: float) -> None:
        """Write the JSON file of the contract."""
        content = {
            "protocol": self.protocol,
            "model": model,
            "data": dict(self.data),
            "settings": dict(self.settings),
            "results": {name: dict(value) if isinstance(value, Mapping) else value for name, value in self.results.items()},
            "headline": list(self.headline),
            "notes": list(self.notes),
            "seconds": round(seconds, 3),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Table:
    """Cells as they are printed; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def render(self, form: str = "text") -> str:
        """The table as text, markdown or latex."""
        return {"text": self._text, "markdown": self._markdown, "latex": self._latex}[form]()

    def _text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def _markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)

    def _latex(self) -> str:
        body = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in [self.header, *self.rows]]
        columns = "l" + "r" * (len(self.header) - 1)
        top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule"]
        return "\n".join([*top, *body[1:], r"\bottomrule", r"\end{tabular}"])


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: "\\" + c for c in "&%$#_{}"
}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def shown(measure: str, value: float | None) -> str:
    """A value as it is printed: shares in percent with one decimal, what is missing as a dash."""
    if value is None or value != value:
        return "–"
    if measure == "clusters":
        return f"{value:,.0f}"
    return f"{value:.3f}" if measure in PLAIN else f"{100 * value:.1f}"


def table_of(results: Mapping[str, Measured]) -> Table:
    """Results as a table: a row a measure, a column a stage; a measure of its own stands in the first column."""
    stages = list(dict.fromkeys(stage for value in results.values() if isinstance(value, Mapping) for stage in value))
    rows = []
    for measure, value in results.items():
        by_stage = value if isinstance(value, Mapping) else {(stages or [""])[0]: value}
        rows.append([measure.replace("_", " "), *(shown(measure, by_stage.get(stage)) for stage in stages or [""])])
    return Table(["", *(stages or ["value"])], rows)
