"""Golden checks of the distillation losses that see feature maps and tokens."""

import jax
import jax.numpy as jnp

from research.distill import activations, factors, generation, logits, manifold, maps, relations
from research.distill import standardized as ls
from research.distill.features import mse, srrl
from research.port.checks.common import nchw, nhwc
from research.port.checks.kdlosses_common import DTYPE, keep, part, value_and_gradient, variables
from research.port.checks.kdlosses_common import maps as maps_of
from research.port.verify import Golden


def _of_stages(golden: Golden, loss) -> dict:
    """{"loss", "grad_student_k"} of a scalar loss of the student's and the teacher's maps."""
    teacher = maps_of(golden, "teacher")
    value, gradient = jax.jit(jax.value_and_grad(lambda s: loss(s, teacher)))(maps_of(golden, "student"))
    found = {"loss": value} | {f"grad_student_{k}": nchw(g) for k, g in enumerate(gradient)}
    return keep(golden, found)


def _summed(loss, weights=None):
    """The mean over the batch of the sum over stages of a loss of one stage."""

    def total(student, teacher):
        scales = weights or [1.0] * len(student)
        return sum(w * jnp.mean(loss(s, t)) for w, s, t in zip(scales, student, teacher, strict=True))

    return total


def check_at(golden: Golden) -> dict:
    return _of_stages(golden, _summed(lambda s, t: maps.at(s, t, power=golden.kwargs["p"])))


def check_at_paper(golden: Golden) -> dict:
    return _of_stages(golden, _summed(maps.at_paper, golden.kwargs["weights"]))


def check_nst(golden: Golden) -> dict:
    return _of_stages(golden, _summed(maps.nst))


def check_sp(golden: Golden) -> dict:
    return _of_stages(golden, _summed(relations.sp))


def check_pkt(golden: Golden) -> dict:
    teacher = jnp.asarray(golden.x["teacher"])
    loss = lambda s: relations.pkt(s, teacher, eps=golden.kwargs["eps"])
    return dict(zip(("loss", "grad_student"), value_and_gradient(loss, golden.x["student"]), strict=True))


def check_ab_fsp(golden: Golden) -> dict:
    count = len(maps_of(golden, "student"))
    scales = [3 / 1000 * 2.0 ** (k - count + 1) for k in range(count)]
    ab = _summed(lambda s, t: activations.ab(s, t, margin=golden.kwargs["margin"]), scales)
    losses = {"ab": ab, "fsp": lambda s, t: jnp.mean(maps.fsp(s, t))}
    found = {}
    for name, loss in losses.items():
        value, gradient = jax.jit(jax.value_and_grad(loss))(maps_of(golden, "student"), maps_of(golden, "teacher"))
        found[f"loss_{name}"] = value
        found |= {f"grad_{name}_student_{k}": nchw(g) for k, g in enumerate(gradient)}
    return keep(golden, found)


def check_kdsvd(golden: Golden) -> dict:
    return _of_stages(golden, lambda s, t: jnp.mean(manifold.kdsvd(s, t, count=golden.kwargs["k"])))


def check_manifold(golden: Golden) -> dict:
    kwargs = golden.kwargs
    weights = {"patch": kwargs["w_patch"], "sample": kwargs["w_sample"], "random": kwargs["w_rand"]}
    layers = sum(name.startswith("student_") for name in golden.x)
    student, teacher, drawn = (
        [jnp.asarray(golden.x[f"{name}_{k}"]) for k in range(layers)] for name in ("student", "teacher", "perm")
    )

    def loss(student, **chosen):
        options = {f"{name}_weight": weight for name, weight in chosen.items()}
        pairs = zip(student, teacher, drawn, strict=True)
        return sum(manifold.manifold(s, t, p[: kwargs["K"]], **options) for s, t, p in pairs) / layers

    value, gradient = jax.jit(jax.value_and_grad(lambda s: loss(s, **weights)))(student)
    found = {"loss": value} | {f"grad_student_{k}": g for k, g in enumerate(gradient)}
    for name in weights:
        found[f"loss_{name}"] = loss(student, **{other: w * (other == name) for other, w in weights.items()})
    return keep(golden, found)


def check_vid(golden: Golden) -> dict:
    student, teacher = maps_of(golden, "student"), maps_of(golden, "teacher")
    options = {"variance": golden.kwargs["init_pred_var"], "eps": golden.kwargs["eps"], "dtype": DTYPE}
    modules = [activations.Likelihood(t.shape[-1], **options) for t in teacher]
    inputs = [maps.same_size(s, t)[0] for s, t in zip(student, teacher, strict=True)]
    rules = [(r"^conv0", "0"), (r"^conv1", "2"), (r"^conv2", "4")]
    params = []
    for k, module in enumerate(modules):
        official = part(golden.w, f"regressors.{k}") | {"log_scale": golden.w[f"log_scales.{k}"]}
        params.append(variables(module, official, rules, inputs[k])["params"])

    def loss(params, student):
        total = 0.0
        for module, own, s, t in zip(modules, params, student, teacher, strict=True):
            mean, variance = module.apply({"params": own}, maps.same_size(s, t)[0])
            total += jnp.mean(activations.vid(mean, variance, t))
        return total

    value, (of_params, of_student) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, student)
    found = {"loss": value} | {f"grad_student_{k}": nchw(g) for k, g in enumerate(of_student)}
    found |= {f"grad_log_scale_{k}": g["log_scale"] for k, g in enumerate(of_params)}
    fresh = modules[0].init(jax.random.key(0), inputs[0])["params"]
    return keep(golden, found | {"init_log_scale": fresh["log_scale"][0]})


def check_ft(golden: Golden) -> dict:
    student, teacher, kwargs = nhwc(golden.x["student"]), nhwc(golden.x["teacher"]), golden.kwargs
    normed = lambda name: any(key.startswith(f"{name}.encoder.1.") for key in golden.w)
    paraphraser = factors.Paraphraser(kwargs["k"], batch_norm=normed("paraphraser"), dtype=DTYPE)
    translator = factors.Translator(int(teacher.shape[-1] * kwargs["k"]), batch_norm=normed("translator"), dtype=DTYPE)
    weights = {
        name: variables(module, part(golden.w, name), factors.NAMES, x)
        for name, module, x in (("paraphraser", paraphraser, teacher), ("translator", translator, student))
    }
    known, rebuilt = paraphraser.apply(weights["paraphraser"], teacher, train=False)

    def loss(student):
        own, _ = translator.apply(weights["translator"], student, mutable=["batch_stats"])
        return jnp.mean(factors.factor(own, known, power=kwargs["p1"], order=kwargs["p2"])), own

    (value, own), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    found = {"loss": value, "grad_student": nchw(gradient), "factor_student": nchw(own), "factor_teacher": nchw(known)}
    found |= {"teacher_reconstruction": nchw(rebuilt), "paraphraser_loss": jnp.mean(mse(rebuilt, teacher))}
    return keep(golden, found)


CONNECTOR = [(r"^conv\.", "0."), (r"^bn\.", "1.")]


def check_ofd(golden: Golden) -> dict:
    student, teacher = maps_of(golden, "student"), maps_of(golden, "teacher")
    count = len(student)
    margins = [
        activations.margins(*(jnp.asarray(golden.x[f"teacher_bn_{name}_{k}"]) for name in ("weight", "bias")))
        for k in range(count)
    ]
    modules = [activations.Connector(t.shape[-1], dtype=DTYPE) for t in teacher]
    weights = [
        variables(module, part(golden.w, f"connectors.connectors.{k}"), CONNECTOR, student[k])
        for k, module in enumerate(modules)
    ]

    def loss(student):
        total = 0.0
        for k, module in enumerate(modules):
            out, _ = module.apply(weights[k], student[k], mutable=["batch_stats"])
            total += jnp.mean(activations.ofd(out, teacher[k], margins[k])) / 2 ** (count - k - 1)
        return total

    value, gradient = jax.jit(jax.value_and_grad(loss))(student)
    found = {"loss": value} | {f"grad_student_{k}": nchw(g) for k, g in enumerate(gradient)}
    return keep(golden, found | {f"margin_{k}": m[None, :, None, None] for k, m in enumerate(margins)})


def check_mgd(golden: Golden) -> dict:
    student, teacher, kwargs = nhwc(golden.x["student"]), nhwc(golden.x["teacher"]), golden.kwargs
    uniform = nhwc(golden.x["uniform"])
    draw = generation.channel_mask if uniform.shape[1:3] == (1, 1) else generation.spatial_mask
    mask = draw(uniform, kwargs["lambda_"])
    module = generation.Masked(teacher.shape[-1], dtype=DTYPE)
    weights = variables(module, golden.w, generation.NAMES, student, mask)
    loss = lambda s: jnp.mean(generation.mgd(module.apply(weights, s, mask), teacher, alpha=kwargs["alpha"]))
    value, gradient = value_and_gradient(loss, student)
    return keep(golden, {"loss": value, "grad_student": nchw(gradient), "mask": nchw(mask)})


def check_srrl_vitkd(golden: Golden) -> dict:
    return keep(golden, _srrl(golden) | _vitkd(golden))


def _srrl(golden: Golden) -> dict:
    student, teacher, kwargs = nhwc(golden.x["student"]), nhwc(golden.x["teacher"]), golden.kwargs
    module = activations.Connector(teacher.shape[-1], relu=True, dtype=DTYPE)
    weights = variables(module, part(golden.w, "srrl.Connectors"), CONNECTOR, student)
    classifier = jnp.asarray(golden.x["teacher_fc_weight"]).T, jnp.asarray(golden.x["teacher_fc_bias"])
    names = {"alpha": "feature_weight", "beta": "logit_weight"}
    scales = {names[name]: value for name, value in kwargs.items() if name in names}

    def loss(student):
        out, _ = module.apply(weights, student, mutable=["batch_stats"])
        pooled = [jnp.mean(x, axis=(1, 2)) for x in (out, teacher)]
        return jnp.mean(srrl(*pooled, *classifier, **scales))

    value, gradient = value_and_gradient(loss, student)
    return {"loss_srrl": value, "grad_srrl_student": nchw(gradient)}


def _vitkd(golden: Golden) -> dict:
    x, kwargs = golden.x, golden.kwargs
    layers = [[x[f"low_{side}"][:, k] for k in range(x["low_student"].shape[1])] for side in ("student", "teacher")]
    shallow, known = (list(map(jnp.asarray, side)) for side in layers)
    deep, high = jnp.asarray(x["high_student"]), jnp.asarray(x["high_teacher"])
    removed = generation.removed_tokens(jnp.asarray(x["noise"]), kwargs["lambda_vitkd"])
    module = generation.TokenGeneration(high.shape[-1], dtype=DTYPE)
    weights = variables(module, part(golden.w, "vitkd"), generation.NAMES, shallow, deep, removed)
    options = {"alpha": kwargs["alpha_vitkd"], "beta": kwargs["beta_vitkd"], "ratio": kwargs["lambda_vitkd"]}

    def loss(shallow, deep):
        out = module.apply(weights, shallow, deep, removed)
        return jnp.mean(generation.vitkd(*out, known, high, removed, **options))

    value, (low, top) = jax.jit(jax.value_and_grad(loss, (0, 1)))(shallow, deep)
    return {"loss_vitkd": value, "grad_low_student": jnp.stack(low, axis=1), "grad_high_student": top}


def check_torchdistill_extra(golden: Golden) -> dict:
    x, kwargs, labels = golden.x, golden.kwargs, jnp.asarray(golden.x["target"])
    known, temperature = jnp.asarray(x["logits_teacher"]), kwargs["T"]
    standard = lambda s: jnp.mean(ls.lskd_and_labels(s, known, labels, temperature=temperature, alpha=kwargs["alpha"]))

    def srd(student, feature):
        feature = relations.simple_recipe(feature, jnp.asarray(x["feature_teacher"]), exponent=kwargs["srd_exponent"])
        return 2 * feature + jnp.mean(logits.kd(student, known))

    def distplus(student, feature):
        pair = feature, nhwc(x["map_teacher"])
        added = jnp.mean(maps.channel_correlation(*pair)) + maps.spatial_correlation(*pair)
        return logits.dist(student, known, clamp=True) + added

    student, found = jnp.asarray(x["logits_student"]), {}
    found["loss_logitstd"], found["grad_logitstd"] = value_and_gradient(standard, student)
    found["loss_srd"], (found["grad_srd_logits"], found["grad_srd_feature"]) = jax.jit(jax.value_and_grad(srd, (0, 1)))(
        student, jnp.asarray(x["feature_student"])
    )
    found["loss_distplus"], (found["grad_distplus_logits"], of_map) = jax.jit(jax.value_and_grad(distplus, (0, 1)))(
        student, nhwc(x["map_student"])
    )
    return keep(golden, found | {"grad_distplus_map": nchw(of_map)})


CHECKS = {
    "at": check_at,
    "at_paper": check_at_paper,
    "nst": check_nst,
    "sp": check_sp,
    "pkt": check_pkt,
    "ab_fsp": check_ab_fsp,
    "kdsvd": check_kdsvd,
    "manifold": check_manifold,
    "vid": check_vid,
    "ft": check_ft,
    "ofd": check_ofd,
    "mgd": check_mgd,
    "srrl_vitkd": check_srrl_vitkd,
    "torchdistill_extra": check_torchdistill_extra,
}
