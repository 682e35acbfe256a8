"""How a model's folder states which inputs of layers are rounded, for no layout of other programs does.

`inputs.json` lies beside the weights: for each layer whose inputs have few bits, their number and, where one was
learned, the step: `{"layers_0/mlp/up_proj": {"bits": 8, "step": 0.0173}}`. Tokens without a step are rounded each by
its largest magnitude. Other programs do not read the file and leave inputs as they are.
"""

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from research.core import storage
from research.quantize import rules
from research.quantize.rules import Rule

FILE = "inputs.json"


def write(folder: storage.Path, params: Mapping, settings: Sequence[Rule], steps: Mapping[str, np.ndarray]) -> None:
    """States what `settings` and the learned `steps` say of the layers of `params`; no file where nothing is rounded.

    Args:
      steps: by layer path, float32, as `calibration.Calibrated` has them.
    """
    found = {
        layer: {"bits": rule.activation_bits}
        | ({"step": np.asarray(steps[layer], np.float32).tolist()} if layer in steps else {})
        for layer, rule in rules.match(params, settings).items()
        if rule.activation_bits
    }
    if found:
        storage.write(folder / FILE, json.dumps(found, indent=2))
    else:
        (folder / FILE).unlink(missing_ok=True)


def read(folder: storage.Path) -> tuple[tuple[Rule, ...], dict[str, np.ndarray]]:
    """(rules, steps) for `rules.apply`; both empty where inputs stay.

    Raises:
      ValueError: a damaged file.
    """
    file = folder / FILE
    if not file.is_file():
        return (), {}
    try:
        stated = json.loads(file.read_text())
        settings = tuple(Rule(f"^{re.escape(layer)}$", activation_bits=own["bits"]) for layer, own in stated.items())
        return settings, {k: np.asarray(own["step"], np.float32) for k, own in stated.items() if "step" in own}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no intact statement of bits and steps ({error}): write the folder again") from None
