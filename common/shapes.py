"""What the names and shapes of tensors tell about a ViT, and whether they fit another one or can be made to fit it."""
import math

import torch
import torch.nn.functional as F

from common.errors import FormatError, listed
from common.vit import SIZES, patch_grid

STEM = "patch_embed.proj.weight"  # the patch convolution, a tensor that every ViT has
TABLE = "relative_position_bias_table"
DECODER = ("mask_token", "decoder_")  # prefixes of names: the part of an MAE that is not its encoder
# Arguments of build_vit that no command line has, with their values in the paper's ViT
TOKEN_SETTINGS = {"class_token": True, "reg_tokens": 0, "no_embed_class": False, "init_values": None}


def vit_config(vit):
    """Return the arguments of build_vit that describe a timm VisionTransformer; see `shape_config`."""
    return shape_config(vit.state_dict(), img_size=list(vit.patch_embed.img_size), global_pool=vit.global_pool,
                        num_heads=vit.blocks[0].attn.num_heads, no_embed_class=vit.no_embed_class)


def shape_config(state, wanted=None, **known):
    """Derive the arguments of build_vit, or of MAE if there is a decoder, from the shapes in a state dict.

    Heads and image size cannot be derived; `known` arguments are added, and have precedence. "model" is None for a
    width and depth without a name in SIZES. wanted: the (rows, columns) of patches to expect, see `only_patches`.
    """
    width, in_chans, patch_size, _ = state[STEM].shape
    depth, decoder_depth = (len({name.split(".")[1] for name in state if name.startswith(part)})
                            for part in ("blocks.", "decoder_blocks."))
    size = {"embed_dim": width, "depth": depth}
    config = {"model": next((name for name in SIZES if SIZES[name] == size), None), "patch_size": patch_size,
              "in_chans": in_chans}
    if "decoder_embed.weight" in state:
        return {**config, "decoder_dim": len(state["decoder_embed.weight"]), "decoder_depth": decoder_depth, **known}
    class_token, registers = "cls_token" in state, state["reg_token"].shape[1] if "reg_token" in state else 0
    positions = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    return {**config, "num_classes": len(state.get("head.weight", ())), "class_token": class_token,
            "reg_tokens": registers, "global_pool": "avg" if "fc_norm.weight" in state else "token",
            "no_embed_class": only_patches(positions, class_token + registers, wanted),
            "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else None, **known}  # LayerScale


def only_patches(positions, tokens, wanted=None):
    """Guess from their number if positions are those of patches alone (DeiT III), or also of `tokens` other tokens.

    The answer is the one by which there are as many patches as in the `wanted` (rows, columns), else as in a square.
    """
    patches = positions - tokens
    if wanted and math.prod(wanted) in (patches, positions):
        return patches != math.prod(wanted)
    return is_square(positions) and not is_square(patches)


def is_square(count):
    return count >= 0 and math.isqrt(count) ** 2 == count


def tokens_of(weights, model, img_size, patch_size):
    """Return the TOKEN_SETTINGS that build_vit must get so that its ViT fits the Weights; {} for the paper's ViT."""
    if weights is None or STEM not in weights.state or model not in SIZES:
        return {}
    config = weights.config or shape_config(weights.state, patch_grid(img_size, patch_size))
    return {name: config[name] for name, usual in TOKEN_SETTINGS.items() if config.get(name, usual) != usual}


def source_grid(weights, wanted=None):
    """Return the number of positions of other tokens, and the (rows, columns) of the patches' positions.

    Rows and columns follow from the settings. Without settings they are those of a square or the `wanted` ones: raises
    FormatError if neither has as many patches as there are positions, or if both do and differ.
    """
    if "dist_token" in weights.state:
        raise FormatError(f"{weights.source} is a distilled DeiT (dist_token, head_dist), not a plain ViT: give the "
                          f"plain DeiT's weights")
    config = weights.config or shape_config(weights.state, wanted)
    prefix = 0 if config.get("no_embed_class") else config.get("class_token", True) + config.get("reg_tokens", 0)
    count = weights.state["pos_embed"].shape[1] - prefix
    side = math.isqrt(max(count, 0))
    grids = [patch_grid(config["img_size"], config["patch_size"])] if weights.config else [wanted, (side, side)]
    fitting = {grid for grid in grids if grid and math.prod(grid) == count}
    if not fitting:
        why = f"its grid is {grids[0]}" if weights.config else "no square, and no image size is in the file"
        raise FormatError(f"{weights.source} has positions for {count} patches ({why}): give its --img-size, height "
                          f"and width, or a file with settings")
    if len(fitting) > 1:
        raise FormatError(f"{weights.source} has positions for {count} patches, {grids[0]} or {grids[1]}, and does not "
                          f"say which: let convert_checkpoint.py write its --img-size into a file, and give that one")
    return prefix, fitting.pop()


def fit_positions(name, weights, grid, notes):
    """Return the position embedding `name` of the Weights, (1, tokens, D), resized to a grid of patches, bicubic.

    (timm 1.0.26 would not resize it to a square grid with as many patches, such as from 2 x 8 to 4 x 4.)
    """
    table, (prefix, old) = weights.state[name], source_grid(weights, grid)
    if not (weights.config or prefix) and "cls_token" in weights.state:
        notes.append("class token taken to have no position")
    if old == grid:
        return table
    notes.append(f"positions resized from {old[0]}x{old[1]} to {grid[0]}x{grid[1]}")
    patches = table[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True)
    return torch.cat([table[:, :prefix], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def require_fit(source, target, state, missing=None, unexpected=None):
    """Raise FormatError, with counts and names, if tensors are missing or unexpected or if shapes differ.

    By default all of the model's names (target) are required, and all others unexpected.
    """
    missing = [name for name in target if name not in state] if missing is None else missing
    unexpected = [name for name in state if name not in target] if unexpected is None else unexpected
    shapes = [f"{name} {list(state[name].shape)} for {list(target[name].shape)}" for name in state
              if name in target and state[name].shape != target[name].shape]
    if missing or unexpected or shapes:
        raise FormatError(f"{source} does not fit the model: missing {listed(missing)}, unexpected "
                          f"{listed(unexpected)}, other shapes {listed(shapes)}. Compare size, patch size, channels, "
                          f"classes and pooling")


def fill(model, state, source):
    """Load a state dict into a model, strictly. Returns the model. Raises FormatError and leaves it unchanged."""
    require_fit(source, model.state_dict(), state)
    model.load_state_dict(state)
    return model
