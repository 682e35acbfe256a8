"""Programs of arms: what they leave out, what the compiler says of them, and that they are the arms' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from launch import bench_distill
from research.backbones import teachers
from research.core import config as configs
from research.distill import losses, step_cost

B, C = 4, 5
SMALL = dict(img_size=8, patch_size=4, embed_dim=8, num_blocks=1)


def config(**arms):
    c = common.smoke(common.base(), size=8)
    c.data.num_classes, c.data.num_examples, c.batch_size = C, 16, B
    c.students = common.arms(
        **{name: common.student("mixer_s16_224", options=SMALL, label_loss="ce", **arm) for name, arm in arms.items()}
    )
    c.teacher = common.teacher("mixer_s16_224", options=SMALL | {"embed_dim": 12})
    return bench_distill.prepared(configs.freeze(c))


def ways(c, whole):
    batch = step_cost.batch_of(c)
    teacher = step_cost.teacher_program(teachers.networks(c), batch)
    taught = teacher.run(*teacher.arguments)
    return {name: step_cost.way(c, name, batch, taught, whole=whole) for name in c.students}, taught


@pytest.fixture(scope="module")
def found():
    return ways(config(none={}, kd=dict(loss="kd"), cc=dict(hint="cc", hint_options=dict(dim=3))), True)


def test_an_arm_of_labels_has_no_losses_and_takes_no_teacher(found):
    none = found[0]["none"]
    assert none.alone is None and none.params == 0 and none.step.arguments[3] == {}


def test_arms_that_differ_in_their_losses_alone_share_the_step_without(found):
    assert len({way.student for way in found[0].values()}) == 1


def test_a_loss_of_logits_is_given_the_logits_alone_and_gives_their_gradient(found):
    found, taught = found
    kd = found["kd"]
    assert list(kd.step.arguments[3]) == ["logits"] and kd.params == 0
    params, seen, _, given, extra = kd.alone.arguments
    (value, _), (_, gradient) = kd.alone.run(*kd.alone.arguments)
    expected = jax.value_and_grad(lambda s: jnp.mean(losses.LOSSES["kd"](s, taught["logits"])))(seen["logits"])
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient["logits"], expected[1], rtol=1e-4, atol=1e-6)
    assert list(seen) == list(given) == ["logits"]


def test_a_hint_is_given_what_it_taps_and_trains_its_adaptor(found):
    cc = found[0]["cc"]
    assert cc.params == (8 * 3 + 3) + (12 * 3 + 3)
    assert list(cc.alone.arguments[1]) == list(cc.alone.arguments[3]) == ["pooled"]
    assert any(np.any(g) for g in jax.tree.leaves(cc.alone.run(*cc.alone.arguments)[1][0]))
    # Adaptor, its two moments, and the teacher's feature are arguments that the bare step lacks.
    more = cc.step.cost.argument_bytes - found[0]["none"].step.cost.argument_bytes
    assert more >= 4 * (3 * cc.params + B * 12)


def test_a_step_can_be_repeated_and_changes_no_parameter(found):
    step = found[0]["cc"].step
    before = jax.device_get(step.arguments[0][0])
    model, adaptor = step.run(*step.arguments)
    model, _ = step.run(model, adaptor, *step.arguments[2:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, jax.device_get(model[0]))


@pytest.mark.parametrize("name", ["crd", "gpt4image"])
def test_what_training_takes_from_the_data_is_made_up(name):
    c = config(arm=dict(hint=name, hint_options={"dim": 3, "negatives": 4} if name == "crd" else {})).unlock()
    c.teacher.text = "random" if name == "gpt4image" else ""
    batch = step_cost.batch_of(c)
    taught = {"pooled": jnp.ones((B, 12)), "logits": jnp.ones((B, C))} | step_cost.text_of(c, batch)
    way = step_cost.way(c, "arm", batch, taught, whole=False)
    assert way.step is None and np.isfinite(way.alone.run(*way.alone.arguments)[0][0])


def test_losses_of_two_views_are_refused_and_those_of_several_teachers_see_them_all():
    c = config(arm=dict(loss="mlld")).unlock()
    batch, taught = step_cost.batch_of(c), {"pooled": jnp.ones((B, 12)), "logits": jnp.ones((B, C))}
    with pytest.raises(ValueError, match="two views"):
        step_cost.way(c, "arm", batch, taught, whole=False)
    both = jax.random.normal(jax.random.key(1), (2, B, C))
    c.students.arm.loss = "kd"
    alone = step_cost.way(c, "arm", batch, taught | {"all": both}, whole=False).alone
    logits = alone.arguments[1]["logits"]
    expected = jnp.mean(losses.LOSSES["kd"](logits, teachers.combined(both)))
    np.testing.assert_allclose(alone.run(*alone.arguments)[0][0], expected, rtol=1e-5)
