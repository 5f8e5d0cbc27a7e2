"""Readers of masks: each layout on small drawn folders, and on real data against readers that nobody here wrote."""

from pathlib import Path

import numpy as np
import pytest

from deepcluster.evaluation.datasets.masks import open_masks

DATA = Path(__file__).parents[2] / "shared" / "data"
VOC = DATA / "voc-from-coco"
needs_voc = pytest.mark.skipif(not VOC.is_dir(), reason="no ../shared/data here")


@needs_voc
@pytest.mark.parametrize("lists", ["val", "test"])
def test_voc_from_coco_is_read_as_by_torchvision(lists: str) -> None:
    from torchvision.datasets import VOCSegmentation

    parts = open_masks(VOC, lists)
    theirs = VOCSegmentation(str(VOC), year="2007", image_set=lists)
    assert len(parts.test) == len(theirs)
    assert parts.test.class_names[15] == "person"
    for index, (image, mask) in enumerate(theirs):
        np.testing.assert_array_equal(parts.test.read_mask(index), np.asarray(mask))
        ours = parts.test.source.path(index)
        assert ours is not None
        assert Path(theirs.images[index]).name == ours.name
        assert image.size == parts.test.read_mask(index).shape[::-1]
