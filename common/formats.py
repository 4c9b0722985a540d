"""Weights of this and other projects as the model they came from; sec3_benchmark/initial_weights.py starts trainings.

common/weights.py does the reading. The same tensors with another number of heads are another function, so that number
travels with every file of ours and is checked wherever it is known.
"""
import math

from common.distributed import print0
from common.mae import DECODERS, MAE
from common.vit import SIZES, build_model, pair, patch_grid
from common.weights import TABLE, FormatError, Weights, listed, read_weights, shape_config


def source_grid(weights, prefix, wanted=(0, 0)):
    """Rows and columns of the source's patches, `prefix` other tokens aside: from its settings, else square, else the
    `wanted` ones if they are as many.
    """
    if "dist_token" in weights.state:
        raise FormatError(f"{weights.source} is a distilled DeiT (dist_token, head_dist), not a plain ViT: give the "
                          f"plain DeiT's weights")
    count, config = weights.state["pos_embed"].shape[1] - prefix, weights.config
    square = (math.isqrt(max(count, 0)),) * 2
    grids = [patch_grid(config["img_size"], config["patch_size"])] if config else [square, wanted]
    for grid in grids:
        if math.prod(grid) == count:
            return grid
    why = f"its grid is {grids[0]}" if config else "no square, and no image size is in the file"
    raise FormatError(f"{weights.source} has positions for {count} patches ({why}): give its --img-size, height and "
                      f"width, or a file with settings")


def require_fit(source, target, state, missing=None, unexpected=None):
    """A FormatError with counts and names if one is missing or unexpected (by default: any) or a shape differs."""
    missing = [name for name in target if name not in state] if missing is None else missing
    unexpected = [name for name in state if name not in target] if unexpected is None else unexpected
    shapes = [f"{name} {list(state[name].shape)} for {list(target[name].shape)}" for name in state
              if name in target and state[name].shape != target[name].shape]
    if missing or unexpected or shapes:
        raise FormatError(f"{source} does not fit the model: missing {listed(missing)}, unexpected "
                          f"{listed(unexpected)}, other shapes {listed(shapes)}. Compare size, patch size, channels, "
                          f"classes and pooling")


def load_model(source, **overrides):
    """The model of a source or of Weights, loaded strictly: build_vit's or MAE, timm's own for `timm:NAME` and folders.

    Overrides (None: not given) say what a foreign file cannot (num_heads, decoder_heads, norm_pix, a non-square
    img_size); of our files they may change mask_ratio and drop_path. A FormatError if one contradicts the source. The
    model's `statistics` are those of the images it learnt from, or None.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if "img_size" in given:
        given["img_size"] = list(pair(given["img_size"]))
    weights = source if isinstance(source, Weights) else read_weights(source)
    source, config = weights.source, weights.config or {}
    for name, value in given.items():
        known = (name in config and name != "mask_ratio") or weights.model is not None
        if known and config.get(name) != value:
            raise FormatError(f"{source} has {name} = {config.get(name)}, not {value}: leave this setting out")
    if weights.model is not None:
        weights.model.statistics = weights.statistics
        return weights.model
    if "dist_norm.weight" in weights.state:
        raise FormatError(f"{source} has a second head, so it is no plain ViT: appendix/finetune_distilled.py "
                          f"--eval-only evaluates it, and as --init it starts other trainings and the probes")
    config = {**(config or foreign_config(weights, given)), **given}
    model = MAE(**config) if "decoder_dim" in config else build_model(**config)
    require_fit(source, model.state_dict(), weights.state)
    model.load_state_dict(weights.state)
    model.statistics = weights.statistics
    return model


def foreign_config(weights, given):
    """The settings of a file that holds none: from its shapes. Head counts are not among them: given, or assumed and
    printed.
    """
    config, table = shape_config(weights.state), weights.state.get(f"blocks.0.attn.{TABLE}")
    if config["model"] is None:
        raise FormatError(f"{weights.source} has the width and depth of none of {', '.join(SIZES)}: "
                          f"give timm:NAME or a timm folder")
    if table is not None and not {"pos_embed", "head.weight"} <= weights.state.keys():
        raise FormatError(f"{weights.source} has relative positions and is no classifier with absolute ones too: fine-"
                          f"tune from it, by --model vit_tiny_rpe (or vit_tiny_simmim), and load the result")
    if table is not None:  # the 79.0 model
        side = config["patch_size"] * source_grid(weights, 1)[0]
        return {**{name: config[name] for name in ("patch_size", "in_chans", "num_classes", "global_pool")},
                "model": config["model"] + "_rpe", "img_size": [side, side], "num_heads": table.shape[1]}
    prefix = config.get("class_token", True) + config.get("reg_tokens", 0)
    config["img_size"] = given.get("img_size") or [config["patch_size"] * n for n in source_grid(weights, prefix)]
    assumed = {"num_heads": 12}
    if "decoder_dim" in config:
        assumed["decoder_heads"] = DECODERS[config["model"]][2]
    for name, value in assumed.items():
        config[name] = given.get(name, value)
        if name not in given:
            print0(f"{weights.source}: {name} is not in the file; assuming {value}")
    return config
