"""D2-MAE, decoupled distillation: the authors' follow-up to D-MAE (arXiv 2404.12210, IJCV 2025).

In D-MAE the last block serves two masters: the decoder reads it, and its attention is distilled. D2-MAE parts them. The
decoder reads an earlier block, and what is distilled is the attention of a further block behind the last one, of which
nothing but the logits is computed:

    visible patches -> blocks 1 to 8 --> norm -> decoder                      -> L_MAE
                                    |
                                    `--> blocks 9 to 12 -> q, k of block 13   -> M -> MSE with the teacher's last block

So blocks 1 to 8 learn from both losses, blocks 9 to 12 and the half block from the attention loss alone, the final norm
from the reconstruction alone. Downstream go blocks 1 to 12; whoever reads the file leaves the half block out. With
another depth or block the figure's numbers change, which no paper has tried.
"""
from timm.models.vision_transformer import Block
from torch import nn

from common.mae import MAE
from sec5_distill.distillation import block_logits


class HalfBlock(nn.Module):
    """What a block's attention logits need: norm1, and the rows of queries and keys in qkv. Names are the block's."""

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
    """An MAE whose decoder reads `decoder_block` (from 1), and whose last entry of `blocks` is a HalfBlock.

    It is the student of DMAE, which reads the logits of that last entry. The other blocks start as an MAE of the same
    seed; the half block is drawn after them, its rows as part of a whole qkv matrix, as MAE draws it.
    """

    def __init__(self, *args, decoder_block=8, **settings):
        super().__init__(*args, decoder_block=decoder_block, **settings)
        block = self._block(self.cls_token.shape[-1], self.config["num_heads"])
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        self.blocks.append(HalfBlock(block))

    def forward(self, images, noise, states):
        """Compute the reconstruction loss of a batch, and append to `states` the inputs of all blocks, 1 to 13.

        Arguments as for MAE.forward.
        """
        reconstruction = super().forward(images, noise, states)  # blocks 1 to 8, norm, decoder
        x = states[-1]  # the output of block 8
        for block in self.blocks[self.decoder_block:-1]:
            x = block(x)
            states.append(x)
        return reconstruction
