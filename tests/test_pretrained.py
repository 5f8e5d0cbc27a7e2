"""Published weights by name, through the libraries' own caches: compared with the libraries themselves."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from http_server import NaughtyServer
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.interop.loading import load
from deepcluster.models.pretrained import _hub_file

SMALL = "shufflenet_v2_x0_5"


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
