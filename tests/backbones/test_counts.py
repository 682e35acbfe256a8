"""Parameters and multiply-adds of every published variant, against counts made with the official code."""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from research import backbones
from research.core.cost import macs, params_count

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# Networks of other issues, in the same lists.
ABSENT = re.compile(r"mobilenetv1|MobileNetV2|Shuffle")
RENAMED = {"ResNet50": "cifar_resnet50"}
# Published elsewhere: torchvision's documentation; Zagoruyko & Komodakis 2016 round WRN-28-10 to 36.5 M.
PUBLISHED = {
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet101_2": 126_886_696,
    "wrn_28_10": 36_536_884,
}


def official_counts() -> dict[str, dict]:
    """Variant -> its entry in the golden counts, for the networks that exist here."""
    counts = {}
    for method in ("backbones", "vanillakd", "kdlosses"):
        counts |= json.loads((GOLDEN / method / "counts.json").read_text())
    return {RENAMED.get(name, name): entry for name, entry in counts.items() if not ABSENT.search(name)}


def measured(name: str, size: int) -> tuple[int, int, dict]:
    """(parameters, multiply-adds, shapes of the endpoints) of one image, by tracing alone."""
    model, found = backbones.create(name), {}

    def forward(image):
        (logits, endpoints), variables = model.init_with_output(jax.random.key(0), image)
        found["params"] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
        found["endpoints"] = {key: value.shape for key, value in endpoints.items()}
        return logits

    count = macs(forward, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return found["params"], count, found["endpoints"]


@pytest.mark.parametrize("name", sorted(official_counts()))
def test_counts_are_exact(name):
    entry = official_counts()[name]
    params, count, endpoints = measured(name, entry["image_size"])
    assert params == entry["params"]
    assert entry["macs"] in (count, None)
    if "feats" in entry:
        stages = ["stem", *(f"stage{k}" for k in range(1, len(entry["feats"])))]
        assert [endpoints[stage] for stage in stages] == [(1, h, w, c) for c, h, w in entry["feats"]]
        assert endpoints["pooled"] == (1, *entry["pooled"])


def test_both_towers_of_clip_have_their_share():
    entry, image = official_counts()["clip_vit_b32_full"], jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = backbones.create("clip_vit_b32_full")
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)["params"]
    assert params_count(params["text"]) == entry["text_model_params"]
    assert params_count(params["vision"]) - 512 * 768 == entry["vision_model_params"]  # without its projection


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_published_parameter_counts(name):
    assert measured(name, 32)[0] == PUBLISHED[name]


def test_image_size_of_the_counts_is_the_published_input():
    sizes = {name: entry["image_size"] for name, entry in official_counts().items()}
    assert {name: backbones.input_spec(name).size for name in sizes} == sizes


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'convnext_tiny'"):
        backbones.create("convnext_tinny")


def test_no_two_families_share_a_name():
    families = {backbones.family(name).__name__: backbones.family(name) for name in backbones.variants()}
    assert len(families) == len(backbones.FAMILIES)
    assert sum(len(module.VARIANTS) for module in families.values()) == len(backbones.variants())
