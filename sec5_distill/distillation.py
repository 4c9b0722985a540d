"""Distillation during pre-training (Section 5): the student's attention logits are trained to match a frozen teacher's.

    L = L_MAE + weight * sum over the chosen blocks of MSE(A^T, M A^S)

A^T and A^S are the attention logits q k^T / sqrt(head dim) of teacher and student, before the softmax, over the class
token and the visible patches. M is a learnable linear map from the student's heads to the teacher's. Blocks are counted
from 1, as in the paper. Hidden states can be distilled too: an option of the authors' code that the paper does not use.
Hidden state i < depth is the norm1 output of block i + 1, hidden state `depth` the output of the final norm.

A straightforward version stores the attention of every block of both networks and runs the whole teacher
(tests/straightforward_dmae.py). Here logits are computed in the chosen blocks only, in addition to the unchanged fused
forward. The teacher: teachers.py. The authors' follow-up, D2-MAE: decoupled.py.
"""
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from common.errors import UserError
from sec4_analysis.attention import attention_logits


def attention_loss(A_S: torch.Tensor, A_T: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """Compute MSE(A^T, M A^S) in float32, the mean over all elements.

    A_S: the student's logits (B, hS, N, N); A_T: the teacher's (B, hT, N, N); M: (hT, hS).
    """
    with torch.autocast(A_S.device.type, enabled=False):
        # M A^S = einsum("ts,bsqk->btqk", M, A^S), as a 1x1 convolution over heads: einsum would round differently
        M_A_S = F.conv2d(A_S.float(), M.float()[:, :, None, None])
        return F.mse_loss(M_A_S, A_T.float())


def hidden_loss(H_S: torch.Tensor, H_T: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """Compute MSE(H^T, M H^S) for hidden states, likewise: H_S (B, N, DS), H_T (B, N, DT), M (DT, DS)."""
    with torch.autocast(H_S.device.type, enabled=False):
        return F.mse_loss(F.linear(H_S.float(), M.float()), H_T.float())


def block_logits(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Compute a block's attention logits A from its input: (B, N, D) -> (B, heads, N, N).

    The block's MLP and the rows of v in its qkv are not used, so a block may be without them (decoupled.py).
    """
    return attention_logits(block.attn, block.norm1(x))


def check_range(what, numbers, first, last, whose):
    """Raise UserError if a number is outside first..last. what: the flag; whose: "student" or "teacher"."""
    if outside := [number for number in numbers if not first <= number <= last]:
        raise UserError(f"{what} {' '.join(map(str, outside))}: the {whose} has {first} to {last}")


def check_pairs(depth, blocks, their_blocks, layers, their_layers):
    """Raise UserError unless the student's blocks and layers exist and each has one of the teacher's to match."""
    if not blocks and not layers:
        raise UserError("nothing to distil: give --distill-blocks or --hidden-layers, or run pretrain_mae.py")
    check_range("--distill-blocks", blocks, 1, depth, "student")
    check_range("--hidden-layers", layers, 0, depth, "student")
    for ours, theirs in ((blocks, their_blocks), (layers, their_layers)):
        if len(ours) != len(theirs) or len(set(ours)) < len(ours):
            raise UserError(f"the student's {list(ours)} and the teacher's {list(theirs)} are no pairs: give as "
                            f"many of each, and none of the student's twice")


def visible_ids(student, noise):
    """Return the indices (B, K) of the patches that the student sees."""
    return noise.argsort(dim=1)[:, :student.num_visible]


def shared_tokens(tokens, target):
    """Drop the class token, the first of tokens (B, N, D), if the teacher's target (..., N, width) has none."""
    return tokens[:, tokens.shape[1] - target.shape[-2]:]


class DMAE(nn.Module):
    """The student, `model`, and the linear maps M from its heads and width to the teacher's.

    The student's `blocks` and hidden `layers` are matched, in this order, with those of the Teacher. Parameter names
    are the authors', so code that reads an MAE from their checkpoints can read one from these.
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

        images (B, C, H, W), noise (B, L): as for MAE.forward. teacher_logits, teacher_hidden: the result of
        Teacher.forward for the same visible patches.
        """
        student, states = self.model, []
        parts = {"mae": student(images, noise, states)}
        for block, A_T in zip(self.blocks, teacher_logits, strict=True):
            A_S = block_logits(student.blocks[block - 1], shared_tokens(states[block - 1], A_T))
            M = self.attn_adapter[f"adapter{block - 1}"].weight.flatten(1)
            parts["attention"] = parts.get("attention", 0) + attention_loss(A_S, A_T, M)
        norms = [*(block.norm1 for block in student.blocks), student.norm]
        for layer, H_T in zip(self.layers, teacher_hidden, strict=True):
            H_S = norms[layer](shared_tokens(states[layer], H_T))
            M = self.hidden_adapter[f"adapter{layer}"].weight
            parts["hidden"] = parts.get("hidden", 0) + hidden_loss(H_S, H_T, M)
        return sum(self.weights[name] * part for name, part in parts.items()), parts
