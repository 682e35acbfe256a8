"""Every method on one pair: CIFAR-100 by the protocol of the distillation literature, CIFAR-10 subsets in small.

All arms of a pair share data, order, augmentation, initial weights, optimiser and the teacher's forward pass, and each
has the weights and temperatures that its authors published for CIFAR (`ARMS`); nothing is tuned here.

Command:    python -m launch.sweep --config configs/distill/cifar_compare.py:pair=resnet20-resnet8 \\
              --sweep.seed=0,1,2 --workdir runs/compare --config.data.path=cifar10.zip \\
              --config.teacher.workdir=runs/compare-teacher --report
            (":pair=" one of PAIRS, ":arms=kd+dkd" some of ARMS; ":teacher" trains the teacher; ":smoke")
Hardware:   small pairs (16x16 pixels): 2 CPU cores, times in research/distill/README.md; CIFAR-100 pairs: 1 GPU, about
            3 hours for a dozen arms together (estimated at 15 % MFU; not run here)
Data:       {train,test}/<class>/<n>.png or .jpg in a zip or a folder
Published:  research/distill/README.md (CIFAR-100, best epoch); nothing of the small pairs' size
"""

from configs import common
from research.core.config import parse_arg

# Names as in the literature's tables -> losses with the weights published for CIFAR (mdistiller's, else the authors').
ARMS = {
    "none": {},
    "kd": dict(loss="kd", loss_options=dict(temperature=4.0), label_weight=0.1, loss_weight=0.9),
    "dkd": dict(loss="dkd", loss_options=dict(temperature=4.0, alpha=1.0, beta=8.0)),
    "dist": dict(loss="dist", loss_options=dict(temperature=4.0, beta=2.0, gamma=2.0)),
    "nkd": dict(loss="nkd", loss_options=dict(temperature=1.0, gamma=1.5)),
    "wsld": dict(loss="wsld", loss_options=dict(temperature=4.0, alpha=2.25)),
    "lskd": dict(loss="lskd", loss_options=dict(temperature=2.0), label_weight=0.1, loss_weight=9.0),
    "mlld": dict(loss="mlld", label_weight=0.0),
    "multilevel": dict(loss="multilevel", label_weight=0.1, loss_weight=0.9),
    "ctkd": dict(hint="ctkd", label_weight=0.1, hint_weight=0.9),
    "dot": dict(
        loss="kd",
        loss_options=dict(temperature=4.0),
        label_weight=0.1,
        loss_weight=0.9,
        optimizer=dict(name="dot", delta=0.075),
    ),
    "fitnet": dict(hint="fitnet", hint_weight=100.0),
    "at": dict(hint="at", hint_weight=1000.0),
    "sp": dict(hint="sp", hint_weight=3000.0),
    "cc": dict(hint="cc"),
    "vid": dict(hint="vid"),
    "rkd": dict(hint="rkd"),
    "pkt": dict(hint="pkt", hint_weight=30000.0),
    "srrl": dict(hint="srrl"),
    "ofd": dict(hint="ofd", hint_weight=1e-3),
    "nst": dict(hint="nst", hint_weight=50.0),
    "crd": dict(hint="crd", hint_weight=0.8),
    "review": dict(hint="review", hint_weight=5.0, hint_options=dict(warmup_epochs=20.0)),
    "ofa": dict(loss="ofa", hint="ofa", loss_options=dict(eps=1.0), hint_options=dict(eps=1.0)),
}
LOGITS = ("none", "kd", "dkd", "dist", "nkd", "lskd", "ctkd")
ANY = ("fitnet", "rkd", "pkt", "sp", "crd")  # for any two networks
ALIKE = (*LOGITS, "at", *ANY)
UNLIKE = (*LOGITS, *ANY, "ofa")
TAPS = {"ofa": dict(stages=(2, 3, 4), student=("stage1", "stage2", "stage3"))}
TOKEN_TAPS = {
    "ofa": dict(student=("block01", "block02", "block03", "block04")),
    "fitnet": dict(student="block02"),
    "sp": dict(student="block04", teacher="stage3"),
}
# What mdistiller chose pair by pair, where it is not what `ARMS` says.
BETAS = {"resnet56-resnet20": 2.0, "resnet110-resnet32": 2.0}
REVIEWS = {"resnet56-resnet20": 0.6, "resnet110-resnet32": 1.0}
VIT = dict(img_size=16, patch_size=4, embed_dim=64, depth=4, num_heads=2)
SMALL = dict(layers=(1, 1, 1), channels=(4, 4, 8), stem_width=4)
EPOCHS = {"small": 6.0, "cifar100": 240.0}
PAIRS = {
    "resnet20-resnet8": "small",
    "resnet20-vit": "small",
    **dict.fromkeys(("resnet56-resnet20", "resnet110-resnet32", "resnet32x4-resnet8x4"), "cifar100"),
}


def recipe(kind: str):
    """The literature's CIFAR protocol without models; "small" is its shape in 6 epochs of 16x16 pixels."""
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = 64
    c.epochs = EPOCHS[kind]
    c.data.kind, c.data.path = ("zip", "") if kind == "small" else ("folder", "cifar100")
    c.augment.crop, c.augment.pad = "pad", 2 if kind == "small" else 4
    c.augment.size = c.eval.size = 16 if kind == "small" else 32
    c.eval.crop = 1.0
    c.eval.every = c.save.every = c.epochs / 6
    c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay = "sgd", 0.05, 5e-4
    c.schedule.name, c.schedule.min_lr, c.schedule.warmup_epochs = "multistep", 0.0, 0.0
    c.schedule.milestones = tuple(c.epochs * share for share in (0.625, 0.75, 0.875))
    return c


def _arm(name: str, pair: str, smoke: bool):
    student, kind = pair.split("-")[1], PAIRS[pair]
    tokens = student == "vit"
    options = {**VIT, **(dict(embed_dim=8) if smoke else {})} if tokens else SMALL if smoke else {}
    arm = {"model": "vit_tiny_patch16_224" if tokens else student, "options": options, "label_loss": "ce", **ARMS[name]}
    more = dict((TOKEN_TAPS if tokens else TAPS).get(name, {}))
    if name == "dkd" and kind == "cifar100":
        arm["loss_options"] = {**arm["loss_options"], "beta": BETAS.get(pair, 8.0)}
        arm["schedule"] = dict(loss_weight=((0, 0.05), (19, 1.0)))
    if name == "review":
        arm["hint_weight"] = REVIEWS.get(pair, 5.0)
        more["warmup_epochs"] = EPOCHS[kind] / 12
    if name == "crd" and kind == "small":
        more["negatives"] = 16 if smoke else 256  # of some ten thousand examples
    arm["hint_options"] = {**arm.get("hint_options", {}), **more}
    if tokens:
        arm["optimizer"] = dict(name="adamw", lr=1e-3, weight_decay=0.05)
    return common.student(arm.pop("model"), **arm)


def get_config(arg: str = ""):
    options = parse_arg(arg, pair="resnet20-resnet8", arms="", teacher=False, smoke=False)
    if options.pair not in PAIRS:
        raise ValueError(f"config argument pair: no pair {options.pair!r}; there are {', '.join(PAIRS)}")
    kind = PAIRS[options.pair]
    teacher, student = options.pair.split("-")
    small = SMALL if options.smoke else {}
    c = recipe(kind)
    if options.teacher:
        c.epochs = 24.0 if kind == "small" else c.epochs
        c.schedule.milestones = tuple(c.epochs * share for share in (0.625, 0.75, 0.875))
        c.students = common.arms(teacher=common.student(teacher, label_loss="ce", options=small))
        c.teacher = common.teacher()
    else:
        names = options.arms.split("+") if options.arms else UNLIKE if student == "vit" else ALIKE
        if unknown := [name for name in names if name not in ARMS]:
            raise ValueError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
        c.students = common.arms(**{name: _arm(name, options.pair, options.smoke) for name in names})
        if "mlld" in names:
            c.augment.strong = "rand-m10-n2"
        recipe_of = f"configs/distill/cifar_compare.py:pair={options.pair},teacher"
        c.teacher = common.teacher(teacher, recipe=recipe_of, options=small)
    if options.smoke:
        c = common.smoke(c, size=16)
        c.schedule.name = "cosine"
    return c
