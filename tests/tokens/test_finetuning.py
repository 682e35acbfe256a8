"""Fine-tuning as the authors of DynamicViT and EViT do it: groups of parameters, a dense teacher, rates that fall."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from configs.tokens import dynamicvit_deit_s, evit_deit_s, ppt_deit_s
from launch import train
from research.backbones import classify, teachers, vit
from research.core import config as configs
from research.core import loop, writers
from research.core.checkpoint import Checkpoints
from research.core.errors import UserError
from research.distill import arms
from research.port import checkpoint
from research.tokens import budget, evit

ROOT = pathlib.Path(evit_deit_s.__file__).parent
DYNAMIC, EVIT = f"{ROOT}/dynamicvit_deit_s.py", f"{ROOT}/evit_deit_s.py"
PROGRAMS = (jex.ClosedJaxpr, jex.Jaxpr)
RATES = (1.0, 0.5)


def opened(config):
    """(resolved config, its Runner on one device, its training batches)."""
    data = train.open_data(config)
    config = train.resolve(config, data)
    bound = train.runner.build(train.build(config, data), devices=jax.devices()[:1])
    return config, bound, train.batches(config, data)[0]


def student_of(config):
    """(the student's section, its network) of the small form of DynamicViT."""
    student = config.students.dynamicvit
    return student, classify.network(student.model, 10, 32, **student.options)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory, one_device):
    """(config, run folder, dense weights) of DynamicViT, trained for two steps from a checkpoint."""
    folder = tmp_path_factory.mktemp("dynamic")
    dense = classify.network("deit_small_patch16_224", 10, 32, **dynamicvit_deit_s.SMALL)
    params = jax.device_get(jax.jit(dense.init)(jax.random.PRNGKey(5))[0])
    checkpoint.save_variables({"params": params}, folder / "dense.safetensors")
    config = configs.load(f"{DYNAMIC}:smoke", [f"--config.teacher.weights={folder}/dense.safetensors"])
    with config.unlocked():
        config.students.dynamicvit.weights = "teacher"
    train.run(config, folder / "run")
    return config, folder / "run", params


def test_the_student_starts_from_its_teacher_and_at_first_only_its_predictors_learn(dynamic):
    _, folder, dense = dynamic
    rows = writers.read_rows(folder)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2] and rows[-1]["kind"] == "done"
    assert all(value is not None for row in rows for value in row.values())
    for name, far, rtol in (("dynamicvit", 2e-3, 0.0), ("dynamicvit_ema0.9999", 3e-7, 1e-6)):
        own = checkpoint.load_variables(folder / "weights" / f"{name}.safetensors")["params"]
        biases = [own.pop(f"score_predictor_{stage}")["in_conv_0"]["bias"] for stage in (0, 1)]
        # Biases begin at 0, and AdamW's first steps are as long as the rate, where there is a gradient.
        assert far / 3 < max(np.max(np.abs(bias)) for bias in biases) < far
        chex.assert_trees_all_close(own, dense, rtol=rtol, atol=0)


def test_then_the_rest_follows_at_a_hundredth_of_the_rate(dynamic):
    config = dynamic[0].copy_and_resolve_references().unlock()
    config.steps_per_epoch, config.steps = 2, 60
    config.schedule.name, config.optimizer.weight_decay = "constant", 0.0
    student, network = student_of(config)
    transformation, _ = arms.optimizer(config, student)
    shapes, _ = jax.eval_shape(network.init, jax.random.PRNGKey(0))
    params = {"model": jax.tree.map(lambda x: jnp.ones(x.shape), shapes), "adaptor": {}}
    state, update = transformation.init(params), jax.jit(transformation.update)
    for step in range(12):
        updates, state = update(params, state, params)
        for name, tree in updates["model"].items():
            factor = 0.01 * (step >= 10) * (name not in ("cls_token", "pos_embed"))
            factor = 1.0 if name.startswith("score_predictor") else factor
            for found in jax.tree.leaves(tree):
                np.testing.assert_allclose(found, -1e-3 * factor, rtol=1e-4, atol=1e-9, err_msg=f"{step} {name}")


def test_evaluation_takes_the_dropped_patches_out(dynamic):
    _, network = student_of(dynamic[0])
    images, key = jnp.zeros((4, 32, 32, 3)), jax.random.PRNGKey(0)
    params, _ = jax.eval_shape(network.init, key)
    tokens = lambda train: lambda params: network.apply(params, {}, images, train=train, key=key)[1]["tokens"]
    assert jax.eval_shape(tokens(False), params).shape == (4, 1 + 7, 12)  # 0.49 of 16
    assert jax.eval_shape(tokens(True), params).shape == (4, 17, 12)


def test_only_students_may_lack_what_a_reduction_adds(dynamic, tmp_path):
    config, _, dense = dynamic
    student, network = student_of(config)
    student = student.copy_and_resolve_references().unlock()
    student.weights = config.teacher.weights
    assert set(teachers.pretrained(student, network, 10, new=True)[0]) == set(dense)
    with pytest.raises(ValueError, match="score_predictor_0/in_conv_0/bias is in one of them only"):
        teachers.pretrained(student, network, 10)
    student.weights = str(tmp_path / "broken.safetensors")
    checkpoint.save_variables({"params": {name: dense[name] for name in dense if name != "norm"}}, student.weights)
    with pytest.raises(ValueError, match="is in one of them only"):
        teachers.pretrained(student, network, 10, new=True)


@pytest.fixture(scope="module")
def evits():
    """(config, Runner, batches, fit) of the small form with RATES, from step 2 on the second; `fit` gives the state
    after so many steps."""
    config = configs.load(f"{EVIT}:scratch,smoke,keep={RATES[-1]}")
    per_epoch = train.resolve(config, train.open_data(config)).steps_per_epoch
    with config.unlocked():
        config.students.evit.stages.reduce.keep_rate = ((2 / per_epoch, RATES[0]),)
    config, bound, batches = opened(config)

    def fit(steps, checkpoints=None):
        key = jax.random.PRNGKey(0)
        state, _ = loop.fit(bound, loop.Plan(steps, 16), key=key, train_batches=batches, checkpoints=checkpoints)
        return jax.device_get(state)

    return config, bound, batches, fit


def hidden(jaxpr) -> set[int]:
    """Numbers of tokens N of all arrays (16, N, 48) in a program: what its MLPs are given."""
    found = set()
    for eqn in jaxpr.eqns:
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
        found |= {shape[1] for shape in shapes if len(shape) == 3 and shape[::2] == (16, 48)}
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, PROGRAMS)):
            if isinstance(inner, PROGRAMS):
                found |= hidden(getattr(inner, "jaxpr", inner))
    return found


def test_there_is_a_branch_for_each_rate_with_its_number_of_tokens(evits):
    config, bound, batches, _ = evits
    batch = jax.eval_shape(lambda: next(batches(0)))
    step = train.build(config, train.open_data(config)).train_step
    (switch,) = [e for e in jax.make_jaxpr(step)(bound.shapes, batch).jaxpr.eqns if e.primitive.name == "cond"]
    student = config.students.evit
    for branch, rate in zip(switch.params["branches"], RATES, strict=True):
        reduce = evit.reduction(rate, blocks=(0, 1))
        tokens = budget.tokens(vit.build(**{**evit_deit_s.SMALL, "num_classes": 10}, reduce=reduce))
        assert hidden(branch.jaxpr) == {left for _, left in tokens}, rate
    assert student.options.reduce.keep_rate == RATES[-1]


def test_a_run_stopped_within_a_stage_continues_bit_for_bit(evits, tmp_path):
    _, bound, _, fit = evits
    straight = fit(4)
    for steps in (3, 4):
        checkpoints = Checkpoints(tmp_path)
        resumed = fit(steps, checkpoints)
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    assert bound.train_step._cache_size() == 1


def test_the_small_form_from_scratch_trains(tmp_path, one_device):
    """Through the command; its second step is at the last rate."""
    train.run(configs.load(f"{EVIT}:scratch,smoke"), tmp_path)
    rows = writers.read_rows(tmp_path)
    assert [row["train/stage"] for row in rows if row["kind"] == "train"] == [0, 1] and rows[-1]["kind"] == "done"
    assert all(value is not None for row in rows for value in row.values())


def test_rates_fall_as_the_authors_do_in_a_few_steps():
    config = configs.load(f"{EVIT}:scratch").copy_and_resolve_references().unlock()
    config.steps_per_epoch = evit_deit_s.STEPS
    earlier = arms.stages(config)
    ends, stages = zip(*earlier, strict=True)
    reduces = [found.students.evit.options.reduce for found in (*stages, config)]
    tokens = [budget.tokens(vit.build(**vit.VARIANTS[evit_deit_s.MODEL], reduce=reduce)) for reduce in reduces]
    assert len({tuple(found) for found in tokens}) == 7  # as many programs as rates
    assert {count for count, _ in tokens[0]} == {197} and sorted({count for count, _ in tokens[-1]}) == [
        72,
        100,
        140,
        197,
    ]
    for step in range(0, 120 * evit_deit_s.STEPS, 100):
        rate = reduces[sum(step >= end for end in ends)].keep_rate
        assert abs(rate - evit.warmup(step, evit_deit_s.STEPS)) <= 0.025 + 1e-9, step
    assert {configs.load(f"{EVIT}:scratch,levels={n}").students.evit.options.reduce.keep_rate for n in (1, 12)} == {0.7}


def test_stages_are_of_options_that_are_there_and_ascend():
    for changes, message in (
        (
            {"reduce": {"keep_ratio": ((1.0, 0.5),)}},
            "stages.reduce.keep_ratio: there is no students.evit.options.reduce",
        ),
        ({"reduce": {"keep_rate": ((2.0, 0.9), (1.0, 0.5))}}, "stages.reduce.keep_rate: epochs have to ascend"),
        ({"reduce": {"keep_rate": ((0.0, 0.9),)}}, "by a step or more"),
    ):
        config = configs.load(f"{EVIT}:smoke").copy_and_resolve_references().unlock()
        config.students.evit.stages, config.steps_per_epoch = changes, 10
        with pytest.raises(ValueError, match=message):
            arms.stages(config)


def test_the_recipes_are_the_authors_scripts():
    c = configs.load(DYNAMIC)
    assert (c.epochs, c.batch_size, c.mix.group, c.data.repeats) == (30, 1024, 128, 1)
    assert (c.optimizer.lr, c.optimizer.weight_decay, c.ema) == (1e-3, 0.05, (0.9999,))
    assert (c.schedule.warmup_epochs, c.schedule.warmup_lr, c.schedule.min_lr) == (5, 0, 1e-6)
    student = c.students.dynamicvit
    assert (student.label_weight, student.hint_weight, student.smoothing, student.options.drop_path) == (1, 1, 0.1, 0)
    assert student.hint_options.to_dict() == {"keep": 0.7, "ratio_weight": 2.0, "distill_weight": 0.5}
    base = configs.load(f"{DYNAMIC}:model=deit_base_patch16_224,keep=0.5").students.dynamicvit
    assert (base.options.drop_path, base.hint_options.ratio_weight, base.options.reduce.keep) == (0.2, 5.0, 0.5)

    c = configs.load(EVIT, ["--config.students.evit.weights=x"])
    assert (c.epochs, c.batch_size, c.data.repeats, c.ema) == (30, 2048, 3, (0.99996,))
    assert (c.optimizer.lr, c.optimizer.weight_decay) == (pytest.approx(8e-5), 1e-6)
    assert (c.schedule.warmup_epochs, c.schedule.min_lr, c.students.evit.options.drop_path) == (0, 2e-6, 0)
    assert not arms.stages(c)
    c = configs.load(f"{EVIT}:scratch")
    assert (c.epochs, c.optimizer.lr, c.optimizer.weight_decay) == (300, pytest.approx(2e-3), 0.05)
    assert (c.schedule.warmup_epochs, c.schedule.min_lr, c.students.evit.options.drop_path) == (5, 1e-5, 0.1)
    for found in (c, ppt_deit_s.recipe()):
        assert found.schedule.behind == 1 and (found.eval.crop, found.mix.mixup, found.mix.cutmix) == (0.875, 0.8, 1)


def test_what_the_configs_cannot_do_is_refused():
    with pytest.raises(UserError, match="no recipe of 'deit_tiny_patch16_224'; there are deit_small"):
        configs.load(f"{DYNAMIC}:model=deit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"students.evit.weights: needs a value"):
        configs.load(EVIT)
    config = configs.load(f"{DYNAMIC}:smoke")
    with config.unlocked():
        config.students.dynamicvit.options.reduce = {"method": "research.tokens.evit", "blocks": (0, 1)}
    with pytest.raises(ValueError, match="the student has 0 predictors of DynamicViT and the loss keep=0.7"):
        opened(config)
    with config.unlocked():
        config.students.dynamicvit.hint = "research.tokens.evit"
    with pytest.raises(ValueError, match="'research.tokens.evit' is not the import path of a module with a function"):
        opened(config)


@pytest.mark.parametrize("name", ["dynamicvit_deit_s", "evit_deit_s"])
def test_a_config_says_how_to_run_it(name):
    text = (ROOT / f"{name}.py").read_text().split('"""')[1]
    for word in ("Command:", "Hardware:", "Published:", f"configs/tokens/{name}.py"):
        assert word in text, f"its docstring lacks {word!r}"
