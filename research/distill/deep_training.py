"""Deep training of VanillaNet students: the VanillaKD experiment with the slope of their activations annealed.

Source: arXiv 2305.12972, section 3.1; `research.backbones.vanillanet` says what the slope does. `config.slope` has
`decay_epochs` and `curve`. Beside each such student `<arm>` the evaluation scores its merged form as `<arm>_deploy`,
which the final weights hold too; the two agree from the end of the annealing on. With a teacher this is also how the
official detectors' backbone was trained (arXiv 2305.15781).
"""

import functools

from research import backbones
from research.backbones import classify, vanillanet
from research.core import experiment as engine
from research.core.scheduled import scheduled
from research.distill import vanilla_kd


def experiment(config, labels=None) -> engine.Experiment:
    """The Experiment of `vanilla_kd.experiment`, with slopes; the metric `slope` is that of the step.

    Raises:
      ValueError: no student is a VanillaNet in its train form, and what `vanilla_kd.experiment` raises.
    """
    made, deployed = vanilla_kd.experiment(config, labels), {}
    for name, student in config.students.items():
        if _annealed(student):
            options = {**student.options, "dtype": student.dtype, "deploy": True}
            deployed[name] = classify.network(student.model, config.data.num_classes, config.augment.size, **options)
    if not deployed:
        raise ValueError(
            "students: none is a VanillaNet in its train form; set experiment='research.distill.vanilla_kd' for others"
        )
    slope = functools.partial(vanillanet.slope, steps_per_epoch=config.steps_per_epoch, **config.slope)
    annealed = scheduled(made, lambda step: {n: {"model": {"schedule": {"slope": slope(step)}}} for n in deployed})

    def train_step(state, batch):
        new, metrics = annealed.train_step(state, batch)
        return new, metrics | {"slope": engine.scalar(slope(state.step))}

    def merged(params, model_state, name):
        return vanillanet.merge({"params": params[name]["model"], **model_state[name]["model"]})

    def eval_step(state, batch):
        metrics = annealed.eval_step(state, batch)
        images = classify.unit(batch["image"])
        averages = {"": (state.params, state.model_state)}
        averages |= {f"{name}/": (average["params"], average["model_state"]) for name, average in state.ema.items()}
        for prefix, (params, model_state) in averages.items():
            for name, network in deployed.items():
                logits, _, _ = network.apply(merged(params, model_state, name)["params"], {}, images)
                found = classify.accuracy(logits, batch["label"], batch["mask"])
                metrics |= {f"{prefix}{name}_deploy/{key}": value for key, value in found.items()}
        return metrics

    def export(state):
        models = dict(annealed.export(state))
        for name in [name for name in models if name.rsplit("_ema", 1)[0] in deployed]:
            models[f"{name}_deploy"] = vanillanet.merge(models[name])
        return models

    return annealed._replace(train_step=train_step, eval_step=eval_step, export=export)


def _annealed(student) -> bool:
    return (
        backbones.family(student.model) is vanillanet and not backbones.create(student.model, **student.options).deploy
    )
