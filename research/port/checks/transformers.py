"""Golden checks of vision transformers and mixers against timm."""

import re

import jax
import jax.numpy as jnp

from research.backbones import beit, clip, mixer, swin, swin_v2, vit
from research.port.checks import common
from research.port.verify import Golden

# Arguments that change nothing in a forward pass in evaluation, or only state what these networks always do.
NEUTRAL = {"in_chans", "drop_rate", "drop_path_rate", "head_init_scale", "norm_layer", "weight_init"}


def arguments(golden: Golden, *neutral: str) -> dict:
    """The official constructor's arguments without `neutral` ones, computing in float64."""
    kept = {k: v for k, v in golden.kwargs.items() if k not in NEUTRAL.union(neutral)}
    return {**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}, "dtype": jnp.float64}


def endpoint(module: str) -> str:
    """Endpoint of timm's module `blocks.B`, `layers.S` or `stem`."""
    block = re.fullmatch(r"blocks\.(\d+)", module)
    stage = re.fullmatch(r"layers\.(\d+)", module)
    if block:
        return f"block{int(block[1]) + 1:02d}"
    return f"stage{int(stage[1]) + 1}" if stage else {"stem": "patch_embed"}.get(module, module)


def _run(golden: Golden, family, model) -> dict:
    """All the golden expects of an evaluation: logits, taps and endpoints, with channels last as timm has them here."""
    outputs, endpoints, _ = common.run(golden, family, model, endpoint, layout=lambda x: x)
    return endpoints | outputs


def check_vit(golden: Golden) -> dict:
    return _run(golden, vit, vit.build(**arguments(golden)))


def check_deit_distilled(golden: Golden) -> dict:
    return _run(golden, vit, vit.build(distilled=True, **arguments(golden)))


def check_beit(golden: Golden) -> dict:
    return _run(golden, beit, beit.build(**arguments(golden, "global_pool")))


def check_mixer(golden: Golden) -> dict:
    return _run(golden, mixer, mixer.build(**arguments(golden, "global_pool")))


def check_resmlp(golden: Golden) -> dict:
    return _run(golden, mixer, mixer.build(block="resmlp", **arguments(golden, "global_pool", "block_layer")))


def check_swin(golden: Golden) -> dict:
    return _run(golden, swin, swin.build(**arguments(golden, "global_pool")))


def check_swin_v2(golden: Golden) -> dict:
    return _run(golden, swin_v2, swin_v2.build(**arguments(golden, "global_pool")))


def check_clip_tower(golden: Golden) -> dict:
    """The image tower with CLIP's projection as its classifier."""
    return _run(golden, vit, vit.build(**arguments(golden)))


def check_clip(golden: Golden) -> dict:
    """Hugging Face's `CLIPModel`: embeddings, logits both ways, features before they are normalised.

    What its configuration leaves out has the values of ViT-B/32. `eos_token_id` 2 marks files from before that value
    was right, whose texts end with the largest id.
    """
    text = {"hidden_act": "quick_gelu", "eos_token_id": 49407, **golden.kwargs.get("text_config", {})}
    vision = {"hidden_act": "quick_gelu", **golden.kwargs.get("vision_config", {})}
    vision_names = {"hidden_size": "embed_dim", "intermediate_size": "hidden", "num_hidden_layers": "depth"}
    vision_names |= {"num_attention_heads": "num_heads", "image_size": "img_size", "patch_size": "patch_size"}
    text_names = {"vocab_size": "vocabulary", "hidden_size": "text_width", "intermediate_size": "text_hidden"}
    text_names |= {"num_hidden_layers": "text_depth", "num_attention_heads": "text_heads"}
    text_names |= {"max_position_embeddings": "context"}
    model = clip.build(
        **{ours: vision[theirs] for theirs, ours in vision_names.items() if theirs in vision},
        **{ours: text[theirs] for theirs, ours in text_names.items() if theirs in text},
        act_layer=vision["hidden_act"],
        text_act=text["hidden_act"],
        eos=None if text["eos_token_id"] == 2 else text["eos_token_id"],
        num_classes=golden.w["visual_projection.weight"].shape[0],
        dtype=jnp.float64,
    )
    weights = common.variables(golden, clip, model)
    mask = golden.x.get("attention_mask")
    run = jax.jit(lambda image, tokens, seen: model.apply(weights, image, tokens=tokens, seen=seen))
    features, endpoints = run(common.nhwc(golden.x["image"]), jnp.asarray(golden.x["input_ids"]), mask)
    return endpoints | {
        "logits_per_text": endpoints["logits_per_image"].T,
        "image_features_unnormalised": features,
        "text_features_unnormalised": endpoints["text_features"],
    }


def check_vanillakd_beit(golden: Golden) -> dict:
    """VanillaKD's teacher: tokens, logits, the gradient of the summed logits, and tokens unfolded to maps."""
    model = beit.build(**arguments(golden, "global_pool"))
    outputs, endpoints = common.with_gradient(golden, beit, model)
    outputs |= endpoints
    for key in golden.y:
        if match := re.fullmatch(r"unpatchify_p(\d+)", key):
            outputs[key] = common.nchw(beit.unpatchify(jnp.asarray(golden.x["tokens_for_unpatchify"]), int(match[1])))
    return outputs
