"""What is printed can't end the work: streams that are closed, full, gone, narrow, or of another program's making."""

import errno
import io
import os
import pty
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import SMALL, assert_same_run, flags

import deepcluster
from deepcluster.core.output import Output, safe_streams
from deepcluster.core.progress import Reporter
from deepcluster.core.text import visible

NAME = "фото/\x1b[31mred\udce9.jpg"
SEEN = "фото/\\x1b[31mred\\xe9.jpg"


class OnlyWrite:
    """As scripts put in place of the standard output: no flush, isatty or encoding."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class Refusing:
    """A stream whose every method fails."""

    encoding = "utf-8"

    def __init__(self, fault: Exception) -> None:
        self.fault = fault

    def write(self, text: str) -> int:
        raise self.fault

    def flush(self) -> None:
        raise self.fault

    def isatty(self) -> bool:
        raise self.fault


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


BAD_STREAMS: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "closed": closed,
    "no write": lambda: 5,
    "full": lambda: Refusing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "pipe": lambda: Refusing(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))),
    "terminal gone": lambda: Refusing(OSError(errno.EIO, os.strerror(errno.EIO))),
    "of another program": lambda: Refusing(RuntimeError("the window is closed")),
    "an object with length 0": lambda: type("Empty", (OnlyWrite,), {"__len__": lambda self: 0})(),
}


@pytest.mark.parametrize("kind", BAD_STREAMS)
def test_a_reporter_does_not_mind_its_streams(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", BAD_STREAMS[kind]())
    monkeypatch.setattr(sys, "stderr", BAD_STREAMS[kind]())
    reporter = Reporter()
    reporter.say(NAME)
    reporter.log_to(tmp_path / "train.log")
    reporter.warn(NAME)
    with reporter.track("work", 2) as advance:
        advance(2)
    reporter.close()
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == [SEEN, f"warning: {SEEN}"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "koi8-r", "utf-16"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Output.of(stream).line("naïve … фото 日本")
    assert raw.getvalue() == "naïve … фото 日本\n".encode(encoding, "backslashreplace")


def test_a_terminal_of_a_narrow_encoding_has_a_bar() -> None:
    raw = io.BytesIO()
    reporter = Reporter(stream=Terminal(raw, encoding="cp1252"))
    with reporter.track("[red]фото[/nosuch]", 2) as advance:
        advance(1)
        reporter.say(":smile: [bold]日本\x1b]0;title\x07")
        advance(1)
    text = raw.getvalue().decode("cp1252")
    assert ":smile: [bold]\\u65e5\\u672c\\x1b]0;title\\x07" in text
    assert "[red]\\u0444\\u043e\\u0442\\u043e[/nosuch]" in text


@given(st.text(st.characters()))
def test_visible_text_has_no_control_characters(text: str) -> None:
    seen = visible(text)
    assert not {unicodedata.category(character) for character in seen} & {"Cc", "Cs", "Zl", "Zp"}
    seen.encode()
    assert visible(seen) == seen
    assert seen == text or not text.isprintable()
    assert visible(text, lines=True).count("\n") == text.count("\n")


def test_an_output_looks_like_a_stream_of_text_to_click() -> None:
    with pytest.raises(TypeError):
        Output(io.StringIO()).write(b"")  # type: ignore[arg-type]
    before = sys.stdout
    with safe_streams() as (out, _):
        assert sys.stdout is out
        print("hello", flush=True)
    assert sys.stdout is before


# Processes

DC = [sys.executable, "-m", "deepcluster"]


def shell(script: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script of bash with the command as `$DC`, and more words as `$1`, …; the error stream is kept."""
    command = ["bash", "-c", f'DC="{sys.executable} -m deepcluster"\n{script}', "bash", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def test_a_command_for_its_output_alone_ends_as_the_pipe_does() -> None:
    done = shell("$DC cache info | head -c 0; echo ${PIPESTATUS[0]}; $DC train --help | head -c 0; echo ${PIPESTATUS[0]}")
    assert done.stderr == ""
    assert {*done.stdout.split()} <= {"141", "0"}  # 0 where it was written before the pipe was closed.


def test_a_command_for_its_output_alone_says_that_it_can_not_be_written() -> None:
    done = shell("$DC cache info >&-; echo $?")
    assert done.stdout == "1\n"
    assert done.stderr == "deepcluster: the standard output can't be written to: it is closed\n"


def test_training_goes_on_without_its_streams(images: Path, trained: Path, tmp_path: Path) -> None:
    """No stream at all; the handles 0, 1 and 2 are not given to files of the run."""
    words = ["train", images, "--out", tmp_path / "run", *flags(workers=0)]
    done = shell('$DC "$@" <&- >&- 2>&-', *words)
    assert done.returncode == 0
    assert_same_run(tmp_path / "run", trained)


def test_training_goes_on_when_the_pipe_is_closed(images: Path, trained: Path, tmp_path: Path) -> None:
    words = ["train", images, "--out", tmp_path / "run", *flags(workers=0)]
    done = shell('$DC "$@" 2>&1 | head -1; echo ${PIPESTATUS[0]}', *words)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""
    assert_same_run(tmp_path / "run", trained)
    assert "done: " in (tmp_path / "run/train.log").read_text()


def test_training_goes_on_when_the_terminal_is_gone(images: Path, trained: Path, tmp_path: Path) -> None:
    """As after `disown` or `trap '' HUP`: the process lives on, and what it writes to the terminal fails with EIO."""
    words = ["train", str(images), "--out", str(tmp_path / "run"), *flags(workers=0)]
    script = 'trap "" HUP; "$@"; echo $? > "$0"'
    child, terminal = pty.fork()
    if child == 0:
        os.execvp("bash", ["bash", "-c", script, str(tmp_path / "status"), *DC, *words])
    os.read(terminal, 1)
    os.close(terminal)
    os.waitpid(child, 0)
    assert (tmp_path / "status").read_text() == "0\n"
    assert_same_run(tmp_path / "run", trained)


def test_train_prints_into_any_object(images: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = OnlyWrite()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    run = deepcluster.train(images, out=tmp_path / "run", **SMALL)
    assert "done: " in stream.text
    assert_same_run(run, trained)
