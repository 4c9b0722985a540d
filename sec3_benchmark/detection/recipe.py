"""detectron2's parameter groups and step schedule (Appendix A.5)."""
from torch import nn


def detector_groups(model, weight_decay):
    """Group the parameters as detectron2 does: weight decay on all, biases too, except norms and position embedding."""
    norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    exempt = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    exempt.add(id(model.backbone.pos_embed))
    parts = [[p for p in model.parameters() if (id(p) in exempt) == out] for out in (False, True)]
    return [{"params": part, "lr_scale": 1.0, "weight_decay": decay} for part, decay in zip(parts, (weight_decay, 0.0))]


def step_rate(step, *, peak, total_steps, warmup_steps):
    """Compute the learning rate of a 0-based step: the peak, a tenth after 24/27 of all steps, a hundredth after 26/27.

    The warm-up is linear, from a thousandth of the peak.
    """
    drops = (step >= total_steps * 24 // 27) + (step >= total_steps * 26 // 27)
    return peak * 0.1**drops * (0.001 + 0.999 * min(1.0, step / max(1, warmup_steps)))
