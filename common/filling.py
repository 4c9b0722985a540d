"""Filling models with the weights that common/pretrained.py has read: `load_encoder` into a ViT that a training has
built, `load_model` into the model that the weights came from.

Every name of the weights and of the model is matched, explained, or an error. The same tensors with another number of
heads are another function, so that number travels with every file of ours and is compared wherever it is known.
"""
from collections import Counter
from dataclasses import dataclass

from timm.models import VisionTransformer
from timm.models.beit import Beit
from torch import nn

from common.distributed import print0
from common.errors import FormatError, listed
from common.mae import DECODERS, MAE
from common.pretrained import Weights, read_weights
from common.shapes import STEM, TABLE, fill, fit_channels, fit_positions, require_fit, shape_config, source_grid
from common.vit import SIZES, build_model, pair, patch_grid

SECOND_HEAD = ("dist_norm.", "head_dist.")  # of appendix/finetune_distilled.py
FINAL = ("norm.", "fc_norm.", "head.")  # what follows the last block, and may start anew
DECODER = ("mask_token", "decoder_")  # MAE's part that no classifier has
# What a plain ViT's weights lack in one with relative positions, or have and it has not: it starts anew, or is dropped.
NOT_SHARED = ("relative_position_bias_table", "q_bias", "v_bias", "gamma_1", "gamma_2", "qkv.bias")


@dataclass
class Report:
    weights: Weights
    matched: int
    fresh: list  # the model's names that keep their initial values
    left_out: list  # the source's names that the model does not take
    notes: list  # what was resized, adapted or assumed

    def __str__(self):
        weights, parts = self.weights, []
        for what, names in (("fresh", self.fresh), ("left out", self.left_out)):
            counts = Counter("decoder" if name.startswith(DECODER) else name.split(".")[0] for name in names)
            parts += [f"{what} " + ", ".join(f"{part} ({n})" for part, n in counts.items())] if names else []
        heads = [f"\nWARNING: {note}" for note in self.notes if note.startswith("head count")]
        parts += [note for note in self.notes if not note.startswith("head count")]
        return (f"loaded {self.matched} of {self.matched + len(self.fresh)} tensors from {weights.source} "
                f"({weights.layout}, fingerprint {weights.fingerprint[:12]}): {'; '.join(parts) or 'all'}"
                + "".join(heads))


def load_encoder(vit, weights, keep_blocks=None, keep_head=False):
    """Loads Weights into a timm VisionTransformer or Beit, in place; returns a Report. An error leaves the model as it
    was.

    keep_blocks: None for all, or the first k (leading_blocks). keep_head: the classifier too, which must fit.
    """
    target, depth, notes = vit.state_dict(), len(vit.blocks), []
    if keep_blocks is not None and not 0 <= keep_blocks <= depth:
        raise FormatError(f"--keep-blocks {keep_blocks}: the model has {depth} blocks, so 0 to {depth}")
    compare_heads(weights, vit.blocks[0].attn.num_heads, notes)
    check_kind(weights, vit)
    # 1. What of the source is wanted, and what of the model must be in it
    if keep_head:
        require_head(weights, target, keep_blocks)
    second = () if keep_head else SECOND_HEAD
    ignored = DECODER if keep_head else (*DECODER, "head.", *second)
    if "fc_norm.weight" in target:
        ignored += ("norm.",)  # MAE's norm is never a classifier's fc_norm: that starts anew
    wanted, required = weights.state, [name for name in target if not name.startswith((*FINAL, *second))]
    if keep_blocks is not None:
        wanted, required = leading_blocks(wanted, keep_blocks), leading_blocks(target, keep_blocks)
        ignored += FINAL + tuple(name for name in weights.state if name.startswith("blocks.") and name not in wanted)
    state = {name: value for name, value in wanted.items() if name in target and not name.startswith(ignored)}
    # 2. Positions and channels are made to fit
    if "pos_embed" in state:
        state["pos_embed"] = fit_positions("pos_embed", weights, tuple(vit.patch_embed.grid_size), notes)
    if STEM in state:
        state[STEM] = fit_channels(state[STEM], target[STEM].shape[1], notes)

    # 3. Whatever is left unexplained is an error
    unshared = NOT_SHARED if isinstance(vit, Beit) and "blocks.0.attn.qkv.bias" in weights.state else ()
    missing = [name for name in required if name not in state and not name.endswith(unshared)]
    unexpected = [name for name in weights.state if name not in target
                  and not name.startswith(ignored) and not name.endswith(unshared)]
    require_fit(weights.source, target, state, missing, unexpected)
    vit.load_state_dict(state, strict=False)
    left_out = weights.left_out + [name for name in weights.state if name not in state]
    return Report(weights, len(state), [name for name in target if name not in state], left_out, notes)


def compare_heads(weights, num_heads, notes):
    """The source's number of heads must be the model's; where the source cannot say, the report does."""
    if weights.config is None:
        notes.append(f"head count is not in the file, {num_heads} assumed: with another the result is "
                     f"wrong though every shape fits (--num-heads)")
    elif (theirs := weights.config["num_heads"]) != num_heads:
        raise FormatError(f"{weights.source} has {theirs} heads and the model {num_heads}: the shapes are equal, "
                          f"the functions are not. Pass --num-heads {theirs}")


def check_kind(weights, vit):
    """Says which argument to change where the source is a model of another size or kind."""
    if STEM not in weights.state or any(name.startswith("patch_embed.backbone.") for name in weights.state):
        raise FormatError(f"{weights.source} is no plain ViT (a convolution alone embeds its patches): give one")
    theirs, ours = weights.state[STEM].shape, vit.state_dict()[STEM].shape
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
    relative, wanted = (any(name.endswith(TABLE) for name in state) for state in (weights.state, vit.state_dict()))
    if relative and not wanted:
        model = f"{name}_rpe" if "pos_embed" in weights.state else f"{name}_simmim"
        raise FormatError(f"{weights.source} has relative positions and the model has none: pass --model {model} "
                          f"(finetune.py, transfer.py); other scripts take plain ViTs only")
    size = (weights.config or {}).get("img_size")
    if relative and size and patch_grid(size, theirs[2]) != tuple(vit.patch_embed.grid_size):
        raise FormatError(f"{weights.source} has tables of relative positions for images of {size[0]} x {size[1]} px, "
                          f"which cannot be resized: leave --img-size out")


def how_it_computes(vit):
    """What no tensor tells of a timm ViT: the first block's norm and activation, as torch writes them."""
    block = vit.blocks[0]
    return f"{getattr(block, 'norm1', None)} and {getattr(getattr(block, 'mlp', None), 'act', None)}"


def require_head(weights, target, keep_blocks):
    """A classifier is kept only with its classes, all blocks, and the norm whose output it reads."""
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


def leading_blocks(state, k):
    """The pre-trained entries that `--keep-blocks k` keeps (Figures 2 and 4): none for k = 0; for k >= 1 the patch
    embedding, class token, positions and blocks 1..k. What follows (later blocks, norms, head) starts anew.
    """
    def kept(name):
        if name.startswith("blocks."):
            return int(name.split(".")[1]) < k
        return k > 0 and name.startswith(("patch_embed.", "cls_token", "reg_token", "pos_embed"))
    return {name: value for name, value in state.items() if kept(name)}


# The model that weights came from

def load_model(source, **overrides):
    """The model of a source or of Weights, loaded strictly: build_vit's or MAE, timm's own for `timm:NAME` and folders.

    Overrides (None: not given) say what a foreign file cannot (num_heads, decoder_heads, norm_pix); of our files they
    may change mask_ratio and drop_path. To another img_size the positions are resized. A FormatError if one of the rest
    contradicts the source. What is assumed or changed is printed in one line. The model's `statistics` are those of the
    images it learnt from, or None.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if "img_size" in given:
        given["img_size"] = list(pair(given["img_size"]))
    weights = source if isinstance(source, Weights) else read_weights(source)
    source, config, notes = weights.source, weights.config or {}, []
    for name, value in given.items():
        known = (name in config and name != "mask_ratio") or weights.model is not None
        if known and name != "img_size" and config.get(name) != value:
            raise FormatError(f"{source} has {name} = {config.get(name)}, not {value}: leave this setting out")
    if "dist_norm.weight" in weights.state:
        raise FormatError(f"{source} has a second head, so it is no plain ViT: appendix/finetune_distilled.py "
                          f"--eval-only evaluates it, and as --init it starts other trainings and the probes")
    model = weights.model or build_for(weights, given, notes)
    if weights.model is not None and given.get("img_size") not in (None, config.get("img_size")):
        resize_timm(model, weights, given["img_size"], notes)
    if notes:
        print0(f"{source}: {'; '.join(dict.fromkeys(notes))}")
    model.statistics = weights.statistics
    return model


def build_for(weights, given, notes):
    """A model of ours, filled strictly; a projection head is no part of it, nor an encoder's mask token."""
    config = {**(weights.config or foreign_config(weights, given, notes)), **given}
    model = MAE(**config) if "decoder_dim" in config else build_model(**config)
    target, grid = model.state_dict(), patch_grid(model.config["img_size"], config["patch_size"])
    beside = [name for name in weights.state if name not in target and name.startswith(("head.", "mask_token"))]
    state = {name: value for name, value in weights.state.items() if name not in beside}
    notes += [f"left out {listed(beside)}"] if beside else []
    for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
        if weights.config or state[name].shape != target[name].shape:  # else the size given is the file's own
            state[name] = fit_positions(name, weights, grid, notes)
    return fill(model, state, weights.source)


def resize_timm(vit, weights, img_size, notes):
    """Makes timm's own ViT one for images of another size, in place."""
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise FormatError(f"{weights.source} is no plain ViT whose positions can be resized: leave --img-size out")
    grid = patch_grid(img_size, vit.patch_embed.patch_size[0])
    vit.pos_embed = nn.Parameter(fit_positions("pos_embed", weights, grid, notes))
    vit.patch_embed.set_input_size(img_size=tuple(img_size))
    vit.config = {**vit.config, "img_size": img_size}


def foreign_config(weights, given, notes):
    """The settings of a file that holds none: from its shapes. What these cannot tell is given, or assumed and noted.
    """
    size, patch = given.get("img_size"), weights.state[STEM].shape[2]
    config = shape_config(weights.state, size and patch_grid(size, patch))
    table = weights.state.get(f"blocks.0.attn.{TABLE}")
    if config["model"] is None:
        raise FormatError(f"{weights.source} has the width and depth of none of {', '.join(SIZES)}: "
                          f"give timm:NAME or a timm folder")
    if table is not None and not {"pos_embed", "head.weight"} <= weights.state.keys():
        raise FormatError(f"{weights.source} has relative positions and is no classifier with absolute ones too: fine-"
                          f"tune from it, by --model vit_tiny_rpe (or vit_tiny_simmim), and load the result")
    config["img_size"] = size or [patch * side for side in source_grid(weights)[1]]
    if table is not None:  # the 79.0 model
        return {**{name: config[name] for name in ("patch_size", "in_chans", "num_classes", "global_pool", "img_size")},
                "model": config["model"] + "_rpe", "num_heads": table.shape[1]}
    assumed = {"num_heads": 12}
    if "decoder_dim" in config:
        assumed["decoder_heads"] = DECODERS[config["model"]][2]
    notes += [f"{name} {value} ASSUMED (else --{name.replace('_', '-')}, in figures --num-heads-of NAME=N)"
              for name, value in assumed.items() if name not in given]
    notes += [f"{' x '.join(map(str, config['img_size']))} px" + ("" if size else ", from the number of positions")]
    notes += ["class token taken to have no position"] if config.get("no_embed_class") else []
    notes += ["ImageNet's mean and deviation unless given"] if config["in_chans"] == 3 else []
    if any(name.startswith("model.blocks.") for name in weights.left_out):  # a D2-MAE's half block
        config["decoder_block"] = 8
        notes += ["its decoder taken to read block 8"]
    return {**config, **assumed}
