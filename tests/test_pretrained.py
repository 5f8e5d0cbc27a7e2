"""Published weights by name, through the libraries' own caches: compared with the libraries themselves."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from http_server import NaughtyServer
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.data.resample import Ragged
from deepcluster.data.survey import Survey
from deepcluster.data.views import ClusterView
from deepcluster.interop.loading import load
from deepcluster.models.archs import make_trunk
from deepcluster.models.pretrained import _hub_file, published
from deepcluster.models.trunk import normalise
from deepcluster.run.auto import choose_settings
from deepcluster.run.features import centre_view
from deepcluster.run.settings import Settings
from deepcluster.training.initial import initial_weights

SMALL = "shufflenet_v2_x0_5"
# Of the range of values, such as two of 255 steps of brightness.
LARGEST = 0.01


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of scikit-learn's two photos, of several shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(load_sample_images().images):
        for part, (height, width) in enumerate(((427, 640), (400, 300), (260, 256))):
            Image.fromarray(pixels[-height:, :width]).save(folder / f"{number}-{part}.png")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder of weights; the variable names it for torch itself."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put(hub: Path, entry: Any, **options: Any) -> nn.Module:
    """Write random weights under the name of the published ones; return the network."""
    torch.manual_seed(5)
    network = torchvision.models.get_model(type(entry).__name__.removesuffix("_Weights").lower(), weights=None, **options)
    torch.save(network.state_dict(), hub / entry.url.rpartition("/")[2])
    return network


def opened(photos: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(photos.iterdir())]


def library_features(entry: Any, photos: Path) -> Tensor:
    """What torchvision computes of the images: its loader, its transforms, its network without the last layer."""
    network = torchvision.models.get_model(type(entry).__name__.removesuffix("_Weights").lower(), weights=entry).eval()
    network.fc = nn.Identity()
    with torch.no_grad():
        return network(torch.stack([entry.transforms()(image) for image in opened(photos)]))  # type: ignore[no-any-return]


def test_a_name_gives_what_torchvision_computes_with_its_own_loader_and_transforms(hub: Path, photos: Path) -> None:
    entry = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    put(hub, entry)
    model = load(f"torchvision:{SMALL}@pretrained")
    assert "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1, licence not stated" in model.remark
    assert not model.trained
    ours = torch.from_numpy(deepcluster.embed(model, photos, device="cpu", workers=0).embedding_ND)
    assert cosine_similarity(ours, library_features(entry, photos)).min() > 0.9999


def test_our_own_networks_take_the_weights_of_torchvisions_of_the_same_name(hub: Path) -> None:
    network = put(hub, torchvision.models.ResNet18_Weights.IMAGENET1K_V1)
    trunk = load("resnet18@IMAGENET1K_V1").trunk
    assert all(
        torch.equal(trunk.state_dict()[f"backbone.{key}"], value)
        for key, value in network.state_dict().items()
        if not key.startswith("fc.")
    )


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("resnet50@IMAGENET1K_V3", "did you mean IMAGENET1K_V2"),
        ("alexnet@pretrained", "alexnet has no published weights"),
        ("torchvision:resnet19@pretrained", "did you mean resnet18"),
        ("timm:resnet18.fb@pretrained", "timm has no weights 'fb' of resnet18"),
        ("timm:resnet10d@pretrained", "did you mean resnet"),
        ("torchvision:resnet18@pretraind", "did you mean pretrained.*write torchvision:resnet18@pretrained"),
        ("timm:resnet18@a1_in1k", "write timm:resnet18.a1_in1k@pretrained"),
        ("timm:resnet18.a1_in1k", "write timm:resnet18.a1_in1k@pretrained for published weights"),
        ("custom:mine", "write custom:mine@FILE, or untrained:custom:mine"),
    ],
)
def test_wrong_names_are_answered(name: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load(name)


def test_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").write_bytes(b"")
    with pytest.raises(InputError, match="pretrained") as fault:
        load(f"torchvision:{SMALL}@pretrained")
    assert "published" not in str(fault.value)


def test_what_can_not_be_downloaded_is_one_sentence(hub: Path) -> None:
    with NaughtyServer({}) as server:
        address = server.at("net-0123abcd.pth")
        with pytest.raises(InputError, match=r"could not be read .*404.*TORCH_HOME.*@FILE"):
            _hub_file("torchvision:net@pretrained", address)
    with pytest.raises(InputError, match="refused"):
        _hub_file("torchvision:net@pretrained", address)
    assert not list(hub.iterdir())


def test_downloads_are_checked_kept_and_not_repeated(hub: Path) -> None:
    content = bytes(range(256)) * 1000
    right = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with NaughtyServer({right: content, "net-00000000.pth": content}) as server:
        for _ in range(2):
            assert _hub_file("torchvision:net@pretrained", server.at(right)).read_bytes() == content
        assert server.requests.total() == 1
        with pytest.raises(InputError, match="invalid hash"):
            _hub_file("torchvision:net@pretrained", server.at("net-00000000.pth"))
    assert [path.name for path in hub.iterdir()] == [right]


def test_a_damaged_file_in_the_cache_is_named(hub: Path) -> None:
    entry = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    put(hub, entry)
    path = hub / entry.url.rpartition("/")[2]
    path.write_bytes(path.read_bytes()[:9999])
    with pytest.raises(InputError, match="; delete it, and"):
        load(f"torchvision:{SMALL}@pretrained")


@pytest.mark.parametrize(
    ("network", "weights", "size"),
    [
        ("mobilenet_v3_small", torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1, 224),
        ("efficientnet_b1", torchvision.models.EfficientNet_B1_Weights.IMAGENET1K_V2, 240),  # The crop is 94 % of the side.
        ("efficientnet_b0", torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1, 224),  # Bicubic.
        ("swin_v2_t", torchvision.models.Swin_V2_T_Weights.IMAGENET1K_V1, 256),
    ],
)
def test_what_a_network_sees_is_what_torchvision_shows_it(network: str, weights: Any, size: int, photos: Path) -> None:
    views = published_views(f"torchvision:{network}@{weights.name}", photos)
    assert views.shape[2:] == (size, size)
    compare_views(views, [weights.transforms()(image) for image in opened(photos)])


@pytest.mark.parametrize(
    "name",
    [
        "resnet18.a1_in1k",  # Bicubic, 95 % of the side.
        "resnet50.tv_in1k",  # Bilinear.
        "vit_base_patch16_224.augreg_in21k",  # Mean and deviation of 0.5.
        "vit_base_patch16_clip_224.openai",  # CLIP's own.
        "efficientnet_b3.ra2_in1k",
        "vit_small_patch14_dinov2.lvd142m",  # The whole side.
    ],
)
def test_what_a_network_sees_is_what_timm_shows_it(name: str, photos: Path) -> None:
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config)
    views = published_views(f"timm:{name}@pretrained", photos)
    assert views.shape[2:] == config["input_size"][1:]
    compare_views(views, [transform(image) for image in opened(photos)])


def published_views(name: str, photos: Path) -> Tensor:
    """What the network of published weights is given of images: the view, normalised by their mean and deviation."""
    weights = published(name)
    assert weights is not None
    settings = Settings.from_dict({**weights.settings(), "arch": "resnet18"})
    trunk = make_trunk("resnet18", sobel=False, mean=settings.mean, std=settings.std)
    pixels = [torch.from_numpy(np.array(image)) for image in opened(photos)]
    return trunk.edges(normalise(centre_view(settings)(pixels)))


def compare_views(views_BCHW: Tensor, expected: list[Tensor]) -> None:
    """The same pixels up to rounding: libraries resize in two passes of whole numbers, and pad or cut at half pixels."""
    theirs = torch.stack(expected)
    assert views_BCHW.shape == theirs.shape
    step = theirs.amax() - theirs.amin()
    assert float((views_BCHW - theirs).abs().amax() / step) < LARGEST
    assert cosine_similarity(views_BCHW.flatten(1), theirs.flatten(1)).min() > 0.9999


def test_a_run_starts_from_published_weights(hub: Path, images: Path, tmp_path: Path) -> None:
    entry = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    put(hub, entry)
    said = io.StringIO()
    run = deepcluster.train(
        images,
        out=tmp_path / "run",
        init="torchvision:mobilenet_v3_small@pretrained",
        epochs=1,
        lr=0.0,
        image_size=64,
        clusters=2,
        device="cpu",
        workers=0,
        reporter=Reporter(stream=said),
    )
    config = json.loads((run / "config.json").read_text())
    assert (config["settings"]["arch"], config["settings"]["sobel"]) == ("torchvision:mobilenet_v3_small", False)
    assert config["settings"]["image_size"] == 64  # What the user sets wins.
    assert "licence not stated" in config["weights"]
    assert "the network of the weights" in said.getvalue()
    state, published = load(run).trunk.state_dict(), torch.load(hub / entry.url.rpartition("/")[2], weights_only=True)
    kept = {key: value for key, value in published.items() if not key.startswith("classifier.3") and "running" not in key}
    assert all(torch.equal(state[f"backbone.{key}"], value) for key, value in kept.items() if "num_batches" not in key)


def changes_of(**options: Any) -> dict[str, Any]:
    """Settings that weights fix, without any file."""
    weights = initial_weights(options)
    assert weights is not None
    return {change.option: change.value for change in weights._changes()}


def test_weights_fix_the_form_of_the_images() -> None:
    fixed = changes_of(init="timm:test_vit.r160_in1k@pretrained")
    assert fixed == {
        "arch": "timm:test_vit",
        "sobel": False,
        "image_size": 160,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "crop_pct": pytest.approx(0.95, abs=0.005),
    }
    assert changes_of(init="pretrained")["arch"] == "resnet18"
    assert changes_of(init="pretrained", arch="torchvision:swin_v2_t")["image_size"] == 256
    assert changes_of(init="vgg16@weights.pth") == {"arch": "vgg16"}
    with pytest.raises(InputError, match="leave out --arch"):
        initial_weights({"init": "timm:test_vit@pretrained", "arch": "resnet18"})


def test_the_recipe_is_fitted_around_the_weights() -> None:
    sample = Survey(n_images=800, shorter_side=300, grey_share=0.0, looked_at=800)
    weights = initial_weights({"init": "timm:vit_base_patch16_384@pretrained"})
    assert weights is not None
    for method in ("deepcluster", "deepcluster-v2"):
        for recipe in ("auto", "small-set" if method == "deepcluster" else "v2-small-set"):
            options = {"init": weights.name, "recipe": recipe, "method": method}
            settings, _ = choose_settings(options, sample, device="cpu", weights=weights._changes())
            assert (settings.image_size, settings.sobel, settings.arch) == (384, False, "timm:vit_base_patch16_384")


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does: one file of one repository, and no others."""

    file = b""
    asked: ClassVar[Counter[str]] = Counter()
    path_of_file = "/timm/test_vit.r160_in1k/resolve/main/model.safetensors"

    def do_HEAD(self) -> None:
        Hub.asked[f"{self.command} {self.path}"] += 1
        if self.path != self.path_of_file:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(self.file).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("Content-Length", str(len(self.file)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.file)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


# Both programs with the same cache; timm's own reading of it is the oracle.
WITH_TIMM = """
import sys, time, json, timm, torch
from pathlib import Path
from PIL import Image
import deepcluster
from deepcluster.interop.pretrained import tensors_of
from deepcluster.models.archs import make_trunk
from deepcluster.models.pretrained import published

torch.set_num_threads(1)
name, photos = "timm:test_vit.r160_in1k@pretrained", Path(sys.argv[1])
model = deepcluster.load(name)
ours = torch.from_numpy(deepcluster.embed(model, photos, device="cpu", workers=0).embedding_ND)
net = timm.create_model("test_vit.r160_in1k", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
with torch.no_grad():
    theirs = net(torch.stack([transform(Image.open(path)) for path in sorted(photos.iterdir())]))
small = timm.create_model("test_vit.r160_in1k", pretrained=True, num_classes=0, img_size=96).state_dict()
mine = tensors_of(published(name), make_trunk("timm:test_vit", image_size=96, sobel=False))
try:
    deepcluster.load("timm:test_resnet@pretrained")
    missing = ""
except deepcluster.InputError as fault:
    missing = str(fault)
print(json.dumps({
    "cosine": torch.nn.functional.cosine_similarity(ours, theirs).min().item(),
    "positions": bool((mine["pos_embed"] - small["pos_embed"]).abs().max() < 1e-6),
    "remark": model.remark, "missing": missing,
}))
"""


def test_timms_weights_come_from_the_hub_once_and_are_what_timm_reads(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(6)
    Hub.file = safetensors.torch.save(timm.create_model("test_vit").state_dict())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", WITH_TIMM, str(photos)], capture_output=True, text=True, env=environment, check=False
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cosine"] > 0.9999
    assert found["positions"]
    assert "timm's test_vit.r160_in1k, licence" in found["remark"]
    assert "images of 160 px, bicubic" in found["remark"]
    assert "timm:test_resnet@pretrained: the weights are not in" in found["missing"]
    assert "HF_HOME" in found["missing"]
    assert Hub.asked[f"GET {Hub.path_of_file}"] == 1


@pytest.mark.parametrize("size", [(97, 61), (60, 80), (30, 45)])
def test_bicubic_views_are_pillows(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    view = ClusterView(32, crop_pct=0.9, interpolation="bicubic")
    grid = tuple(view.windows(np.array([size])).grids_B2[0])
    expected = np.asarray(Image.fromarray(pixels).resize(grid[::-1], Image.Resampling.BICUBIC), np.int64)
    top, left = (round((side - 32) / 2) for side in grid)
    expected = expected[top : top + 32, left : left + 32]
    one = view([torch.from_numpy(pixels)])
    assert np.abs(one[0].permute(1, 2, 0).numpy().astype(np.int64) - expected).max() <= 1
    # Many of one size, and images in one piece of memory, are made the same way.
    assert torch.equal(view(torch.from_numpy(np.stack([pixels, pixels])))[1], one[0])
    ragged = Ragged(torch.from_numpy(pixels).view(-1, 3), np.zeros(1, np.int64), np.array([size]))
    assert torch.equal(view(ragged), one)


def test_the_usual_view_is_the_papers_at_every_size() -> None:
    assert all(ClusterView(size).resized == round(size * 256 / 224) for size in range(8, 1025))
    assert ClusterView(8).crop_pct == Settings().crop_pct
