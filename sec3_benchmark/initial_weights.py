"""What a training takes from the weights it starts from (--init): first settings of its model, then tensors.

Every name of the weights and of the model is matched, explained, or an error. The same tensors with another number of
heads are another function, so that number is compared wherever it is known. common/weights.py does the reading.
"""
from collections import Counter
from dataclasses import dataclass

from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.beit import Beit

from common import options
from common.distributed import print0
from common.formats import require_fit, source_grid
from common.vit import SIZES, pair, patch_grid
from common.weights import STEM, TABLE, FormatError, Weights

SECOND_HEAD = ("dist_norm.", "head_dist.")  # of appendix/finetune_distilled.py
FINAL = ("norm.", "fc_norm.", "head.")  # what follows the last block, and may start anew
DECODER = ("mask_token", "decoder_")  # MAE's part that no classifier has
# What a plain ViT's weights lack in one with relative positions, or have and it has not: it starts anew, or is dropped
# (trap 8).
NOT_SHARED = ("relative_position_bias_table", "q_bias", "v_bias", "gamma_1", "gamma_2", "qkv.bias")
SHAPE = ("model", "img_size", "patch_size", "in_chans", "num_heads")  # of a ViT, whatever is made of it


def alike(name, ours, theirs):
    """Whether two values of a setting mean the same: 64 pixels are 64 x 64."""
    return pair(ours) == pair(theirs) if name in ("img_size", "position_size") else ours == theirs


def take_config(args, config, names=None):
    """Copies what a checkpoint says of its model (of `names` alone, if given) into `args`, and prints it. What the
    command line or a table row gave is kept; with config None nothing happens.
    """
    explicit = getattr(args, "explicit", ())
    taken = {name: value for name, value in (config or {}).items() if value is not None and name not in explicit
             and name in (names or vars(args)) and not alike(name, vars(args).get(name, value), value)}
    if taken:
        print0("as the weights say:", *options.words(taken))
    vars(args).update(taken)


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
        state["pos_embed"] = fit_positions(weights, vit, notes)
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
    relative, wanted = (any(name.endswith(TABLE) for name in state) for state in (weights.state, vit.state_dict()))
    if relative and not wanted:
        model = f"{name}_rpe" if "pos_embed" in weights.state else f"{name}_simmim"
        raise FormatError(f"{weights.source} has relative positions and the model has none: pass --model {model} "
                          f"(finetune.py, transfer.py); other scripts take plain ViTs only")
    size = (weights.config or {}).get("img_size")
    if relative and size and patch_grid(size, theirs[2]) != tuple(vit.patch_embed.grid_size):
        raise FormatError(f"{weights.source} has tables of relative positions for images of {size[0]} x {size[1]} px, "
                          f"which cannot be resized: leave --img-size out")


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


def fit_positions(weights, vit, notes):
    """The source's pos_embed, its patches (not the other tokens) resized to the model's grid, bicubic, as timm does."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    new = tuple(vit.patch_embed.grid_size)
    old = source_grid(weights, prefix, new)
    if old != new:
        notes.append(f"positions resized from {old[0]}x{old[1]} to {new[0]}x{new[1]}")
    return resample_abs_pos_embed(weights.state["pos_embed"], list(new), list(old), num_prefix_tokens=prefix)


def fit_channels(weight, in_chans, notes):
    """The patch convolution (D, C, p, p) for other inputs: a grey image read as RGB gives the same, either way. From
    C = 3 as timm does: summed for 1 channel, else repeated in turn and scaled by 3 / in_chans.
    """
    if weight.shape[1] == 1 and in_chans == 3:
        notes.append("input channel shared out to 3")
        return weight.repeat(1, 3, 1, 1) / 3
    if weight.shape[1] == in_chans or weight.shape[1] != 3:  # require_fit refuses what is still unequal
        return weight
    notes.append(f"input channels {'summed' if in_chans == 1 else 'repeated and scaled'} from 3 to {in_chans}")
    return adapt_input_conv(in_chans, weight)
