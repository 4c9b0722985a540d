"""What the names and shapes of tensors tell about a ViT, and whether they fit another one or can be made to fit it."""
import math

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer, adapt_input_conv

from common.errors import FormatError, listed
from common.vit import SIZES, patch_grid

STEM = "patch_embed.proj.weight"  # the patch convolution, a tensor that every ViT has
TABLE = "relative_position_bias_table"
# Arguments of build_vit that no command line has, with their values in the paper's ViT
TOKENS = {"class_token": True, "reg_tokens": 0, "no_embed_class": False, "init_values": None}


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
    """Return the TOKENS that build_vit must be given so that its ViT fits the Weights; {} for the paper's ViT."""
    if weights is None or STEM not in weights.state or model not in SIZES:
        return {}
    config = weights.config or shape_config(weights.state, patch_grid(img_size, patch_size))
    return {name: config[name] for name, usual in TOKENS.items() if config.get(name, usual) != usual}


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


def fit_channels(weight, in_chans, notes):
    """Convert a patch convolution (D, C, p, p) to in_chans channels, such that a grey image gives the same as in RGB.

    From C = 3 as timm does: summed for 1 channel, else repeated in turn and scaled by 3 / in_chans.
    """
    if weight.shape[1] == 1 and in_chans == 3:
        notes.append("input channel shared out to 3")
        return weight.repeat(1, 3, 1, 1) / 3
    if weight.shape[1] == in_chans or weight.shape[1] != 3:  # if they still differ, require_fit raises the error
        return weight
    notes.append(f"input channels {'summed' if in_chans == 1 else 'repeated and scaled'} from 3 to {in_chans}")
    return adapt_input_conv(in_chans, weight)


def check_kind(weights, vit):
    """Raise FormatError if the Weights belong to a ViT of another size or kind; it says which argument to change."""
    source, target = weights.state, vit.state_dict()
    heads = vit.blocks[0].attn.num_heads
    if weights.config and (found := weights.config["num_heads"]) != heads:
        raise FormatError(f"{weights.source} has {found} heads and the model {heads}: the shapes are equal, the "
                          f"functions are not. Pass --num-heads {found}")
    if STEM not in source or any(name.startswith("patch_embed.backbone.") for name in source):
        raise FormatError(f"{weights.source} is no plain ViT, in which one convolution embeds the patches: give one")
    theirs, ours = source[STEM].shape, target[STEM].shape
    name = next((name for name, size in SIZES.items() if size["embed_dim"] == theirs[0]), None)
    if theirs[0] != ours[0]:
        raise FormatError(f"{weights.source} is {theirs[0]} wide and the model {ours[0]}: "
                          + (f"pass --model {name}" if name else "no --model has that width"))
    if theirs[2:] != ours[2:]:
        raise FormatError(f"{weights.source} has patches of {theirs[2]} px and the model of {ours[2]}: "
                          f"pass --patch-size {theirs[2]}")
    ways = [how_it_computes(one) for one in (weights.model, vit) if isinstance(one, VisionTransformer)]
    if len(set(ways)) > 1:
        raise FormatError(f"{weights.source} computes by {ways[0]}, the model by {ways[1]}: the shapes are equal, the "
                          f"functions are not. Give other weights")
    relative = any(name.endswith(TABLE) for name in source)
    if relative and not any(name.endswith(TABLE) for name in target):
        model = f"{name}_rpe" if "pos_embed" in source else f"{name}_simmim"
        raise FormatError(f"{weights.source} has relative positions and the model has none: pass --model {model} "
                          f"(finetune.py, transfer.py); other scripts take plain ViTs only")
    size = (weights.config or {}).get("img_size")
    if relative and size and patch_grid(size, theirs[2]) != tuple(vit.patch_embed.grid_size):
        raise FormatError(f"{weights.source} has tables of relative positions for images of {size[0]} x {size[1]} px, "
                          f"which cannot be resized: leave --img-size out")


def how_it_computes(vit):
    """Describe the first block's norm and activation, which no tensor tells, as torch prints the modules."""
    block = vit.blocks[0]
    return f"{getattr(block, 'norm1', None)} and {getattr(getattr(block, 'mlp', None), 'act', None)}"


def require_head(weights, target, keep_blocks):
    """Raise FormatError unless the classifier of the Weights can be kept.

    It needs all blocks, the same number of classes, and the norm whose output it was trained on. target: the model's
    state dict.
    """
    theirs, ours = (len(state.get("head.weight", ())) for state in (weights.state, target))
    norms = [name for name in ("fc_norm.weight", "norm.weight") if name in weights.state] or ["no norm"]
    norm = "fc_norm.weight" if "fc_norm.weight" in target else "norm.weight"
    if not theirs:
        raise FormatError(f"{weights.source} holds no classifier: fine-tune from it first (without --eval-only)")
    if "head_dist.weight" in weights.state.keys() - target.keys():
        raise FormatError(f"{weights.source} has a second head: appendix/finetune_distilled.py --eval-only asks both")
    if theirs != ours or norm not in norms or keep_blocks is not None:
        raise FormatError(f"{weights.source} classifies {theirs} classes after {norms[0]}, the model {ours} after "
                          f"{norm}, with keep_blocks={keep_blocks}: the head cannot be kept. norm.weight: "
                          f"--global-pool token")


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
