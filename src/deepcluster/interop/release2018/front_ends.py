"""The shell scripts around the scripts of 2018, by name: each begins with the variables that a user sets.

PYTHON and MODELROOT may also be set in the environment.
"""

_START = """\
#!/bin/bash
# {what}
set -e -o pipefail
PYTHON="${{PYTHON:-python}}"
MODELROOT="${{MODELROOT:-${{HOME}}/deepcluster_models}}"
"""
_ALEXNET = 'MODEL="${MODELROOT}/alexnet/checkpoint.pth.tar"\n'
_VGG16 = 'MODEL="${MODELROOT}/vgg16/checkpoint.pth.tar"\n'


def _script(what: str, *parts: str) -> str:
    return _START.format(what=what) + "".join(parts)


def _fine_tuning(what: str, *, exp: str, lr: str, finetune: str, halve_every: int) -> str:
    """Return a script that fine-tunes as the paper's own numbers were made with Caffe; it needs no Caffe."""
    return _script(
        what,
        "# MODEL: a checkpoint, or what `deepcluster import` makes of a caffemodel and its prototxt. No Caffe is needed.\n",
        _ALEXNET,
        f"""\
VOC="VOCdevkit/VOC2007"
EXP="${{HOME}}/deepcluster_exp/{exp}"
LR="{lr}"
BSZ="16"

mkdir -p "${{EXP}}"
${{PYTHON}} -m deepcluster evaluate voc07-classification "${{MODEL}}" --data "${{VOC}}" --out "${{EXP}}" \\
  --finetune {finetune} --iterations 150000 --halve-every {halve_every} --lr "${{LR}}" --batch-size "${{BSZ}}" \\
  --train-set 2>&1 | tee "${{EXP}}/output.txt"
""",
    )


FRONT_ENDS: dict[str, str] = {
    "eval_linear.sh": _script(
        "A linear classifier on one frozen layer of an AlexNet.",
        _ALEXNET,
        """\
DATA="imagenet"
CONV="3"
EXP="${HOME}/deepcluster_exp/linear_classif"

mkdir -p "${EXP}"
${PYTHON} eval_linear.py --model "${MODEL}" --data "${DATA}" --conv "${CONV}" --lr 0.01 --wd -7 --tencrops --verbose \\
  --exp "${EXP}" --workers 12
""",
    ),
    "eval_voc_classif.sh": _script(
        "Fine-tuning of the fully connected layers on Pascal VOC 2007, with and without training BatchNorm's scales.",
        _ALEXNET,
        """\
VOCDIR="VOCdevkit/VOC2007"

for TRAIN_BATCHNORM in 1 0
do
  ${PYTHON} eval_voc_classif.py --vocdir "${VOCDIR}" --model "${MODEL}" --split trainval --fc6_8 1 \\
    --train_batchnorm "${TRAIN_BATCHNORM}"
done
""",
    ),
    "eval_voc_classif_all.sh": _fine_tuning(
        "Fine-tuning of the whole network on Pascal VOC 2007.",
        exp="pascal_all",
        lr="0.001",
        finetune="all",
        halve_every=20000,
    ),
    "eval_voc_classif_fc6_8.sh": _fine_tuning(
        "Fine-tuning of the fully connected layers on Pascal VOC 2007.",
        exp="pascal_fc6_8",
        lr="0.003",
        finetune="fc6-8",
        halve_every=5000,
    ),
    "eval_retrieval.sh": _script(
        "Retrieval on the buildings of one city, with PCA learned on those of the other.",
        "# DATASETS holds the folders Oxford and Paris, each with jpg/ and lab/. Without the program EVALBINARY, average\n"
        "# precision is computed by deepcluster.\n",
        _VGG16,
        """\
DATASETS="datasets"
TEMP="temp"
EVALBINARY="${DATASETS}/evaluation/compute_ap"
EVAL="Paris"
PCA="Oxford"

for STAGE in extract_train train_pca q_features db_features eval
do
  NAME="${EVAL}"
  case "${STAGE}" in extract_train | train_pca) NAME="${PCA}" ;; esac
  ${PYTHON} eval_retrieval.py --model "${MODEL}" --eval_binary "${EVALBINARY}" --temp_dir "${TEMP}" \\
    --dataset "${DATASETS}/${NAME}" --dataset_name "${NAME}" --stage "${STAGE}"
done
""",
    ),
    "visu/gradient_ascent.sh": _script(
        "Pictures that excite the filters of a layer. Less noise: LR 3, NITER 30000 for conv1; LR 30, NITER 3000 for conv5.",
        _ALEXNET,
        """\
ARCH="alexnet"
EXP="${HOME}/deepcluster_exp/filters"
CONV="5"
LR="3"
NITER="1000"

${PYTHON} gradient_ascent.py --model "${MODEL}" --exp "${EXP}" --conv "${CONV}" --arch "${ARCH}" --lr "${LR}" \\
  --niter "${NITER}"
""",
    ),
    "visu/activ-retrieval.sh": _script(
        "The images that excite the filters of a layer most.",
        _VGG16,
        """\
EXP="${HOME}/deepcluster_exp/top_images"
CONV="5"
DATA="imagenet/val"

${PYTHON} activ-retrieval.py --model "${MODEL}" --exp "${EXP}" --conv "${CONV}" --data "${DATA}"
""",
    ),
    "download_model.sh": _script(
        "The released models, into MODELROOT. They are under CC BY-NC 4.0.",
        """\
export MODELROOT
${PYTHON} -m deepcluster.interop.release2018 download_model "$@"
""",
    ),
}
