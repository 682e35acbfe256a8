"""The search for a setting that fits: its order, what it skips, and the overrides it prints."""

import pytest

from configs import common
from research.core import config as configs
from research.core import runner
from research.core.errors import UserError
from research.pods import fit, measure
from tests.pod import toy


@pytest.fixture
def config():
    c = common.base()
    c.batch_size = 32
    c.students = common.arms(a=common.student("vit", options={"remat": False}), b=common.student("mixer"))
    c.teacher = common.teacher("vit", options={"remat": False})
    return configs.freeze(c)


@pytest.fixture(scope="module")
def shapes():
    return runner.build(toy.build()).shapes


def needs(temporaries: int, limit: int, fits: bool = False) -> measure.Measured:
    memory = {"parameters": 0, "activations and temporaries": temporaries}
    return measure.Measured("train", memory, temporaries, limit, fits)


def test_settings_are_those_that_save(config):
    found = fit.settings(config, 8)
    assert set(found) == {fit.Setting(f, a, r) for f in (1, 2, 4, 8) for a in (1, 2, 4) for r in (False, True)} - {
        fit.Setting(1, 1, False)
    }
    assert [s.slowdown for s in found] == sorted(s.slowdown for s in found)


def test_overrides_can_be_loaded(config):
    texts = fit.overrides(config, fit.Setting(4, 2, True), 8)
    thawed = configs.thaw(config.copy_and_resolve_references().unlock())
    for text in texts:
        configs.apply(thawed, text)
    changed = configs.freeze(thawed)
    assert fit.current(changed, 8) == fit.Setting(4, 2, True)
    assert changed.parallel.rules == ((".*", "fsdp"),)
    assert changed.students.a.options.remat is True and changed.teacher.options.remat is False


def test_search_goes_on_until_one_fits(config, shapes):
    tried = []

    def attempt(texts):
        tried.append(texts)
        if len(tried) == 1:
            raise UserError("batch_size: not divisible")
        return needs(10**9, 10**9, fits=len(tried) == 3)

    lines = []
    devices = shapes.step.sharding.mesh.devices.reshape(-1)
    texts, found = fit.search(config, shapes, needs(2 * 10**9, 10**9), devices, attempt, lines.append)
    assert found.fits and texts == tried[2] and len(tried) == 3
    assert any("not possible: batch_size" in line for line in lines)


def test_search_compiles_nothing_whose_state_alone_is_too_large(config, shapes):
    devices = shapes.step.sharding.mesh.devices.reshape(-1)
    whole = fit.state_bytes(shapes, config, fit.Setting(1, 1, False), devices)[0]
    limit = fit.state_bytes(shapes, config, fit.Setting(4, 1, False), devices)[0]
    assert limit < whole
    tried = []
    attempt = lambda texts: tried.append(texts) or needs(10, limit)
    assert fit.search(config, shapes, needs(10, limit), devices, attempt, most=100) is None
    sizes = {text for texts in tried for text in texts if "fsdp=" in text}
    assert sizes == {"--config.parallel.axes.fsdp=4", "--config.parallel.axes.fsdp=8"}
    assert len(tried) == 2 * 3 * 2


def test_suggestions_shrink_what_is_large(config, shapes):
    devices = shapes.step.sharding.mesh.devices.reshape(-1)
    found = fit.suggestions(config, shapes, needs(3 * 10**9, 10**9), devices)
    assert found and all(size <= 0.95 * 10**9 for _, size in found)
    assert all(setting.accumulate == 4 or setting.remat for setting, _ in found)


def test_a_bug_is_not_a_setting_that_is_not_possible(config, shapes):
    def attempt(texts):
        raise TypeError("a bug")

    devices = shapes.step.sharding.mesh.devices.reshape(-1)
    with pytest.raises(TypeError, match="a bug"):
        fit.search(config, shapes, needs(2 * 10**9, 10**9), devices, attempt)
