"""What `train` returns, and rows of results: a path that is more than a path, tables in pandas, HTML of bounded size."""

import copy
import os
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ranks_helper import At
from small_runs import train_small

import deepcluster
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.info import info

VOID = {"img", "br", "hr", "circle", "polyline"}


class Balanced(HTMLParser):
    """Fails where tags are not closed in order; collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.text = list[str](), ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(html: str) -> str:
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser.text


def test_a_run_is_a_path(trained: Path, tmp_path: Path) -> None:
    run = deepcluster.Run(trained)
    plain = Path(str(trained))
    assert run == plain and plain == run and hash(run) == hash(plain) and isinstance(run, Path)
    assert os.fspath(run) == str(run) == f"{run}" == str(plain)
    for derived in (run / "x", run.parent, run.with_name("x"), next(run.iterdir()), next(run.glob("*.json"))):
        assert type(derived) is type(plain)
    for twin in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run), deepcluster.Run(run)):
        assert type(twin) is deepcluster.Run and twin == run
    with pytest.raises(InputError, match="is not a run folder"):
        deepcluster.Run(tmp_path)


def test_a_run_has_its_results(trained: Path, images: Path) -> None:
    run = deepcluster.Run(trained)
    assert run.settings == deepcluster.load(trained).settings == run.model().settings
    frame, lines = run.metrics.to_pandas(), pd.read_json(run / "metrics.jsonl", lines=True, precise_float=True)
    assert frame["loss"].tolist() == lines["loss"].tolist() == [line["loss"] for line in run.metrics]
    assert frame["seconds.training"].tolist() == [seconds["training"] for seconds in lines["seconds"]]
    table = pd.read_parquet(run / "assignments" / "epoch-0003.parquet")
    pd.testing.assert_frame_equal(run.clusters.to_pandas(), table)
    assert re.fullmatch(r"Run\('.*': alexnet-small at 16 px, 5 clusters, 2 of 2 epochs\)", repr(run))
    text = text_of(run._repr_html_())
    assert "2 of 2 epochs" in text and "60 images" in text and f"{run.metrics[-1]['loss']:.3g}" in text
    assert f"{run.metrics[-1]['loss']:.3f}" in text_of(run.metrics._repr_html_())


def test_rows_are_a_sequence_and_a_frame(trained: Path, images: Path) -> None:
    clusters, features = deepcluster.assign(trained, images), deepcluster.embed(trained, images)
    assert len(clusters) == len(features) == 60
    frame = clusters.to_pandas()
    assert frame["name"].tolist() == clusters.names and frame["cluster"].tolist() == clusters.cluster_N.tolist()
    pd.testing.assert_frame_equal(pd.DataFrame(clusters)[["name", "cluster"]], frame[["name", "cluster"]])
    assert clusters[3] == clusters[clusters.names[3]] == clusters[-57]
    some = clusters[clusters.cluster_N == clusters.cluster_N[0]]
    assert some.names == frame[frame.cluster == frame.cluster[0]].name.tolist()
    assert clusters[5:8].distance_N.tolist() == clusters.distance_N[5:8].tolist()
    assert np.array_equal(np.asarray(features), features.embedding_ND)
    assert features.to_pandas().loc[features.names[7]].tolist() == features.embedding_ND[7].tolist()
    with pytest.raises(KeyError, match="did you mean"):
        clusters[clusters.names[0] + "x"]
    with pytest.raises(IndexError):
        clusters[60]
    assert len(repr(clusters)) < 200 and len(repr(features)) < 200


def test_html_has_pictures_and_stays_small(trained: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(90):  # Noise, which takes most bytes.
        Image.fromarray(draw.integers(0, 256, (120, 130, 3), np.uint8)).save(tmp_path / f"<{number}>&.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    clusters = deepcluster.assign(trained, tmp_path)
    html = clusters._repr_html_()
    assert len(html) < 300_000 and 10 < html.count("<img ") <= 40
    text = text_of(html)
    assert "1 unreadable" in text and "broken.png" in text
    sizes = clusters.to_pandas().query("cluster >= 0").cluster.value_counts()
    assert all(f"{size:,}" in text for size in sizes)
    assert len(deepcluster.embed(trained, tmp_path, limit=5)._repr_html_()) < 10_000
    text_of(clusters[:2]._repr_html_())
    text_of(clusters[:0]._repr_html_())


def test_pictures_of_a_run_are_those_it_was_trained_on(trained: Path) -> None:
    assert deepcluster.Run(trained).clusters._repr_html_().count("<img ") >= 5


def test_without_pandas(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        deepcluster.Run(trained).metrics.to_pandas()


def test_a_model_without_training_is_a_run_too(trained: Path, tmp_path: Path) -> None:
    run = deepcluster.import_file(trained / "checkpoints" / "last.pt", out=tmp_path / "imported")
    assert isinstance(run, deepcluster.Run)
    assert not run.metrics and "alexnet-small" in repr(run)
    text_of(run._repr_html_())
    with pytest.raises(InputError, match="no clusters"):
        _ = run.clusters


def test_a_run_that_is_resumed_shows_its_newest_clusters(images: Path, tmp_path: Path) -> None:
    """A run of one epoch is resumed to four and stopped in the last one: no command shows the clusters of the first end."""
    run = deepcluster.Run(train_small(images, tmp_path / "run", epochs=1))
    first_end = pd.read_parquet(run / "clusters.parquet")
    with pytest.raises(Interrupted):
        train_small(images, run, epochs=4, resume=True, reporter=At("epoch 4", 1))
    newest = max((run / "assignments").iterdir())
    expected = pd.read_parquet(newest)
    assert not expected.equals(first_end)
    pd.testing.assert_frame_equal(run.clusters.to_pandas(), expected)
    assert str(newest) in info(str(run))
    np.testing.assert_array_equal(deepcluster.compare([run, newest]).agreements[0].nmi, 1)
    assert deepcluster.name_clusters(run).sizes_K.tolist() == np.bincount(expected["cluster"], minlength=5).tolist()
    train_small(images, run, epochs=4, resume=True)
    assert (run / "clusters.parquet").read_bytes() == max((run / "assignments").iterdir()).read_bytes()
    pd.testing.assert_frame_equal(run.clusters.to_pandas(), pd.read_parquet(run / "clusters.parquet"))
