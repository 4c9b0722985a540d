"""Layer decay of fine-tuning and transfer (Appendix A.1, A.4): the lower a layer of the ViT, the smaller its rate."""
from common.optim import parameter_groups

EXEMPT = ("pos_embed", "cls_token")  # from weight decay, beside vectors and biases (the authors' code)


def layer_of(name, depth):
    """The layer of a ViT parameter, 0..depth+1: embeddings 0, block b is b + 1, norm and head are last."""
    if name.startswith(("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_groups(vit, weight_decay, layer_decay):
    """Groups of a classifier's parameters for an optimizer, `lr_scale` = layer_decay^(depth + 1 - layer)."""
    depth = len(vit.blocks)
    return parameter_groups(vit, weight_decay, exempt=EXEMPT,
                            scale_of=lambda name: layer_decay ** (depth + 1 - layer_of(name, depth)))
