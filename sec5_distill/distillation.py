"""Distillation during pre-training (Section 5): the student's attention logits are trained to match a frozen teacher's.

    L = L_MAE + weight * sum over the chosen blocks of MSE(A^T, M A^S)

A^T and A^S are the teacher's and the student's logits q k^T / sqrt(head dim), before the softmax, of the class token
and the visible patches; M is a learnable linear map from the student's heads to the teacher's. Hidden states can be
distilled too, an option of the authors' code that the paper does not use. Blocks are counted from 1, as in the paper.
Hidden state i < depth is the norm1 output of block i + 1, hidden state `depth` is the output of the final norm.

A straightforward version stores the attention of every block of both networks and runs the whole teacher
(tests/straightforward_dmae.py). Here logits are computed in the chosen blocks only, in addition to the unchanged fused
forward, and the teacher runs only up to the last block that is read, without gradient, in the autocast dtype.
"""
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

from common.errors import UserError
from common.mae import MAE, take
from common.vit import final_norm, set_fused_attention


def attention_loss(student: torch.Tensor, teacher: torch.Tensor, head_map: torch.Tensor) -> torch.Tensor:
    """Compute MSE(A^T, M A^S) in float32, the mean over all elements.

    student: logits A^S (B, hS, N, N); teacher: logits A^T (B, hT, N, N); head_map: M (hT, hS).
    """
    with torch.autocast(student.device.type, enabled=False):
        # M A^S = einsum("ts,bsqk->btqk", M, A^S), as a 1x1 convolution over heads: einsum would round differently
        mapped = F.conv2d(student.float(), head_map.float()[:, :, None, None])
        return F.mse_loss(mapped, teacher.float())


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, width_map: torch.Tensor) -> torch.Tensor:
    """Compute the same loss for hidden states: student (B, N, DS), teacher (B, N, DT), width_map (DT, DS)."""
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(F.linear(student.float(), width_map.float()), teacher.float())


def block_logits(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Compute a block's attention logits A from its input: (B, N, D) -> (B, heads, N, N).

    Equal to attention_logits in sec4_analysis/attention.py, but does not compute the values v: of the qkv weights only
    the first two thirds are used.
    """
    attention, (B, N, _) = block.attn, x.shape
    rows, bias = 2 * len(attention.qkv.weight) // 3, attention.qkv.bias
    qk = F.linear(block.norm1(x), attention.qkv.weight[:rows], None if bias is None else bias[:rows])
    q, k = qk.view(B, N, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head dim)
    return (attention.q_norm(q) * attention.scale) @ attention.k_norm(k).transpose(-2, -1)


def check_range(what, numbers, first, last, whose):
    """Raise UserError if a number is outside first..last; `what` names the setting, `whose` the network."""
    if outside := [number for number in numbers if not first <= number <= last]:
        raise UserError(f"{what} {' '.join(map(str, outside))}: the {whose} has {first} to {last}")


def check_pairs(depth, blocks, their_blocks, layers, their_layers):
    """Raise UserError if a student of this depth lacks a block or hidden layer, or if the lists do not form pairs."""
    if not blocks and not layers:
        raise UserError("nothing to distil: give --distill-blocks or --hidden-layers, or run pretrain_mae.py")
    check_range("--distill-blocks", blocks, 1, depth, "student")
    check_range("--hidden-layers", layers, 0, depth, "student")
    for ours, theirs in ((blocks, their_blocks), (layers, their_layers)):
        if len(ours) != len(theirs) or len(set(ours)) < len(ours):
            raise UserError(f"the student's {list(ours)} and the teacher's {list(theirs)} are no pairs: give as "
                            f"many of each, and none of the student's twice")


def check_teacher_blocks(depth, blocks, layers):
    """Raise UserError if a teacher of this depth lacks one of these blocks or hidden layers."""
    check_range("--teacher-blocks", blocks, 1, depth, "teacher")
    check_range("--teacher-hidden-layers", layers, 0, depth, "teacher")


def grid_of(encoder) -> tuple[int, int]:
    """Return the (rows, columns) of patches of an MAE or timm ViT. Raises UserError if it cannot be a teacher."""
    if isinstance(encoder, MAE):
        return encoder.grid
    plain = isinstance(encoder, VisionTransformer) and all(type(block) is Block for block in encoder.blocks)
    if not plain or encoder.cls_token is None or encoder.num_prefix_tokens != 1:
        raise UserError(f"a {type(encoder).__name__} is no teacher: give an MAE or a plain ViT whose tokens are, like "
                        f"the student's, patches and one class token")
    return tuple(encoder.patch_embed.grid_size)


def check_same_patches(student, encoder):
    """Raise UserError unless the teacher has the student's patch grid, patch size and channels; nothing is resized."""
    theirs, ours = ({"grid": grid_of(model), "patch size": model.patch_embed.proj.kernel_size[0],
                     "channels": model.patch_embed.proj.in_channels} for model in (encoder, student))
    if ours != theirs:
        raise UserError(f"the teacher reads {theirs} and the student {ours}: choose --img-size, --patch-size and "
                        f"--in-chans as the teacher has them, or another --teacher")


class Teacher(nn.Module):
    """A frozen encoder, MAE or timm ViT, whose attention logits (`blocks`) and hidden states (`layers`) are read.

    It is not a submodule of the student's model, so it enters no checkpoint and no optimizer, and stays in eval mode.
    """

    def __init__(self, encoder, blocks=(), layers=()):
        super().__init__()
        rows, columns = grid_of(encoder)
        check_teacher_blocks(len(encoder.blocks), blocks, layers)
        self.logit_blocks, self.hidden_layers = tuple(blocks), tuple(layers)
        self.num_patches = rows * columns
        # a block whose logits are read last need not run: its input is enough
        self.num_full_blocks = max((*(number - 1 for number in blocks), *layers), default=0)
        self.proj, self.cls_token, self.pos_embed = encoder.patch_embed.proj, encoder.cls_token, encoder.pos_embed
        self.norm_pre = getattr(encoder, "norm_pre", nn.Identity())
        self.blocks, self.norm = encoder.blocks[:self.num_full_blocks + 1], final_norm(encoder)
        self.num_heads, self.dim = encoder.blocks[0].attn.num_heads, encoder.cls_token.shape[-1]
        self.eval().requires_grad_(False)

    def prepare(self, device, dtype):
        """Move the teacher to the device and cast its matrices to the autocast dtype (None: float32). Returns it.

        This saves autocast's cast in every step. Norms stay in float32.
        """
        self.to(device)
        set_fused_attention(self, device, dtype)
        for module in self.modules():
            if dtype is not None and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)
        return self

    @torch.no_grad()
    def forward(self, visible, ids_visible):
        """Compute what is read of the visible patches: visible (B, K, p*p*C), patch indices (B, K).

        Returns a list of logits (B, hT, 1 + K, 1 + K) in the order of `blocks`, and a list of hidden states
        (B, 1 + K, DT) in the order of `layers`.
        """
        x = self.embed(visible, ids_visible)
        logits, hidden = {}, {}
        for i in range(self.num_full_blocks + 1):
            if i + 1 in self.logit_blocks:
                logits[i + 1] = block_logits(self.blocks[i], x)
            if i in self.hidden_layers:
                hidden[i] = (self.blocks[i].norm1 if i < len(self.blocks) else self.norm)(x)
            if i < self.num_full_blocks:
                x = self.blocks[i](x)
        return [logits[number] for number in self.logit_blocks], [hidden[number] for number in self.hidden_layers]

    def embed(self, patches, ids):
        """Embed patches as MAE.embed does, class token first: (B, K, p*p*C), patch indices (B, K) -> (B, 1 + K, D)."""
        weight, positions = self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.pos_embed[0]
        tokens = F.linear(patches, weight, self.proj.bias) + positions[-self.num_patches:][ids]
        cls_token = self.cls_token
        if len(positions) > self.num_patches:  # timm's no_embed_class leaves the class token without a position
            cls_token = cls_token + positions[:1]
        return self.norm_pre(torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1))


class DMAE(nn.Module):
    """The student `model` and its linear maps to the teacher's heads and width.

    Parameter names are those of the authors' files, so code that reads their checkpoints as an MAE reads these too. The
    student's `blocks` and `layers` are paired, in order, with those of the Teacher.
    """

    def __init__(self, student, teacher, blocks=(), layers=(), attention_weight=1.0, hidden_weight=1.0):
        super().__init__()
        check_pairs(len(student.blocks), blocks, teacher.logit_blocks, layers, teacher.hidden_layers)
        heads, dim = student.config["num_heads"], student.pos_embed.shape[-1]
        self.model, self.config = student, student.config
        self.blocks, self.layers = tuple(blocks), tuple(layers)
        self.weights = {"mae": 1.0, "attention": attention_weight, "hidden": hidden_weight}
        # PyTorch's default initialisation. The authors' names count blocks from 0: block 12 has adapter11
        self.attn_adapter = nn.ModuleDict({f"adapter{block - 1}": nn.Conv2d(heads, teacher.num_heads, 1, bias=False)
                                           for block in blocks})
        self.hidden_adapter = nn.ModuleDict({f"adapter{layer}": nn.Linear(dim, teacher.dim, bias=False)
                                             for layer in layers})

    def forward(self, images, noise, teacher_logits, teacher_hidden):
        """Compute the loss of a batch and a dict of its parts before weighting.

        images (B, C, H, W), noise (B, L): as for MAE.forward; teacher_logits, teacher_hidden: the result of
        Teacher.forward for the same visible patches.
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
    """Select the patches that the student sees: visible patches (B, K, p*p*C) and their indices (B, K)."""
    ids_visible = noise.argsort(dim=1)[:, :student.num_visible]
    return take(student.patchify(images), ids_visible), ids_visible
