"""A config of the smallest distillation: `tiny`'s mixer with an untrained teacher; `:one` has a single arm."""

from configs import common
from research.core.config import parse_arg
from tests.launch import tiny


def get_config(arg: str = ""):
    options = parse_arg(arg, one=False)
    c = tiny.get_config()
    small = c.students.small.to_dict()
    c.students = common.arms(small=common.student(**small))
    if not options.one:
        cc = {"hint": "cc", "hint_options": {"dim": 4}}
        arms = {"none": {}, "kd": {"loss": "kd"}, "cc": cc}
        c.students = common.arms(**{name: common.student(**small | arm) for name, arm in arms.items()})
    c.teacher = common.teacher("mixer_s16_224", options={**small["options"], "embed_dim": 12})
    c.teacher.weights = "random"
    return c
