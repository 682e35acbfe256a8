"""Multiply-adds against the published counts and against those of the traced network; the solvers."""

import json

import jax
import jax.numpy as jnp
import pytest

from research import backbones
from research.backbones import vit
from research.core import cost
from research.tokens import budget, evit, ppt, tome

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}


def published(golden):
    """(name, model, count) of the networks of this module's methods."""
    counts = {}
    for folder in ("ppt", "token_reduction"):
        counts |= json.loads((golden / folder / "counts.json").read_text())
    for name, entry in counts.items():
        if name.startswith("deit_"):
            yield name, backbones.create(name), entry
        elif name.startswith("ppt_") and name.endswith(("prune", "pool")):
            policy = name.rpartition("_")[2]
            model = name.removeprefix("ppt_").partition("_r50")[0]
            yield name, backbones.create(model, reduce=ppt.reduction(50, policy=policy)), entry
        elif name.startswith("tome_"):
            model, _, r = name.removeprefix("tome_").rpartition("_r")
            yield name, backbones.create(model, reduce=tome.reduction(int(r))), entry
        elif name.startswith("evit_"):
            rate, fuse = float(name.split("keep")[1].split("_")[0]), name.endswith("_fuse")
            yield name, backbones.create("deit_small_patch16_224", reduce=evit.reduction(rate, fuse=fuse)), entry


def test_published_multiply_adds(golden):
    found = {name: budget.macs(model).total - entry["macs"] for name, model, entry in published(golden)}
    assert len(found) == 24 and set(found.values()) == {0}, found


def test_the_adaptive_network_of_the_readme_lies_between_its_policies():
    totals = [
        budget.macs(backbones.create("deit_small_patch16_224", reduce=ppt.reduction(50, policy=policy))).total
        for policy in ("prune", "adaptive", "pool")
    ]
    assert totals[0] < 2_944_411_999 < totals[1] == totals[2]


def test_tokens_of_deit_s():
    create = lambda reduce: backbones.create("deit_small_patch16_224", reduce=reduce)
    entering = lambda reduce: [n for n, _ in budget.tokens(create(reduce))]
    assert [m for _, m in budget.tokens(create(ppt.reduction(50)))] == [197] * 3 + [147] * 3 + [97] * 3 + [49] * 3
    assert entering(evit.reduction(0.7))[::3] == [197, 197, 140, 100] and entering(evit.reduction(0.7))[-1] == 72
    assert entering(evit.reduction(0.7, fuse=False))[-1] == 69


@pytest.mark.parametrize("changes", [{}, {"distilled": True}, {"mlp_ratio": 2.0, "img_size": (16, 32)}])
def test_products_are_those_of_the_traced_network(changes):
    model = vit.build(**{**SMALL, **changes})
    assert traced(model) == budget.macs(model).products


def traced(model) -> int:
    """What `cost` counts of the network."""
    side = model.img_size if isinstance(model.img_size, tuple) else (model.img_size,) * 2
    image = jax.ShapeDtypeStruct((1, *side, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return cost.macs(model.apply, shapes, image)


def test_what_reducing_adds_to_the_products():
    width, head = SMALL["embed_dim"], SMALL["embed_dim"] // SMALL["num_heads"]
    match = lambda n: (n + 1) // 2 * (n // 2) * head  # similarities
    joins = lambda left, r: left * r * (width + 1)  # tokens and sizes, by 0/1 rows
    row = lambda n: n * width  # the class token's attention once more
    cases = [
        (tome.reduction([4, 0, 3]), match(17) + joins(13, 4) + match(13) + joins(10, 3)),
        (ppt.reduction(4, (1,)), row(17) + match(17) + joins(13, 4)),
        (ppt.reduction(4, (1,), policy="prune"), row(17)),
        (evit.reduction(0.5, (1,)), row(17) + 8 * width),
    ]
    for reduce, extra in cases:
        model = vit.build(**SMALL, reduce=reduce)
        assert traced(model) == budget.macs(model).products + extra


def test_solver_spends_the_budget():
    model = backbones.create("deit_small_patch16_224")
    assert budget.solve(model, 2_945_017_559, ppt.reduction, range(1, 197))[0] == 50
    r, spent = budget.solve(model, 2.71e9, tome.reduction, range(197))
    assert r == 13 and spent.total == 2_709_177_836
    rate, spent = budget.solve(model, 3.04e9, evit.reduction, [i / 100 for i in range(1, 101)])
    assert rate == 0.7 and spent.total == 3_032_105_162
    with pytest.raises(ValueError, match="the cheapest needs"):
        budget.solve(model, 1e6, tome.reduction, range(17))
    with pytest.raises(ValueError, match="none of them fits"):
        budget.solve(model, 1e12, ppt.reduction, [500])


def timed(speed=4.6e9 * 100):
    """A device that does `speed` multiply-adds a second, and a list of the networks it was asked for."""
    asked = []

    def rate(model):
        asked.append(model)
        return speed / budget.macs(model).total

    return rate, asked


@pytest.mark.parametrize(
    "make, values",
    [(ppt.reduction, range(197)), (tome.reduction, range(30)), (evit.reduction, [i / 100 for i in range(100, 0, -1)])],
)
def test_throughput_is_reached_with_the_least_reduction_and_few_compiles(make, values):
    model = backbones.create("deit_small_patch16_224")
    work = {value: cost.total for value, cost in budget._fitting(model, make, values)}
    for target in (90, 120, 157, 170):
        rate, asked = timed()
        found = budget.solve_throughput(model, target, make, values, rate)
        best = max(total for total in work.values() if 4.6e11 / total >= target)
        assert work[found.value] == best == found.macs.total
        assert found.rates[found.value] >= target
        assert len(asked) == len(found.rates) <= len(work).bit_length()
        assert all(network.reduce == make(value) for network, value in zip(asked, found.rates, strict=True))


def test_equal_work_is_timed_once_and_the_first_of_it_taken():
    """At half of the tokens more of them to remove changes nothing."""
    model, (rate, asked) = vit.build(**SMALL), timed()
    found = budget.solve_throughput(model, 1, lambda r: tome.reduction([r]), range(8, 17), rate)
    assert found.value == 8 and len(asked) == 1


def test_a_target_out_of_reach_says_what_can_be_reached():
    model, (rate, asked) = backbones.create("deit_small_patch16_224"), timed(100 * 2_709_177_836)
    with pytest.raises(ValueError, match=r"no value reaches 5000 images/s: the fastest does 100$"):
        budget.solve_throughput(model, 5e3, tome.reduction, range(14), rate)
    assert len(asked) == 3
    with pytest.raises(ValueError, match="none of them fits the network"):
        budget.solve_throughput(model, 1, ppt.reduction, [500], rate)


def test_networks_outside_of_the_measure_are_refused():
    with pytest.raises(ValueError, match="closed form for plain ViT"):
        budget.macs(vit.build(**SMALL, init_values=1e-6))
    with pytest.raises(ValueError, match="closed form for plain ViT"):
        budget.macs(backbones.create("lvvit_t"))
