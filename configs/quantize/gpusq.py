"""What the configs of GPUSQ-ViT share: their sections, and the arms of its two stages."""

from ml_collections import ConfigDict

from configs import common
from research.core.errors import UserError

MODULE = "research.quantize.gpusq"
# What an arm differs in from one that is fine-tuned as it is.
LABELS_ALONE = dict(logit_weight=0.0, feature_weight=0.0)
SPARSE = dict(teacher="teacher_sparse", pattern="2:4", aware=True)
STAGES = {
    "prune": {
        "dense": {},
        "sparse": dict(pattern="2:4"),
        "sparse_labels": dict(pattern="2:4", **LABELS_ALONE),
        "pairs": dict(pattern="4:8"),
    },
    "quantize": {
        "sparse_int8": dict(SPARSE, bits=8),
        "sparse_int4": dict(SPARSE, bits=4),
        "even_int4": dict(SPARSE, bits=4, aware=False),
        "pairs_int4": dict(SPARSE, bits=4, pattern="4:8"),
        "int8": dict(bits=8),
        "int4": dict(bits=4),
    },
}


def arm(model: str, options: dict, dtype: str = "float32", **changes) -> ConfigDict:
    """One arm, which starts from its teacher's weights; `changes` replace these defaults."""
    a = ConfigDict()
    a.model, a.options, a.dtype = model, ConfigDict(options), dtype  # the teacher's network
    a.teacher = "teacher"  # the dense network; "teacher_sparse": teacher.ensemble.sparse
    a.pattern = ""  # of the pruned kernels: 2:4 or 4:8; "": none is pruned
    a.bits = 0  # 8 or 4 of weights and inputs; 0: real numbers
    a.aware = False  # features weigh by what pruning lost, see research.quantize.gpusq.factors
    a.label_weight = 1.0
    a.logit_weight = 10.0
    a.feature_weight = 5.0
    for name, value in changes.items():
        if name not in a:
            raise KeyError(f"an arm has no option {name!r}")
        a[name] = value
    return a


def fill(c: ConfigDict, stage: str, names: str, model: str, options: dict, features: tuple[str, ...], dtype: str):
    """`c` with experiment, losses, teachers and the arms of a stage.

    Args:
      names: of STAGES[stage], joined by "+".
      features: endpoints whose squared differences are taken.
      dtype: of the computation.
    Raises:
      UserError: a stage or an arm that is none.
    """
    if stage not in STAGES:
        raise UserError(f"config argument stage: no stage {stage!r}; there are {', '.join(STAGES)}")
    table = STAGES[stage]
    if unknown := [name for name in names.split("+") if name not in table]:
        raise UserError(f"config argument arms: no arm {unknown[0]!r} of {stage}; there are {', '.join(table)}")
    c.experiment = MODULE
    c.distill = ConfigDict()
    c.distill.features = features
    c.distill.labels = "true"  # or teacher: its most likely classes, without any true ones
    c.distill.smoothing = 0.0  # of the true labels
    c.students = common.arms(**{name: arm(model, options, dtype, **table[name]) for name in names.split("+")})
    c.teacher = common.teacher(model, options=options, dtype=dtype)
    if any(student.teacher != "teacher" for student in c.students.values()):
        c.teacher.ensemble.sparse = common.teacher(model, options=options, dtype=dtype)
    return c
