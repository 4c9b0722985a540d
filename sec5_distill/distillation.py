"""Distillation during pre-training (Section 5): the student's attention is drawn to that of a larger, frozen teacher.

    L = L_MAE + weight * sum over the chosen blocks of MSE(A^T, M A^S)

A = q k^T / sqrt(head dim) are the logits before the softmax, class token included, of the patches that the student
sees; M is a learnable map from the student's heads to the teacher's. Hidden states can be matched too: an option of the
authors' code that the paper does not use. Blocks are counted from 1 as in the paper. Hidden state 0 to depth - 1 is the
norm1 output of the block after it, `depth` the final norm's.

A straightforward version keeps the attention of every block in both networks and runs the teacher to its end
(tests/straightforward_dmae.py). This one computes logits in the chosen blocks alone, beside the unchanged fused
forward, and runs the teacher no further than the last block asked about, without gradient, on half-precision weights.
"""
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

from common.errors import UserError
from common.mae import MAE, take
from common.vit import choose_attention, final_norm


def attention_loss(student, teacher, head_map):
    """MSE(A^T, M A^S), mean over all elements, in float32: logits (B, hS, N, N), (B, hT, N, N), head_map (hT, hS)."""
    with torch.autocast(student.device.type, enabled=False):
        mapped = F.conv2d(student.float(), head_map.float()[:, :, None, None])
        return F.mse_loss(mapped, teacher.float())


def hidden_loss(student, teacher, width_map):
    """The same for hidden states (B, N, DS), (B, N, DT), width_map (DT, DS)."""
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(F.linear(student.float(), width_map.float()), teacher.float())


def block_logits(block, x):
    """A of a block, from the block's input x (B, N, D): (B, heads, N, N). As sec4_analysis's attention_logits, but
    without computing the values, whose weights are the last third.
    """
    attention, (B, N, _) = block.attn, x.shape
    rows, bias = 2 * len(attention.qkv.weight) // 3, attention.qkv.bias
    qk = F.linear(block.norm1(x), attention.qkv.weight[:rows], None if bias is None else bias[:rows])
    q, k = qk.view(B, N, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head dim)
    return (attention.q_norm(q) * attention.scale) @ attention.k_norm(k).transpose(-2, -1)


def check_places(what, numbers, first, last, whose):
    """An error for a number outside first..last."""
    if outside := [number for number in numbers if not first <= number <= last]:
        raise UserError(f"{what} {' '.join(map(str, outside))}: the {whose} has {first} to {last}")


def check_pairs(depth, blocks, their_blocks, layers, their_layers):
    """An error for what a student of this depth cannot distil: numbers that it lacks, lists that are no pairs."""
    if not blocks and not layers:
        raise UserError("nothing to distil: give --distill-blocks or --hidden-layers, or run pretrain_mae.py")
    check_places("--distill-blocks", blocks, 1, depth, "student")
    check_places("--hidden-layers", layers, 0, depth, "student")
    for ours, theirs in ((blocks, their_blocks), (layers, their_layers)):
        if len(ours) != len(theirs) or len(set(ours)) < len(ours):
            raise UserError(f"the student's {list(ours)} and the teacher's {list(theirs)} are no pairs: give as "
                            f"many of each, and none of the student's twice")


def check_teacher_places(depth, blocks, layers):
    """An error for numbers that a teacher of this depth lacks."""
    check_places("--teacher-blocks", blocks, 1, depth, "teacher")
    check_places("--teacher-hidden-layers", layers, 0, depth, "teacher")


def grid_of(encoder):
    """Rows and columns of patches of an MAE or a timm ViT; an error for what cannot be a teacher."""
    if isinstance(encoder, MAE):
        return encoder.grid
    plain = isinstance(encoder, VisionTransformer) and all(type(block) is Block for block in encoder.blocks)
    if not plain or encoder.cls_token is None or encoder.num_prefix_tokens != 1:
        raise UserError(f"a {type(encoder).__name__} is no teacher: give an MAE or a plain ViT whose tokens are, like "
                        f"the student's, patches and one class token")
    return tuple(encoder.patch_embed.grid_size)


def check_same_patches(student, encoder):
    """The teacher must read the student's patches: its positions are not resized, its pixels not resampled."""
    theirs, ours = ({"grid": grid_of(model), "patch size": model.patch_embed.proj.kernel_size[0],
                     "channels": model.patch_embed.proj.in_channels} for model in (encoder, student))
    if ours != theirs:
        raise UserError(f"the teacher reads {theirs} and the student {ours}: choose --img-size, --patch-size and "
                        f"--in-chans as the teacher has them, or another --teacher")


class Teacher(nn.Module):
    """A frozen encoder, an MAE or a timm ViT, read at `blocks` (attention logits) and `layers` (hidden states).

    It is no part of the student's model, so that nothing of it enters a checkpoint, an optimizer or train().
    """

    def __init__(self, encoder, blocks=(), layers=()):
        super().__init__()
        rows, columns = grid_of(encoder)
        check_teacher_places(len(encoder.blocks), blocks, layers)
        self.asked_blocks, self.asked_layers = tuple(blocks), tuple(layers)
        self.num_patches = rows * columns
        self.whole = max((*(number - 1 for number in blocks), *layers), default=0)  # blocks that must run whole
        self.proj, self.cls_token, self.pos_embed = encoder.patch_embed.proj, encoder.cls_token, encoder.pos_embed
        self.norm_pre = getattr(encoder, "norm_pre", nn.Identity())
        self.blocks, self.norm = encoder.blocks[:self.whole + 1], final_norm(encoder)
        self.num_heads, self.dim = encoder.blocks[0].attn.num_heads, encoder.cls_token.shape[-1]
        self.eval().requires_grad_(False)

    def prepare(self, device, dtype):
        """Moves it; matrices go to the type that autocast would cast them to in each step. Norms stay in float32."""
        self.to(device)
        choose_attention(self, device, dtype)
        for module in self.modules():
            if dtype is not None and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)
        return self

    @torch.no_grad()
    def forward(self, visible, ids_visible):
        """Visible patches (B, K, p*p*C) at places (B, K) -> the logits (B, hT, 1 + K, 1 + K) of each block asked about
        and the hidden states (B, 1 + K, DT) of each layer, in the order in which they were asked about.
        """
        x = self.embed(visible, ids_visible)
        logits, hidden = {}, {}
        for i in range(self.whole + 1):
            if i + 1 in self.asked_blocks:
                logits[i + 1] = block_logits(self.blocks[i], x)
            if i in self.asked_layers:
                hidden[i] = (self.blocks[i].norm1 if i < len(self.blocks) else self.norm)(x)
            if i < self.whole:
                x = self.blocks[i](x)
        return [logits[number] for number in self.asked_blocks], [hidden[number] for number in self.asked_layers]

    def embed(self, patches, ids):
        """As MAE.embed, with the class token in front: (B, K, p*p*C), (B, K) -> (B, 1 + K, D)."""
        weight, positions = self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.pos_embed[0]
        tokens = F.linear(patches, weight, self.proj.bias) + positions[-self.num_patches:][ids]
        cls_token = self.cls_token
        if len(positions) > self.num_patches:  # timm's no_embed_class leaves the class token without a position
            cls_token = cls_token + positions[:1]
        return self.norm_pre(torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1))


class DMAE(nn.Module):
    """The student `model`, and its maps to a teacher: named as in the authors' files, so that whatever reads those
    reads this as an MAE. `blocks` and `layers` of the student pair with those that the teacher was asked about.
    """

    def __init__(self, student, teacher, blocks=(), layers=(), attention_weight=1.0, hidden_weight=1.0):
        super().__init__()
        check_pairs(len(student.blocks), blocks, teacher.asked_blocks, layers, teacher.asked_layers)
        heads, dim = student.config["num_heads"], student.pos_embed.shape[-1]
        self.model, self.config = student, student.config
        self.blocks, self.layers = tuple(blocks), tuple(layers)
        self.weights = {"mae": 1.0, "attention": attention_weight, "hidden": hidden_weight}
        # PyTorch's default initial values; the authors count these from 0: block 12 has adapter11
        self.attn_adapter = nn.ModuleDict({f"adapter{block - 1}": nn.Conv2d(heads, teacher.num_heads, 1, bias=False)
                                           for block in blocks})
        self.hidden_adapter = nn.ModuleDict({f"adapter{layer}": nn.Linear(dim, teacher.dim, bias=False)
                                             for layer in layers})

    def forward(self, images, noise, teacher_logits, teacher_hidden):
        """The loss of a batch and its parts before they are weighted: images (B, C, H, W), noise (B, L) as for MAE; the
        last two from Teacher.forward for the same patches.
        """
        student, states = self.model, []
        parts = {"mae": student(images, noise, states)}
        if self.blocks:
            parts["attention"] = sum(
                attention_loss(block_logits(student.blocks[block - 1], states[block - 1]), target,
                               self.attn_adapter[f"adapter{block - 1}"].weight.flatten(1))
                for block, target in zip(self.blocks, teacher_logits, strict=True))
        if self.layers:
            norms = [*(block.norm1 for block in student.blocks), student.norm]
            parts["hidden"] = sum(
                hidden_loss(norms[layer](states[layer]), target, self.hidden_adapter[f"adapter{layer}"].weight)
                for layer, target in zip(self.layers, teacher_hidden, strict=True))
        return sum(self.weights[name] * part for name, part in parts.items()), parts


def visible_patches(student, images, noise):
    """What the student sees of a batch: its visible patches (B, K, p*p*C) and their places (B, K)."""
    ids_visible = noise.argsort(dim=1)[:, :student.num_visible]
    return take(student.patchify(images), ids_visible), ids_visible
