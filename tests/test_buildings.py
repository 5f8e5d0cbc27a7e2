"""Ground truth of the buildings in its three formats, and average precision against hand-worked rankings and formulas."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.buildings import (
    DAMAGED_IN_PARIS,
    WHOLE,
    find_ground_truths,
    is_buildings,
    read_gnd,
    read_lists,
)
from deepcluster.evaluation.retrieval import average_precision, precisions_at

REAL = Path(__file__).parents[2] / "shared" / "data" / "oxford5k-mini"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no data of real buildings here")


def oxford_program(ranked: list[str], positives: set[str], junk: set[str]) -> float:
    """The rule of the published program, step by step over all ranks: trapezoids under precision over recall."""
    recalls, precisions = [0.0], [1.0]
    for count, _ in enumerate(kept := [name for name in ranked if name not in junk], 1):
        right = len(positives.intersection(kept[:count]))
        recalls.append(right / len(positives))
        precisions.append(right / count)
    return float(np.trapezoid(precisions, recalls))


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        ("a", 1.0),  # alone and first
        ("abxy", 1.0),
        ("xa", (0 + 1 / 2) / 2),  # alone, second: from 0 to a half
        ("wxyza", (0 + 1 / 5) / 2),  # alone, last
        ("axb", (1 + (1 / 2 + 2 / 3) / 2) / 2),
        ("xab", ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2),
        ("jaxb", (1 + (1 / 2 + 2 / 3) / 2) / 2),  # junk first changes nothing
        ("ajjxkb", (1 + (1 / 2 + 2 / 3) / 2) / 2),
        ("jxka", (0 + 1 / 2) / 2),
        ("jk", 0.0),
        ("", 0.0),
    ],
)
def test_hand_worked_rankings(ranked: str, expected: float) -> None:
    positives = {"a", "b"} if "b" in ranked else {"a"}
    assert average_precision(list(ranked), positives, {"j", "k"}) == pytest.approx(expected)


def test_a_positive_that_is_not_ranked_is_not_found() -> None:
    assert average_precision(["a", "x"], {"a", "b"}, set()) == pytest.approx(0.5)


@given(st.permutations("abcdefghij"), st.sets(st.sampled_from("abcdefghijz"), min_size=1), st.sets(st.sampled_from("fghij")))
def test_equals_the_trapezoids_over_all_ranks(ranked: list[str], positives: set[str], junk: set[str]) -> None:
    found = average_precision(ranked, positives, junk - positives)
    assert found == pytest.approx(oxford_program(ranked, positives, junk - positives))
    assert 0 <= found <= 1


def test_precisions_at_k() -> None:
    """Right at ranks 1 and 3 once junk is skipped; after the last right one nothing counts."""
    assert precisions_at(list("ajxbyz"), {"a", "b"}, {"j"}, (1, 2, 3, 10)) == pytest.approx(
        {1: 1, 2: 1 / 2, 3: 2 / 3, 10: 2 / 3}
    )
    assert precisions_at(list("xyz"), {"a"}, set(), (1, 5)) == {1: 0, 5: 0}


def write_lists(folder: Path, name: str, query: str, **lists: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_query.txt").write_text(query)
    for kind in ("good", "ok", "junk"):
        (folder / f"{name}_{kind}.txt").write_text(lists.get(kind, ""))


def test_lists_of_oxford(tmp_path: Path) -> None:
    write_lists(
        tmp_path / "lab", "hall_1", "oxc1_hall_01 1.5 2 30 40\n", good="hall_01\nhall_02\n", ok="hall_03", junk="x\n\n"
    )
    truth = read_lists(tmp_path / "lab")
    assert (truth.name, truth.images, truth.cases) == ("oxford5k", None, (WHOLE,))
    (query,) = truth.queries
    assert (query.name, query.image, query.box) == ("hall_1", "hall_01", (1.5, 2, 30, 40))
    assert query.judged[WHOLE].positives == {"hall_01", "hall_02", "hall_03"}
    assert query.judged[WHOLE].junk == {"x"}
    assert truth.listed() == {"hall_01", "hall_02", "hall_03", "x"}
    assert is_buildings(tmp_path) and is_buildings(tmp_path / "lab") and not is_buildings(tmp_path / "none")


def test_lists_of_paris_have_no_prefix(tmp_path: Path) -> None:
    write_lists(tmp_path, "louvre_1", "paris_louvre_000135 1 2 3 4", good="paris_louvre_000135")
    (truth,) = find_ground_truths(tmp_path)
    assert (truth.name, truth.queries[0].image) == ("paris6k", "paris_louvre_000135")
    assert len(DAMAGED_IN_PARIS) == 20 and "paris_pantheon_000960" in DAMAGED_IN_PARIS


@pytest.mark.parametrize(
    "line", ["", "oxc1_a 1 2 3", "oxc1_a 1 2 3 four", "oxc1_a 5 2 3 4", "oxc1_a 1 nan 3 4", "a 1 2 3 4\nb 1 2 3 4"]
)
def test_a_query_that_does_not_parse(tmp_path: Path, line: str) -> None:
    write_lists(tmp_path, "a_1", line)
    with pytest.raises(InputError, match=r"a_1_query\.txt, line 1: .*IMAGE LEFT TOP RIGHT BOTTOM"):
        read_lists(tmp_path)


def test_a_list_that_does_not_parse_or_is_missing(tmp_path: Path) -> None:
    write_lists(tmp_path, "a_1", "a 1 2 3 4", good="a\n\nb c\n")
    with pytest.raises(InputError, match=r"a_1_good\.txt, line 3: .*'b c'"):
        read_lists(tmp_path)
    (tmp_path / "a_1_good.txt").unlink()
    with pytest.raises(InputError, match=r"a_1_good\.txt is not there"):
        read_lists(tmp_path)
    (tmp_path / "a_1_good.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"a_1_good\.txt can't be read as text"):
        read_lists(tmp_path)


def revisited(as_array: bool = False) -> dict[str, Any]:
    def indexes(*values: int) -> Any:
        return np.array(values, dtype=np.int64) if as_array else list(values)

    entry = {"bbx": [1.0, 2.0, 30.5, 40.0], "easy": indexes(0, 1), "hard": indexes(2), "junk": indexes(3)}
    empty = {**entry, "easy": indexes()}
    return {"imlist": ["a", "b", "c.jpg", "d", "e"], "qimlist": ["q", "r"], "gnd": [entry, empty]}


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("protocol", range(6))
def test_revisited_pickles(tmp_path: Path, protocol: int, as_array: bool) -> None:
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(revisited(as_array), protocol))
    truth = read_gnd(path)
    assert (truth.name, truth.images, truth.cases) == ("roxford5k", ("a", "b", "c", "d", "e"), ("easy", "medium", "hard"))
    judged = {case: (set(one.positives), set(one.junk)) for case, one in truth.queries[0].judged.items()}
    assert judged == {"easy": ({"a", "b"}, {"c", "d"}), "medium": ({"a", "b", "c"}, {"d"}), "hard": ({"c"}, {"a", "b", "d"})}
    assert truth.queries[0].image == "q" and truth.queries[0].box == (1.0, 2.0, 30.5, 40.0)
    assert not truth.queries[1].judged["easy"].positives
    assert [one.name for one in find_ground_truths(tmp_path)] == ["roxford5k"]


class Shout:
    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps({**revisited(), "more": Shout()}))
    with pytest.raises(InputError, match=r"builtins\.print"):
        find_ground_truths(tmp_path)
    assert not capsys.readouterr().out


def spoil(place: list[Any], value: Any) -> dict[str, Any]:
    content = revisited()
    part: Any = content
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "imlist, qimlist and gnd are expected; there is a list"),
        ({"imlist": []}, "there is imlist"),
        (spoil(["imlist", 1], 5), "names of images"),
        (spoil(["qimlist"], ["q"]), "1 names in qimlist and 2 entries"),
        (spoil(["gnd", 0], 5), r"gnd\[0\] should be a dict"),
        (spoil(["gnd", 1, "bbx"], [1, 2, 3]), r"gnd\[1\]: bbx"),
        (spoil(["gnd", 1, "bbx"], [5, 2, 3, 9]), r"gnd\[1\]: bbx"),
        (spoil(["gnd", 1, "hard"], [1, 5]), r"gnd\[1\]: 'hard' holds 5; .*5 names"),
        (spoil(["gnd", 1, "junk"], [-1]), r"'junk' holds -1"),
        (spoil(["gnd", 1, "junk"], None), r"'junk' should be a list"),
        (spoil(["gnd", 1], {"bbx": [1, 2, 3, 4], "ok": [0], "junk": []}), "one kind"),
    ],
)
def test_gnd_that_is_not_of_the_form(tmp_path: Path, content: Any, message: str) -> None:
    for path, written in (("gnd_a.json", json.dumps(content).encode()), ("gnd_a.pkl", pickle.dumps(content))):
        (tmp_path / path).write_bytes(written)
        with pytest.raises(InputError, match=message):
            read_gnd(tmp_path / path)
    (tmp_path / "gnd_a.json").write_text("{")
    with pytest.raises(InputError, match=r"gnd_a\.json can't be read as JSON"):
        read_gnd(tmp_path / "gnd_a.json")


@needs_real
def test_real_lists() -> None:
    (truth,) = find_ground_truths(REAL)
    assert truth.name == "oxford5k" and len(truth.queries) == 10
    assert all(len(query.judged[WHOLE].positives) == 5 for query in truth.queries)
    assert all(query.image in query.judged[WHOLE].positives for query in truth.queries)


@needs_real
@pytest.mark.parametrize(("name", "images"), [("oxford5k", 5063), ("paris6k", 6392)])
def test_real_complete_ground_truth(name: str, images: int) -> None:
    """Both sets as they are published; the same read from JSON and from a pickle of it."""
    path = REAL / "full_gnd" / f"gnd_{name}.json"
    truth = read_gnd(path)
    assert (truth.name, len(truth.images or ()), len(truth.queries)) == (name, images, 55)
    assert any(query.judged[WHOLE].junk for query in truth.queries)
    assert not DAMAGED_IN_PARIS.intersection(truth.images or ())
    rng = np.random.default_rng(0)
    for query in truth.queries[:5]:
        judged, ranked = query.judged[WHOLE], list(rng.permutation(truth.images or ()))
        expected = oxford_program(ranked[:800], set(judged.positives), set(judged.junk))
        assert average_precision(ranked[:800], judged.positives, judged.junk) == pytest.approx(expected)
