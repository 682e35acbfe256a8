"""Ways to quantise the blocks of a language model, for `research.quantize.calibration.calibrate`, by name.

Each is a frozen dataclass of its settings, called with a `Problem`.
"""

from research.quantize.methods.cbq import Cbq
from research.quantize.methods.gptq import Gptq
from research.quantize.methods.nearest import Nearest

METHODS = {"rtn": Nearest, "gptq": Gptq, "cbq": Cbq}
