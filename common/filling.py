"""Loading weights that common/pretrained.py has read into a ViT that is to be trained: `load_encoder`.

A tensor of the weights or of the model that is neither matched nor known to be optional is an error. The same tensors
with another number of heads are another function, so every file of ours holds that number, and it is compared wherever
it is known.
"""
from collections import Counter
from dataclasses import dataclass

from timm.models import VisionTransformer, adapt_input_conv
from timm.models.beit import Beit

from common.errors import FormatError
from common.pretrained import Weights
from common.shapes import DECODER, STEM, TABLE, fit_positions, require_fit
from common.vit import SIZES, patch_grid

# Prefixes of names
SECOND_HEAD = ("dist_norm.", "head_dist.")  # of appendix/finetune_distilled.py
FINAL = ("norm.", "fc_norm.", "head.")  # what follows the last block, and may keep its initial values
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
    check_kind(weights, vit)
    # 1. Choose the source's tensors to load, and the model's that must be among them
    ignored, optional = (*DECODER, "head.", *SECOND_HEAD), (*FINAL, *SECOND_HEAD)
    if keep_head:
        require_head(weights, target, keep_blocks)
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
        state["pos_embed"] = fit_positions("pos_embed", weights, tuple(vit.patch_embed.grid_size), notes)
    if STEM in state:
        state[STEM] = fit_channels(state[STEM], target[STEM].shape[1], notes)
    # 3. Everything else is an error
    unshared = NOT_SHARED if isinstance(vit, Beit) and "blocks.0.attn.qkv.bias" in weights.state else ()
    missing = [name for name in required if name not in state and not name.endswith(unshared)]
    unexpected = [name for name in weights.state if name not in target
                  and not name.startswith(ignored) and not name.endswith(unshared)]
    require_fit(weights.source, target, state, missing, unexpected)
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
