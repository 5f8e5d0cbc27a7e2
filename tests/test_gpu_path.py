"""A whole run whose clustering goes the way of a GPU is the same as any other."""

from pathlib import Path

import pyarrow.parquet as pq
from gpu_path import as_on_a_gpu
from small_runs import MEASURED, metrics, tables, train_small

import deepcluster


def test_a_run_whose_clustering_goes_the_way_of_a_gpu(images: Path, trained: Path, tmp_path: Path) -> None:
    with as_on_a_gpu():
        run = train_small(images, tmp_path / "run")
        deepcluster.assign(run, images, out=tmp_path / "gpu.parquet", device="cpu")
    assert tables(run) == tables(trained)
    for one, other in zip(metrics(run), metrics(trained), strict=True):
        assert {name: one[name] for name in one.keys() - MEASURED} == {name: other[name] for name in other.keys() - MEASURED}
    deepcluster.assign(trained, images, out=tmp_path / "cpu.parquet", device="cpu")
    assert pq.read_table(tmp_path / "gpu.parquet").equals(pq.read_table(tmp_path / "cpu.parquet"))
