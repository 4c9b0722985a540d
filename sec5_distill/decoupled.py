"""D2-MAE, decoupled distillation: the authors' follow-up to D-MAE (arXiv 2404.12210, IJCV 2025).

In D-MAE the last block has two tasks: the decoder reads its output, and its attention is distilled. D2-MAE decouples
them. The decoder reads an earlier block, and distillation reads the attention logits of an additional block behind the
last one, of which nothing else is computed:

    visible patches -> blocks 1 to 8 --> norm -> decoder                      -> L_MAE
                                    |
                                    `--> blocks 9 to 12 -> q, k of block 13   -> M -> MSE with the teacher's last block

So blocks 1 to 8 learn from both losses, blocks 9 to 12 and the half block 13 from the attention loss alone, the final
norm from the reconstruction loss alone. Downstream models are blocks 1 to 12; common/pretrained.py leaves the half
block out. Another depth or another block for the decoder is possible here, but no paper has tried it.
"""
from timm.models.vision_transformer import Block
from torch import nn

from common.mae import MAE
from sec5_distill.distillation import block_logits


class HalfBlock(nn.Module):
    """The parts of a block that its attention logits need, under the same names: norm1, and qkv's rows of q and k."""

    def __init__(self, block: Block):
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        del self.attn.proj
        qkv, rows = self.attn.qkv, 2 * self.attn.num_heads * self.attn.head_dim
        qkv.weight, qkv.bias = (nn.Parameter(values.detach()[:rows].clone()) for values in (qkv.weight, qkv.bias))

    def forward(self, x):
        """Compute the attention logits: (B, N, D) -> (B, heads, N, N)."""
        return block_logits(self, x)


class DecoupledMAE(MAE):
    """An MAE whose decoder reads the output of block `decoder_block` (from 1), with a HalfBlock behind its last block.

    It is the student of DMAE, which distils the logits of the half block. All else is initialised as in an MAE of the
    same seed. The half block is initialised after it, its rows as part of a whole qkv matrix, as MAE does.
    """

    def __init__(self, *args, decoder_block=8, **settings):
        super().__init__(*args, decoder_block=decoder_block, **settings)
        block = self._block(self.cls_token.shape[-1], self.config["num_heads"])
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        self.blocks.append(HalfBlock(block))

    def forward(self, images, noise, states):
        """Compute the reconstruction loss as MAE.forward; append the inputs of all blocks, 1 to 13, to `states`."""
        reconstruction = super().forward(images, noise, states)  # blocks 1 to 8, norm, decoder
        x = states[-1]  # the output of block 8
        for block in self.blocks[self.decoder_block:-1]:
            x = block(x)
            states.append(x)
        return reconstruction
