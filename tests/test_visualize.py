"""`visualize` on the command line: the pictures of a run, in its report, and wrong input."""

import json
from pathlib import Path

import pytest
from models_helper import write_classes
from PIL import Image
from small_runs import train_small

from deepcluster.cli import main
from deepcluster.core.files import MARK
from deepcluster.core.progress import Reporter
from deepcluster.visualization.report.command import report


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("visualize")
    train_small(write_classes(place / "images", 6), place / "run", epochs=1)
    return place


def visualize(*words: str | Path) -> int:
    return main([str(word) for word in ("visualize", *words, "-q")])


def test_pictures_of_a_run_are_in_its_folder_and_in_its_report(place: Path) -> None:
    pytest.importorskip("plotly", reason="the report needs: pip install jinja2 plotly")
    run, images = place / "run", place / "images"
    assert visualize("filters", run, "--stage", "conv2,conv3", "--channels", "0-3", "--steps", "2") == 0
    assert (
        visualize("top-images", run, "--data", images, "--channels", "0-3", "--count", "2", "--copies", place / "copies")
        == 0
    )
    for stage in ("conv2", "conv3"):
        assert sorted(path.name for path in (run / "visualization" / "filters" / stage).iterdir()) == [
            MARK,
            *(f"000{number}.png" for number in range(4)),
            "filters.json",
            "grid.png",
        ]
    found = json.loads((run / "visualization" / "top-images" / "conv5" / "top-images.json").read_text())
    assert found["stage"] == "conv5"
    assert set(found["channels"]) | {str(channel) for channel in found.get("dead", [])} == {"0", "1", "2", "3"}
    for image in (best for images_of in found["channels"].values() for best in images_of):
        assert (images / image["name"]).is_file()
    assert any(path.is_file() for path in (place / "copies").rglob("*.png"))
    text = report(run, reporter=Reporter(quiet=True)).read_text()
    titles = ("Filters of conv2", "Filters of conv3", "Images that excite conv5")
    assert [title in text for title in titles] == [True] * 3


def test_any_trunk_has_a_default_stage(place: Path) -> None:
    out = place / "resnet"
    assert visualize("filters", "untrained:resnet18-small", "--channels", "0", "--steps", "1", "--out", out) == 0
    with Image.open(out / "layer4" / "grid.png") as grid:
        assert grid.width >= 32


WRONG = {
    "nowhere to write": (["filters", "untrained:alexnet-small"], "--out"),
    "no such stage": (["filters", "run", "--stage", "conv9"], "no stage 'conv9'"),
    "no such channel": (["top-images", "run", "--data", "images", "--channels", "999"], "256 channels, 0 to 255"),
    "no data": (["top-images", "run", "--data", "nowhere"], "nowhere does not exist"),
    "a full folder of copies": (["top-images", "run", "--data", "images", "--copies", "images"], "not an empty folder"),
    "another objective's setting": (["filters", "run", "--sigma", "1"], "leave it out"),
}


@pytest.mark.parametrize("words, message", WRONG.values(), ids=WRONG)
def test_wrong_input(
    place: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert visualize(*words) == 2
    assert message in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before
