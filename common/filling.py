"""Loading the weights that common/pretrained.py has read into models.

`load_encoder` loads them into a ViT that is to be trained, `load_model` rebuilds the model from which they came. In
both, a tensor of the weights or of the model that is neither matched nor known to be optional is an error. The same
tensors with another number of heads are another function, so every file of ours holds that number, and it is compared
wherever it is known.
"""
from collections import Counter
from dataclasses import dataclass

from timm.models import VisionTransformer
from timm.models.beit import Beit
from torch import nn

from common import shapes
from common.distributed import print0
from common.errors import FormatError, listed
from common.mae import DECODERS, MAE
from common.pretrained import Weights, read_weights
from common.vit import SIZES, build_model, pair, patch_grid

# Prefixes of names
SECOND_HEAD = ("dist_norm.", "head_dist.")  # of appendix/finetune_distilled.py
FINAL = ("norm.", "fc_norm.", "head.")  # what follows the last block, and may keep its initial values
DECODER = ("mask_token", "decoder_")  # the part of an MAE that is not its encoder
# Suffixes of the names in which a plain ViT and one with relative positions differ. From a plain ViT to the other kind,
# those of the weights are dropped and those of the model keep their initial values, as in the authors' code.
NOT_SHARED = ("relative_position_bias_table", "q_bias", "v_bias", "gamma_1", "gamma_2", "qkv.bias")


@dataclass
class Report:
    """The outcome of load_encoder; str() of it gives the lines to print."""

    weights: Weights
    matched: int  # number of tensors that were loaded
    fresh: list  # names of the model's tensors that keep their initial values
    left_out: list  # names of the source's tensors that were not loaded
    notes: list  # what was resized or adapted
    num_heads: int  # of the model

    def __str__(self):
        weights, parts = self.weights, []
        for what, names in (("fresh", self.fresh), ("left out", self.left_out)):
            counts = Counter("decoder" if name.startswith(DECODER) else name.split(".")[0] for name in names)
            if names:
                parts.append(f"{what} " + ", ".join(f"{part} ({count})" for part, count in counts.items()))
        text = (f"loaded {self.matched} of {self.matched + len(self.fresh)} tensors from {weights.source} "
                f"({weights.layout}, fingerprint {weights.fingerprint[:12]}): {'; '.join(parts + self.notes) or 'all'}")
        if weights.config is None:
            text += (f"\nWARNING: head count is not in the file, {self.num_heads} assumed: with another the result is "
                     f"wrong though every shape fits (--num-heads)")
        return text


def load_encoder(vit, weights, keep_blocks=None, keep_head=False):
    """Load Weights into a timm VisionTransformer or Beit, in place. Returns a Report.

    keep_blocks: the number of leading blocks to load (see `leading_blocks`), None for all. keep_head: also load the
    classifier, which must fit. Raises FormatError if the weights do not fit, and leaves the model unchanged.
    """
    target, depth, notes = vit.state_dict(), len(vit.blocks), []
    if keep_blocks is not None and not 0 <= keep_blocks <= depth:
        raise FormatError(f"--keep-blocks {keep_blocks}: the model has {depth} blocks, so 0 to {depth}")
    shapes.check_kind(weights, vit)
    # 1. Choose the source's tensors to load, and the model's that must be among them
    ignored, optional = (*DECODER, "head.", *SECOND_HEAD), (*FINAL, *SECOND_HEAD)
    if keep_head:
        shapes.require_head(weights, target, keep_blocks)
        ignored, optional = DECODER, FINAL
    if "fc_norm.weight" in target:
        ignored += ("norm.",)  # as in the authors' code, MAE's norm does not become fc_norm, which starts anew
    wanted, required = weights.state, [name for name in target if not name.startswith(optional)]
    if keep_blocks is not None:
        wanted, required = leading_blocks(wanted, keep_blocks), leading_blocks(target, keep_blocks)
        ignored += FINAL + tuple(name for name in weights.state if name.startswith("blocks.") and name not in wanted)
    state = {name: value for name, value in wanted.items() if name in target and not name.startswith(ignored)}
    # 2. Make positions and channels fit
    if "pos_embed" in state:
        state["pos_embed"] = shapes.fit_positions("pos_embed", weights, tuple(vit.patch_embed.grid_size), notes)
    if shapes.STEM in state:
        state[shapes.STEM] = shapes.fit_channels(state[shapes.STEM], target[shapes.STEM].shape[1], notes)
    # 3. Everything else is an error
    unshared = NOT_SHARED if isinstance(vit, Beit) and "blocks.0.attn.qkv.bias" in weights.state else ()
    missing = [name for name in required if name not in state and not name.endswith(unshared)]
    unexpected = [name for name in weights.state if name not in target
                  and not name.startswith(ignored) and not name.endswith(unshared)]
    shapes.require_fit(weights.source, target, state, missing, unexpected)
    vit.load_state_dict(state, strict=False)
    left_out = weights.left_out + [name for name in weights.state if name not in state]
    fresh = [name for name in target if name not in state]
    return Report(weights, len(state), fresh, left_out, notes, vit.blocks[0].attn.num_heads)


def leading_blocks(state, k):
    """Return the part of a state dict that `--keep-blocks k` keeps (Figures 2 and 4).

    For k = 0 nothing; for k >= 1 the patch embedding, class token, positions and blocks 1..k. Later blocks, norms and
    head keep their initial values.
    """
    def kept(name):
        if name.startswith("blocks."):
            return int(name.split(".")[1]) < k
        return k > 0 and name.startswith(("patch_embed.", "cls_token", "reg_token", "pos_embed"))
    return {name: value for name, value in state.items() if kept(name)}


# The model from which the weights came

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
        return {name: value for name, value in config.items() if name not in shapes.TOKENS}
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
