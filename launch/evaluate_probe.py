"""The protocols of launch.evaluate that probe frozen features: nearest neighbours, few-shot regression, linear probe.

Features are made in batches by one jitted program on one device, and kept on the host; padding is dropped there, so
that every example counts once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.backbones import classify, linear_probe, probe
from research.core import metrics as metrics_lib
from research.core.errors import UserError
from research.data import pipeline, sources, transforms


class Options(NamedTuple):
    """What the protocols leave open.

    Attributes:
      protocol: one of PROTOCOLS; endpoint: whose mean is probed.
      k, temperature: of knn, DINO's.
      shots, seeds: of fewshot, big_vision's: examples of a class, and draws of them.
      l2: strengths; of fewshot, () for big_vision's 1024; of linear, () for a search, or one.
    """

    protocol: str
    endpoint: str = "pooled"
    k: Sequence[int] = (10, 20)
    temperature: float = 0.07
    shots: Sequence[int] = (1, 5, 10, 25)
    seeds: int = 3
    l2: Sequence[float] = ()


class Features(NamedTuple):
    """Features (N, D) float32 of a source and its labels (N,), in its order."""

    values: np.ndarray
    labels: np.ndarray


def measure(
    network: classify.Network,
    variables: dict,
    train: sources.Source,
    test: sources.Source,
    transform: transforms.Eval,
    batch_size: int,
    options: Options,
) -> dict[str, float]:
    """Metrics of one network: `train` is what the probe learns from, `test` what it is asked.

    Raises:
      UserError: labels that `train` lacks.
      ValueError: too few examples, no such endpoint, features that are not finite.
    """
    bank, asked = (
        collect(network, variables, source, transform, batch_size, options.endpoint) for source in (train, test)
    )
    check_labels(bank.labels, asked.labels, train.class_names, options)
    return PROTOCOLS[options.protocol](bank, asked, train.num_classes, options)


def check(train: sources.Source, test: sources.Source, options: Options) -> None:
    """Refuses what a probe cannot learn from or be asked about, as far as it shows before hours of features.

    Raises:
      UserError: the two are the same data, or of other classes, or as `check_labels`.
    """
    # Archives count the classes of each part by itself, so that the last may be missing in the test data.
    if test.class_names != train.class_names[: test.num_classes]:
        differs = "" if train.num_classes < test.num_classes else "; their names differ"
        raise UserError(
            f"--train-split: {train.name} has {train.num_classes} classes, {test.name} has {test.num_classes}{differs}"
        )
    same = len(train) == len(test) and all(
        np.array_equal(train[i]["image"], test[i]["image"]) for i in (0, len(test) // 2, len(test) - 1)
    )
    if same:
        raise UserError(
            f"--train-split: {train.name} is the data that is asked about: give another part, or another --split"
        )
    if train.labels is not None and test.labels is not None:
        check_labels(train.labels, test.labels, train.class_names, options)


def check_labels(train: np.ndarray, test: np.ndarray, names: Sequence[str], options: Options) -> None:
    """Raises UserError for test labels that `train` lacks, ValueError for too few examples for k or the shots."""
    if missing := sorted(set(np.unique(test).tolist()) - set(np.unique(train).tolist())):
        raise UserError(
            f"--train-split: no example of class {names[missing[0]]!r}, which the test data has ({len(missing)} such "
            "classes): no probe can answer it"
        )
    if options.protocol == "knn":
        probe.check_neighbours(options.k, len(train))
    if options.protocol == "fewshot":
        for shots in options.shots:
            probe.check_shots(shots, train, len(names))


def collect(
    network: classify.Network,
    variables: dict,
    source: sources.Source,
    transform: transforms.Eval,
    batch_size: int,
    endpoint: str,
) -> Features:
    """The endpoint, averaged, for every example of a source; raises ValueError for one that is not finite."""
    variables = dict(jax.device_put(variables))
    params = variables.pop("params")

    @jax.jit
    def extract(params, model_state, images):
        return probe.pooled(network.apply(params, model_state, classify.unit(images))[1], endpoint)

    values, labels = [], []
    with pipeline.eval_batches(source, transform, batch_size=batch_size) as batches:
        for batch in batches:
            real = batch["mask"] > 0
            values.append(np.asarray(extract(params, variables, jnp.asarray(batch["image"])))[real])
            labels.append(batch["label"][real])
    found = Features(np.concatenate(values), np.concatenate(labels))
    if not np.isfinite(found.values).all():
        raise ValueError(f"{network.name}: {endpoint} is not finite for some images of {source.name}")
    return found


def knn(bank: Features, asked: Features, num_classes: int, options: Options) -> dict[str, float]:
    """The metrics of `probe.knn`."""
    return probe.knn(*bank, *asked, num_classes, ks=options.k, temperature=options.temperature)


def few_shot(bank: Features, asked: Features, num_classes: int, options: Options) -> dict[str, float]:
    """`<n>shot/top1`, the mean over seeds, its `std` and that of every seed; of several strengths all are given."""
    strengths, found = options.l2 or (1024.0,), {}
    for shots in options.shots:
        scores = {l2: [] for l2 in strengths}
        for seed in range(options.seeds):
            places = probe.few(bank.labels, shots, num_classes, seed)
            fit = probe.least_squares(bank.values[places], bank.labels[places], num_classes)
            for l2, values in scores.items():
                values.append(_accuracy(probe.regressed(fit, asked.values, l2), asked.labels))
        for l2, values in scores.items():
            row = f"{shots}shot" if len(strengths) == 1 else f"{shots}shot_l2={l2:g}"
            found[f"{row}/top1"] = float(np.mean(values))
            found |= {f"{row}/std": float(np.std(values, ddof=1))} if len(values) > 1 else {}
            found |= {f"{row}/seed{seed}": value for seed, value in enumerate(values)}
    return found


def linear(bank: Features, asked: Features, num_classes: int, options: Options) -> dict[str, float]:
    """Metrics of `classify.accuracy`, the strength `l2`, and the `steps` of L-BFGS (1000: not converged).

    Without a strength given, `held_out_top1` is the accuracy that chose it, on a fifth of the bank; the classifier that
    is asked is trained on all of it.
    """
    chosen, found = options.l2, {}
    if not chosen:
        held = linear_probe.held_out(bank.labels)
        scores = {}

        def score(l2):
            fit = linear_probe.logistic(*bank, num_classes, l2, chosen=~held)
            scores[l2] = _accuracy(fit(bank.values[held]), bank.labels[held])
            return scores[l2]

        chosen = (linear_probe.strongest(score),)
        found["held_out_top1"] = scores[chosen[0]]
    fit = linear_probe.logistic(*bank, num_classes, chosen[0])
    logits, labels = jnp.asarray(fit(asked.values)), jnp.asarray(asked.labels)
    metrics = metrics_lib.finish(classify.accuracy(logits, labels, jnp.ones(len(labels))))
    metrics = {name: metrics[name] for name in ("top1", "top5", "loss", "ece")}
    return {**metrics, "l2": float(chosen[0]), **found, "steps": float(fit.steps)}


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(scores.argmax(1) == labels))


PROTOCOLS = {"knn": knn, "fewshot": few_shot, "linear": linear}
