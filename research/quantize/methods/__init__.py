"""Ways to quantise the blocks of a language model, for `research.quantize.calibration.calibrate`, by name.

Each is a frozen dataclass of its settings, called with a `Problem`; `build("cbq:epochs=5")` makes one from a text.
"""

import dataclasses

from research.core import overrides
from research.core.errors import UserError
from research.quantize.calibration import Method
from research.quantize.methods.awq import Awq
from research.quantize.methods.brecq import Brecq
from research.quantize.methods.cbq import Cbq
from research.quantize.methods.gptq import Gptq
from research.quantize.methods.nearest import Nearest
from research.quantize.methods.omniquant import Omniquant
from research.quantize.methods.smoothquant import Smoothquant

METHODS = {
    "rtn": Nearest,
    "smoothquant": Smoothquant,
    "gptq": Gptq,
    "awq": Awq,
    "omniquant": Omniquant,
    "brecq": Brecq,
    "cbq": Cbq,
}


def build(text: str) -> Method:
    """The method of `gptq` or `cbq:window=1,overlap=0`, its options typed by their defaults.

    Raises:
      UserError: a method or an option that there is not, or a value of another type.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise UserError(f"method {name!r} is none of {', '.join(METHODS)}")
    fields = {field.name: field.default for field in dataclasses.fields(METHODS[name])}
    chosen = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in fields or not equals:
            raise UserError(f"method {name} has no option {item!r}; write {' or '.join(f'{f}=…' for f in fields)}")
        chosen[key] = overrides.parse(f"{name}:{key}", value, fields[key])
    return METHODS[name](**chosen)
