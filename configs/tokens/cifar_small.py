"""Token reduction in small on real photographs: a ViT's tokens by PPT, ToMe and EViT at equal multiply-adds.

Command:    python -m launch.train --config configs/tokens/cifar_small.py:teacher --workdir runs/tokens_dense \\
              --config.data.path=cifar10.zip
            python -m launch.calibrate --run runs/tokens_dense --reduce ppt:r=16,blocks=1+3+4 --share 0.5
            python -m launch.sweep --config configs/tokens/cifar_small.py:threshold=T+T+T --sweep.seed=0,1,2 \\
              --workdir runs/tokens --config.data.path=cifar10.zip --config.teacher.workdir=runs/tokens_dense --report
            (T: thresholds as `calibrate` prints them; ":arms=" some of ARMS joined by "+"; ":keep=0.8" another share
            of the multiply-adds; ":shelf" scores the arms off the shelf, without fine-tuning; ":smoke")
Hardware:   2 CPU cores; on ones that also did other work 26 minutes for the teacher, 28 to 38 for a seed
Data:       {train,test}/<class>/<n>.jpg of 32x32 pixels, 10 classes, in a zip or a folder
Published:  nothing of this size; on ImageNet at about 3 G of 4.6 G: DeiT-S 79.8, PPT 79.8, ToMe 79.4, EViT 79.5

All arms start from the weights of one dense network, which `:teacher` trains (it teaches nobody), and are fine-tuned
alike, `dense` with all tokens. Reductions are as strong as makes their multiply-adds the most that `keep` allows; the
three kinds of PPT remove the same numbers of tokens. Without `threshold` the adaptive ones are left out.
"""

from ml_collections import ConfigDict

from configs import common
from research.backbones import vit
from research.core.config import parse_arg
from research.core.errors import UserError
from research.tokens import budget, evit, ppt, tome

SHAPE = dict(img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=2)
SMALL = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
BLOCKS = (1, 3, 4)  # as deep in the network as 3, 6, 9 of 12, and before the last
PPT = {"ppt": "adaptive", "prune": "prune", "pool": "pool", "reverse": "reverse"}
ARMS = ("dense", *PPT, "tome", "evit")
ADAPTIVE = ("ppt", "reverse")


def reductions(shape: dict, blocks: tuple[int, ...], keep: float) -> dict[str, dict]:
    """Arguments of ppt (without policy and threshold), tome and evit that leave at most `keep` of the multiply-adds."""
    model = vit.build(**shape, num_classes=10)
    most, tokens = keep * budget.macs(model).total, range(1, sum(count for count, _ in budget.tokens(model)))
    spread = lambda total, parts: tuple((total + parts - 1 - part) // parts for part in range(parts))
    # What pooling computes is a little more than what pruning does.
    pooling = lambda total: ppt.reduction(spread(total, len(blocks)), blocks, policy="pool")
    total, _ = budget.solve(model, most, pooling, tokens)
    merged, _ = budget.solve(model, most, lambda total: tome.reduction(spread(total, shape["depth"])), tokens)
    rate, _ = budget.solve(model, most, lambda rate: evit.reduction(rate, blocks), [i / 200 for i in range(1, 200)])
    return {
        "ppt": dict(r=spread(total, len(blocks)), blocks=blocks),
        "tome": dict(r=spread(merged, shape["depth"])),
        "evit": dict(keep_rate=rate, blocks=blocks),
    }


def _reduce(arm: str, found: dict[str, dict], threshold: tuple[float, ...]) -> dict:
    """Plain values of the arm's reduction, as an option of its network."""
    if arm == "dense":
        return {}
    method = "ppt" if arm in PPT else arm
    more = {"policy": PPT[arm]} if arm in PPT else {}
    more |= {"threshold": threshold} if arm in ADAPTIVE else {}
    return {"reduce": dict(method=f"research.tokens.{method}", **found[method], **more)}


def _thresholds(text: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split("+"))
    except ValueError:
        values = ()
    if len(values) not in (1, count):
        raise UserError(f"config argument threshold: {text!r} is not one number, or {count} with + between")
    return values * (count // len(values))


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, arms="", threshold="", keep=0.63, teacher=False, shelf=False, smoke=False)
    shape, blocks = (SMALL, (0, 1)) if options.smoke else (SHAPE, BLOCKS)
    threshold = _thresholds(options.threshold, len(blocks)) if options.threshold else ()
    names = options.arms.split("+") if options.arms else [n for n in ARMS if threshold or n not in ADAPTIVE]
    if unknown := [name for name in names if name not in ARMS]:
        raise UserError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if needy := [name for name in names if name in ADAPTIVE and not threshold]:
        raise UserError(f"config argument threshold: arm {needy[0]!r} needs it; launch.calibrate finds it")
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = 64
    c.epochs = 30.0 if options.teacher else 5.0
    c.data.kind = "zip"
    c.augment.size = c.eval.size = shape["img_size"]
    c.augment.crop, c.augment.pad = "pad", shape["img_size"] // 8
    c.eval.crop = 1.0
    c.eval.every = c.save.every = 5.0
    c.log.every = 52
    c.optimizer.lr, c.optimizer.clip = 1e-3 if options.teacher else 1e-4, 5.0
    c.schedule.warmup_epochs, c.schedule.warmup_lr = 1.0, 1e-6
    c.schedule.min_lr = 0.0
    c.schedule.per_step = True
    student = lambda **more: common.student("vit_tiny_patch16_224", label_loss="ce", **more)
    if options.teacher:
        c.students = common.arms(teacher=student(options=shape))
        c.teacher = common.teacher()
    else:
        found = reductions(shape, blocks, options.keep)
        arm = lambda name: student(options={**shape, **_reduce(name, found, threshold)}, weights="teacher")
        c.students = common.arms(**{name: arm(name) for name in names})
        recipe = "configs/tokens/cifar_small.py:teacher"
        c.teacher = common.teacher("vit_tiny_patch16_224", options=shape, recipe=recipe)
    c = common.smoke(c, size=shape["img_size"]) if options.smoke else c
    if options.shelf:  # one step that changes nothing, then the evaluation
        c.steps, c.optimizer.lr = 1, 0.0
        c.schedule.warmup_epochs = 0.0
    return c
