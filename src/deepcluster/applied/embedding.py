"""`embed`: the features of images. N images, D features."""

from pathlib import Path

from deepcluster.applied.opening import Data, names_of, opened, output_target, reasons_by_name
from deepcluster.applied.rows import Embeddings
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.run.kept_features import from_kept
from deepcluster.run.model import Model
from deepcluster.run.table_writers import ENDINGS
from deepcluster.run.tables import join_to_table, parts_of_table, result_of, write_array


def embed(
    model: str | Path | Model,
    data: Data,
    *,
    out: str | Path | None = None,
    parts: bool = False,
    return_rows: bool = True,
    stage: str | None = None,
    device: str = "auto",
    batch_size: int = 256,
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Embeddings:
    """Return the features of images, as `deepcluster embed` writes them.

    With `out`, the processes of `torchrun` share the work, and all of them must make the call. Without it, each process that
    makes the call computes all rows by itself.

    Args:
        model: whatever `load` opens, or its result.
        data: any images, not only those of the run.
        out: also write a table (`.parquet`, `.jsonl`: name, embedding, path; `.csv`: a column per number) or an array
            (`.npy`, with the names beside in `.names.txt`).
        parts: `out` is a folder instead, of numbered Parquet files that are one table.
        return_rows: False returns no rows and no names: `out` may be larger than memory. So it is for several processes.
        stage: stage of the trunk, averaged over its map; `Trunk.embed_stage`, which measured best, by default.
        device, batch_size, workers: how the work is done.
        limit: use only this many images, spread evenly.
        reporter: shows progress.

    Raises:
        InputError: model, data, stage or file can't be used.
        Interrupted: Ctrl-C or SIGTERM while `out` was written; the same call continues.
    """
    target = None if out is None else output_target(out, (*ENDINGS, ".npy"), parts=parts, inputs=(model, data))
    with opened(model, data, limit, reporter, shared=out is not None, device=device, workers=workers) as (model, source):
        stage = stage or model.trunk.embed_stage
        one = from_kept(model, model.embedding(stage, batch_size), source, stage)
        if target is None:
            rows, unreadable = model.in_memory(one, source)
            return Embeddings(names_of(source), rows["embedding"], reasons_by_name(unreadable, source, model), images=source)
        with parts_of_table(model, one, source, target, are_result=parts) as made:
            if model.work.ranks.is_main and not parts:
                if target.suffix == ".npy":
                    write_array(made, one, source, target, model.work)
                else:
                    join_to_table(made, source, target, model.work, {})
            names, rows, unreadable = result_of(made, one, source, model.work.ranks, return_rows=return_rows)
        model.work.reporter.say(
            f"{target}: {count_of(len(source), 'row')} of {count_of(rows['embedding'].shape[1], 'number')}"
        )
        return Embeddings(names, rows["embedding"], reasons_by_name(unreadable, source, model), images=source)
