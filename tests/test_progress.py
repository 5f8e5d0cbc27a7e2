"""Lines, meters and the log: what a person sees while work goes on."""

import io
import re
from pathlib import Path

import pytest

from deepcluster.core import progress
from deepcluster.core.progress import Reporter
from deepcluster.core.text import duration, rate_of, size

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_durations() -> None:
    values = (0, 0.4, 8.2, 59.4, 59.7, 60, 119.7, 200, 3599, 3599.6, 7500, 86400, 268_000)
    assert [duration(value) for value in values] == [
        "0s", "0s", "8s", "59s", "1 min 00s", "1 min 00s", "2 min 00s", "3 min 20s", "59 min 59s", "1 h 00 min",
        "2 h 05 min", "24 h 00 min", "3.1 days",
    ]  # fmt: skip


def test_sizes() -> None:
    values = (0, 999, 1000, 1500, 999_400, 999_600, 2_340_000, 12_345_678_901)
    assert [size(value) for value in values] == ["0 B", "999 B", "1 kB", "2 kB", "999 kB", "1 MB", "2 MB", "12.3 GB"]


def test_where_lines_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream)
    reporter.say("before the log")
    reporter.log_to(tmp_path / "train.log")
    reporter.say("after it")
    reporter.detail("for the curious")
    reporter.warn("take care")
    reporter.close()
    assert stream.getvalue() == "before the log\nafter it\n"
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "warning: take care\n")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [re.sub(f"^{STAMP}", "", line) for line in lines] == [
        "before the log", "after it", "for the curious", "warning: take care",
    ]  # fmt: skip
    assert all(re.match(STAMP, line) for line in lines)


def test_a_log_is_gone_on_with(tmp_path: Path) -> None:
    for line in ("first", "second"):
        reporter = Reporter(quiet=True)
        reporter.log_to(tmp_path / "train.log")
        reporter.say(line)
        reporter.close()
    assert [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()] == ["first", "second"]


def test_quiet_and_verbose() -> None:
    quiet, verbose = io.StringIO(), io.StringIO()
    for reporter in (Reporter(quiet=True, stream=quiet), Reporter(verbose=True, stream=verbose)):
        reporter.say("a line")
        reporter.detail("a detail")
        with reporter.track("work", 10) as meter:
            meter(10)
    assert quiet.getvalue() == ""
    assert verbose.getvalue() == "a line\na detail\n"


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Reporter(stream=stream).track("features", 10_000) as meter:
        for _ in range(10):
            now[0] += 10
            meter(1000)
    assert stream.getvalue().splitlines() == [
        "  features 3,000/10,000, 100 images/s, 1 min 10s left",
        "  features 6,000/10,000, 100 images/s, 40s left",
        "  features 9,000/10,000, 100 images/s, 10s left",
    ]


def test_on_a_terminal_there_is_a_bar_and_lines_stand_above_it() -> None:
    stream = Terminal()
    reporter = Reporter(stream=stream)
    with reporter.track("features", 100) as meter:
        meter(50)
        reporter.say("a line [with brackets] between")
        meter(50)
    assert "features" in stream.getvalue()
    assert "100/100" in stream.getvalue()
    assert "a line [with brackets] between" in stream.getvalue()


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1234.4, "1,234 steps/s"), (27.4, "27 steps/s"), (1.44, "1.4 steps/s"), (0.05, "20 s/step"), (0.0, "0 steps/s")],
)
def test_slow_work_is_measured_in_seconds(rate: float, text: str) -> None:
    assert rate_of(rate, "steps") == text
