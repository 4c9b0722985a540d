"""Layer-wise learning-rate decay of fine-tuning and transfer (Appendix A.1, A.4): lower layers learn more slowly."""
from common.optim import parameter_groups

EXEMPT = ("pos_embed", "cls_token")  # no weight decay on these, as in the authors' code; nor on vectors and biases


def layer_index(name: str, depth: int) -> int:
    """Return a ViT parameter's layer: 0 for embeddings, b + 1 for block b (from 0), depth + 1 for norm and head."""
    if name.startswith(("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_groups(vit, weight_decay: float, layer_decay: float) -> list[dict]:
    """Group a classifier's parameters for an optimizer, with lr_scale = layer_decay^(depth + 1 - layer)."""
    depth = len(vit.blocks)
    return parameter_groups(vit, weight_decay, exempt=EXEMPT,
                            scale_of=lambda name: layer_decay ** (depth + 1 - layer_index(name, depth)))
