"""Rebuilding the model from which weights came: `load_model`, for analyses, evaluations and teachers."""
from timm.models import VisionTransformer
from torch import nn

from common import shapes
from common.distributed import print0
from common.errors import FormatError, listed
from common.mae import DECODERS, MAE
from common.pretrained import Weights, read_weights
from common.vit import SIZES, build_model, pair, patch_grid


def load_model(source, **overrides):
    """Rebuild the model of a source (as for `read_weights`, or Weights), an MAE or a ViT, and load it strictly.

    For `timm:NAME` and timm folders it is timm's own model. Its attribute `statistics` holds the mean and std of the
    images on which it was trained, or None. Assumptions and changes are printed.

    overrides: settings of the model, None if not given. They say what a foreign file cannot say (num_heads,
    decoder_heads, norm_pix). mask_ratio and drop_path may be chosen freely, and for another img_size the positions are
    resized. Raises FormatError if any other setting contradicts the source.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if "img_size" in given:
        given["img_size"] = list(pair(given["img_size"]))
    weights = source if isinstance(source, Weights) else read_weights(source)
    source, config, notes = weights.source, weights.config or {}, []
    for name, value in given.items():
        fixed = weights.model is not None or (name in config and name != "mask_ratio")
        if fixed and name != "img_size" and config.get(name) != value:
            raise FormatError(f"{source} has {name} = {config.get(name)}, not {value}: leave this setting out")
    if "dist_norm.weight" in weights.state:
        raise FormatError(f"{source} has a second head, so it is no plain ViT: appendix/finetune_distilled.py "
                          f"--eval-only evaluates it, and as --init it starts other trainings and the probes")
    model = weights.model
    if model is None:
        model = rebuild(weights, given, notes)
    elif given.get("img_size") not in (None, config.get("img_size")):
        resize_timm(model, weights, given["img_size"], notes)
    if notes:
        print0(f"{source}: {'; '.join(dict.fromkeys(notes))}")
    model.statistics = weights.statistics
    return model


def rebuild(weights, given, notes):
    """Build the model of Weights from a file and load them strictly, without a projection head or unused mask token."""
    config = {**(weights.config or foreign_config(weights, given, notes)), **given}
    model = MAE(**config) if "decoder_dim" in config else build_model(**config)
    target, grid = model.state_dict(), patch_grid(model.config["img_size"], config["patch_size"])
    beside = [name for name in weights.state if name not in target and name.startswith(("head.", "mask_token"))]
    state = {name: value for name, value in weights.state.items() if name not in beside}
    if beside:
        notes.append(f"left out {listed(beside)}")
    for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
        if weights.config or state[name].shape != target[name].shape:  # else it fits as it is
            state[name] = shapes.fit_positions(name, weights, grid, notes)
    return shapes.fill(model, state, weights.source)


def resize_timm(vit, weights, img_size, notes):
    """Change the image size of timm's own ViT, in place: resize its positions."""
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise FormatError(f"{weights.source} is no plain ViT whose positions can be resized: leave --img-size out")
    grid = patch_grid(img_size, vit.patch_embed.patch_size[0])
    vit.pos_embed = nn.Parameter(shapes.fit_positions("pos_embed", weights, grid, notes))
    vit.patch_embed.set_input_size(img_size=tuple(img_size))
    vit.config = {**vit.config, "img_size": img_size}


def foreign_config(weights, given, notes):
    """Derive the settings of a foreign file from its shapes.

    What shapes cannot tell is taken from the `given` settings, else assumed; the assumptions are added to `notes`.
    """
    size, patch = given.get("img_size"), weights.state[shapes.STEM].shape[2]
    config = shapes.shape_config(weights.state, size and patch_grid(size, patch))
    table = weights.state.get(f"blocks.0.attn.{shapes.TABLE}")
    if config["model"] is None:
        raise FormatError(f"{weights.source} has the width and depth of none of {', '.join(SIZES)}: "
                          f"give timm:NAME or a timm folder")
    if table is not None and not {"pos_embed", "head.weight"} <= weights.state.keys():
        raise FormatError(f"{weights.source} has relative positions and is no classifier with absolute ones too: fine-"
                          f"tune from it, by --model vit_tiny_rpe (or vit_tiny_simmim), and load the result")
    config["img_size"] = size or [patch * side for side in shapes.source_grid(weights)[1]]
    if table is not None:  # the paper's 79.0 % model; its table has a column for each head
        config.update(model=config["model"] + "_rpe", num_heads=table.shape[1])
        return {name: value for name, value in config.items() if name not in shapes.TOKEN_SETTINGS}
    assumed = {"num_heads": 12}
    if "decoder_dim" in config:
        assumed["decoder_heads"] = DECODERS[config["model"]][2]
    notes += [f"{name} {value} ASSUMED (else --{name.replace('_', '-')}, in figures --num-heads-of NAME=N)"
              for name, value in assumed.items() if name not in given]
    notes.append(f"{' x '.join(map(str, config['img_size']))} px" + ("" if size else ", from the number of positions"))
    if config.get("no_embed_class"):
        notes.append("class token taken to have no position")
    if config["in_chans"] == 3:
        notes.append("ImageNet's mean and deviation unless given")
    if any(name.startswith("model.blocks.") for name in weights.left_out):  # the half block of a D2-MAE
        config["decoder_block"] = 8
        notes.append("its decoder taken to read block 8")
    return {**config, **assumed}
