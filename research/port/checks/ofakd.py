"""Golden checks of OFA-KD: the loss, the branches of every kind of student, schedules, and CKA."""

import jax
import jax.numpy as jnp

from research.core import schedules
from research.distill import cka
from research.distill.ground_truth import cross_entropy
from research.distill.ofa import ofa
from research.distill.ofa_branches import NAMES, Branches
from research.port.checks.common import nchw, nhwc
from research.port.names import from_official, to_official
from research.port.verify import Golden


def check_loss(golden: Golden) -> dict:
    """Losses and gradients for every eps, at each temperature that the file's names state."""
    student, teacher = (jnp.asarray(golden.x[f"logits_{side}"]) for side in ("student", "teacher"))
    labels, found = jnp.asarray(golden.x["target"]), {}
    for key in golden.y:
        name, _, temperature = key.rpartition("_T")
        form = "paper" if name.startswith("paper") else "code"

        def loss(eps, student, temperature=float(temperature), form=form):
            return jnp.mean(ofa(student, teacher, labels, eps=eps, temperature=temperature, form=form))

        function = jax.grad(loss, 1) if name == "grad" else loss
        found[key] = jax.jit(jax.vmap(function, (0, None)))(jnp.asarray(golden.x["eps"]), student)
    return found


def _branches(golden: Golden) -> tuple[Branches, dict[int, jax.Array]]:
    kwargs = golden.kwargs
    stages = kwargs.get("ofa_stage", [1, 2, 3, 4])
    features = {stage: golden.x[f"feat_stage{stage}"] for stage in stages}
    features = {stage: nhwc(x) if x.ndim == 4 else jnp.asarray(x) for stage, x in features.items()}
    width = kwargs["student_stages"]["-1"][1]
    width = width[0] if isinstance(width, list) else width
    prefix = kwargs.get("num_tokens", 0)
    return Branches(width, kwargs["teacher_dim"], kwargs["num_classes"], prefix, dtype=jnp.float64), features


def check_projector(golden: Golden) -> dict:
    """Branch logits in evaluation, and of one training step losses, gradients and running statistics."""
    x, kwargs = golden.x, golden.kwargs
    branches, features = _branches(golden)
    shapes = jax.eval_shape(lambda: branches.init(jax.random.key(0), features))
    weights = jax.tree.map(jnp.asarray, from_official(shapes, golden.w, NAMES))
    params = weights.pop("params")
    labels = jnp.asarray(x["soft_target"] if "soft_target" in x else x["target"])
    eps = kwargs["ofa_eps"] if isinstance(kwargs["ofa_eps"], list) else [kwargs["ofa_eps"]]
    eps = eps * (len(features) + 1) if len(eps) == 1 else eps
    gt_weight, kd_weight, ofa_weight = kwargs.get("weights", [1.0, 1.0, 1.0])
    term = lambda logits, eps: jnp.mean(
        ofa(logits, jnp.asarray(x["logits_teacher"]), labels, eps=eps, temperature=kwargs.get("temperature", 1.0))
    )

    @jax.jit
    def step(params, features, student):
        def loss(params, features, student):
            logits, new = branches.apply({"params": params, **weights}, features, mutable=["batch_stats"])
            parts = {
                "loss_gt": gt_weight * jnp.mean(cross_entropy(student, labels)),
                "loss_kd": kd_weight * term(student, eps[-1]),
                "loss_ofa": ofa_weight * sum(term(z, e) for z, e in zip(logits.values(), eps, strict=False)),
            }
            return sum(parts.values()), (parts, new)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, features, student)

    (total, (parts, new)), (grads, maps, student) = step(params, features, jnp.asarray(x["logits_student"]))
    evaluated = jax.jit(lambda: branches.apply({"params": params, **weights}, features, train=False))()
    found = parts | {"loss": total, "grad_logits_student": student}
    found |= {f"branch_logits_eval_stage{stage}": logits for stage, logits in evaluated.items()}
    found |= {f"grad_feat_stage{stage}": nchw(gradient) for stage, gradient in maps.items()}
    found |= {f"gradw_{name}": value for name, value in to_official({"params": grads}, NAMES).items()}
    found |= {f"new_{name}": value for name, value in to_official(dict(new), NAMES).items()}
    return {key: value for key, value in found.items() if key in golden.y}


def check_lr_schedule(golden: Golden) -> dict:
    """The learning rate during each epoch of every recipe in the file."""

    def rates(key, sched, epochs, **options):
        options = {name: value for name, value in options.items() if value is not None}
        rate = schedules.schedule(sched, steps=epochs * 10, steps_per_epoch=10, **options)
        return jax.vmap(rate)(10 * jnp.arange(golden.y[key].size) + 3)

    return {key: rates(key, **golden.kwargs[key.removeprefix("lr_")]) for key in golden.y}


def check_cka(golden: Golden) -> dict:
    first, second = (jnp.asarray(golden.x[name]) for name in ("X", "Y"))
    batches = [cka.sums([x], [y]) for x, y in zip(first, second, strict=True)]
    total = jax.tree.map(lambda *found: sum(found), *batches)
    return {
        "cka_biased_per_batch": jax.vmap(cka.cka)(first, second),
        "cka_minibatch_unbiased": cka.similarity(total)[0, 0],
    }


CHECKS = {
    "ofa_loss": check_loss,
    "projector_cnn": check_projector,
    "projector_vit": check_projector,
    "projector_swin": check_projector,
    "projector_mlp": check_projector,
    "lr_schedule": check_lr_schedule,
    "cka": check_cka,
}
