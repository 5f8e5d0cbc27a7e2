"""The shell scripts around the scripts of 2018: the variables that a user sets, and what is called with them.

`shims` writes them as files, with `$PYTHON` and `$HERE`, the folder of the file.
"""

_ROOT = {"MODELROOT": "$HOME/deepcluster_models"}
_ALEXNET = {**_ROOT, "MODEL": "$MODELROOT/alexnet/checkpoint.pth.tar"}
_VGG16 = {**_ROOT, "MODEL": "$MODELROOT/vgg16/checkpoint.pth.tar"}
_VOC = "/path/to/VOCdevkit/VOC2007"

FrontEnd = tuple[dict[str, str], str]


def _fine_tuning(exp: str, lr: str, finetune: str, halve_every: int) -> FrontEnd:
    """Return a script that fine-tunes with the settings of the paper's own numbers, which came from Caffe; it needs none."""
    variables = {**_ALEXNET, "VOC": _VOC, "EXP": f"$HOME/deepcluster_exp/{exp}", "LR": lr, "BSZ": "16"}
    return (
        variables,
        f"""\
mkdir -p "$EXP"
"$PYTHON" -m deepcluster evaluate voc07-classification "$MODEL" --data "$VOC" --out "$EXP" --train-set \\
    --finetune {finetune} --iterations 150000 --halve-every {halve_every} --lr "$LR" --batch-size "$BSZ" "$@" \\
    2>&1 | tee "$EXP/output.txt"
""",
    )


FRONT_ENDS: dict[str, FrontEnd] = {
    "eval_linear.sh": (
        {
            **_ALEXNET,
            "DATA": "/path/to/imagenet",
            "CONV": "3",
            "EXP": "$HOME/deepcluster_exp/linear_classif",
            "WORKERS": "12",
        },
        """"$PYTHON" "$HERE/eval_linear.py" --model "$MODEL" --data "$DATA" --conv "$CONV" --lr 0.01 --wd -7 \\
    --tencrops --verbose --exp "$EXP" --workers "$WORKERS" "$@"
""",
    ),
    "eval_voc_classif.sh": (
        {**_ALEXNET, "VOCDIR": _VOC},
        """for TRAIN_BATCHNORM in 1 0; do
    "$PYTHON" "$HERE/eval_voc_classif.py" --vocdir "$VOCDIR" --model "$MODEL" --split trainval --fc6_8 1 \\
        --train_batchnorm "$TRAIN_BATCHNORM" "$@"
done
""",
    ),
    "eval_voc_classif_all.sh": _fine_tuning("pascal_all", "0.001", "all", 20000),
    "eval_voc_classif_fc6_8.sh": _fine_tuning("pascal_fc6_8", "0.003", "fc6-8", 5000),
    "eval_retrieval.sh": (
        {
            **_VGG16,
            "DATASETS": "/path/to/datasets",
            "EVAL": "Paris",
            "PCA": "Oxford",
            "DATASETEVAL": "$DATASETS/$EVAL",
            "DATASETPCA": "$DATASETS/$PCA",
            "EVALBINARY": "$DATASETS/evaluation/compute_ap",
            "TEMP": "$HOME/deepcluster_exp/retrieval",
        },
        """run() {
    "$PYTHON" "$HERE/eval_retrieval.py" --model "$MODEL" --eval_binary "$EVALBINARY" --temp_dir "$TEMP" "$@"
}
for STAGE in extract_train train_pca; do
    run --dataset "$DATASETPCA" --dataset_name "$PCA" --stage "$STAGE" "$@"
done
for STAGE in q_features db_features eval; do
    run --dataset "$DATASETEVAL" --dataset_name "$EVAL" --stage "$STAGE" "$@"
done
""",
    ),
    "visu/gradient_ascent.sh": (
        {**_ALEXNET, "ARCH": "alexnet", "CONV": "5", "EXP": "$HOME/deepcluster_exp/gradient_ascent"},
        """# Less noise: --lr 3 --niter 30000 for conv1, --lr 30 --niter 3000 for conv5.
"$PYTHON" "$HERE/gradient_ascent.py" --model "$MODEL" --arch "$ARCH" --conv "$CONV" --exp "$EXP" "$@"
""",
    ),
    "visu/activ-retrieval.sh": (
        {
            **_VGG16,
            "DATA": "/path/to/imagenet/val",
            "CONV": "5",
            "EXP": "$HOME/deepcluster_exp/activ_retrieval",
        },
        """"$PYTHON" "$HERE/activ-retrieval.py" --model "$MODEL" --data "$DATA" --conv "$CONV" --exp "$EXP" "$@"
""",
    ),
    "download_model.sh": (
        _ROOT,
        """export MODELROOT
"$PYTHON" -m deepcluster.interop.release2018 download_model "$@"
""",
    ),
}
