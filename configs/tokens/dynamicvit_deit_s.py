"""DynamicViT on DeiT-S, fine-tuned from DeiT's checkpoint by the authors' script, 30 epochs.

Command:    python -m launch.train --config configs/tokens/dynamicvit_deit_s.py --config.data.path=/data/imagenet \\
              --config.teacher.weights=deit_small_patch16_224.safetensors
            (":keep=0.5" another rate; ":model=deit_base_patch16_224"; ":smoke")
Hardware:   1 H200 about 80 min (estimated at 30 % MFU, if 8000 images a second arrive; not run here)
Published:  top-1 79.32 at 2.98 G multiply-adds, dense 79.8 at 4.60 G; DeiT-B 81.43 at 11.5 G, dense 81.8 at 17.6 G

The dense network teaches itself: the checkpoint is the teacher, and where the student starts. Its predictors learn
with the whole rate from the start; the rest rests for five epochs and then follows with a hundredth of it; class token
and positions stay. All tokens stay in training; the evaluation takes the dropped ones out. The authors computed in
float32 (`--config.students.dynamicvit.dtype=float32`). Both the weights and their moving average are evaluated.
"""

from ml_collections import ConfigDict

from configs import common
from configs.distill import gpt4image, imagenet
from research.core.config import parse_arg
from research.core.errors import UserError

GPUS, SHARE = 8, 128
BLOCKS = (3, 6, 9)
# (expression of parameters, factor on the rate, epoch from which they learn).
GROUPS = (
    (r"score_predictor_\d+/", 1.0, 0.0),
    (r"(^|/)(cls_token|pos_embed)$", 0.0, 0.0),
    (r"", 0.01, 5.0),
)
# What differs from DeiT-S.
MODELS = {
    "deit_small_patch16_224": dict(drop_path=0.0, ratio_weight=2.0),
    "deit_base_patch16_224": dict(drop_path=0.2, ratio_weight=5.0),
}
SMALL = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, model="deit_small_patch16_224", keep=0.7, smoke=False)
    if options.model not in MODELS:
        raise UserError(f"config argument model: no recipe of {options.model!r}; there are {', '.join(MODELS)}")
    own = MODELS[options.model]
    c = gpt4image.strong(gpt4image.recipe(GPUS, SHARE))
    c.epochs = 30.0
    c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay = "adamw", 1e-3, 0.05
    c.optimizer.options = ConfigDict({"groups": GROUPS})
    c.schedule.warmup_epochs, c.schedule.warmup_lr, c.schedule.min_lr = 5.0, 0.0, 1e-6
    c.schedule.warmup_prefix = c.schedule.warmup_reaches = c.schedule.per_step = True
    c.ema = (0.9999,)
    small = SMALL if options.smoke else {}
    reduce = dict(method="research.tokens.dynamicvit", at=(0, 1) if options.smoke else BLOCKS, keep=options.keep)
    student = common.student(
        options.model,
        dtype="float32" if options.smoke else "bfloat16",
        options={"drop_path": own["drop_path"], "reduce": reduce, **small},
        weights="teacher",
        label_loss="ce",
        smoothing=0.1,
        hint="research.tokens.dynamicvit_losses",
        hint_options=dict(keep=options.keep, ratio_weight=own["ratio_weight"], distill_weight=0.5),
        group=SHARE,
    )
    c.students = common.arms(dynamicvit=student)
    c.teacher = common.teacher(options.model, dtype="bfloat16", options=small)
    return imagenet.smoke(c) if options.smoke else c
