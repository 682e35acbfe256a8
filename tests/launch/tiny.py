"""A config of the smallest training there is: a one-block mixer on the embedded digits, a few steps of 16."""

from configs import common


def get_config(arg: str = ""):
    c = common.smoke(common.base(), size=8)
    c.experiment = "research.distill.vanilla_kd"
    c.steps = 4
    small = dict(img_size=8, patch_size=4, embed_dim=8, num_blocks=1)
    c.students = common.arms(small=common.student("mixer_s16_224", options=small, label_loss="ce"))
    c.teacher = common.teacher()
    c.augment.flip = 0.0
    return c
