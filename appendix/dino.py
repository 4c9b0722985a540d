"""DINO (Caron et al. 2021) for the paper's ViTs, in the order of a training step (Appendix B.5).

The student processes two large and several small crops of an image, the teacher only the large ones. For each crop the
student predicts the teacher's output for every other large crop. The teacher's weights are a moving average of the
student's; centring and a low temperature keep its output from collapsing.
"""
import copy

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn
from torchvision.transforms import Compose, RandomGrayscale, RandomSolarize

from common.augment import RandomFlip, RandomResizedCrop
from common.images import from_pillow, to_pillow
from common.vit import build_vit, patch_grid
from sec3_benchmark.moco import GaussianBlur, colour_jitter

# Crops

def crop_transform(size, scale, *, blur, solarize=0.0, sigma=2.0):
    """Build the transform of one crop, in the order of the official code: flip before colours, blur near the end.

    blur, solarize: probabilities. uint8 tensor (C, H, W) -> contiguous uint8 tensor (C, *size).
    """
    return Compose([RandomResizedCrop(size, scale, interpolation="bicubic"), RandomFlip(), to_pillow, colour_jitter(),
                    RandomGrayscale(p=0.2), GaussianBlur(blur, sigma), RandomSolarize(threshold=128, p=solarize),
                    from_pillow])


class MultiCrop:
    """Transform an image to {"large": (2, C, H, W), "small": (n, C, h, w)}, uint8; no "small" if local_crops is 0."""

    def __init__(self, size, local_size, local_crops, global_min=0.4, local_scale=(0.05, 0.4), sigma=2.0):
        self.large = [crop_transform(size, (global_min, 1.0), blur=1.0, sigma=sigma),
                      crop_transform(size, (global_min, 1.0), blur=0.1, solarize=0.2, sigma=sigma)]
        self.small = [crop_transform(local_size, local_scale, blur=0.5, sigma=sigma)] * local_crops

    def __call__(self, image):
        views = {"large": torch.stack([crop(image) for crop in self.large])}
        return views | ({"small": torch.stack([crop(image) for crop in self.small])} if self.small else {})


# The model

class NormLinear(nn.Module):
    """Linear layer without bias, its weight rows normalised to length weight_g, here fixed to 1: (B, C) -> (B, out).

    Parameter names are those of PyTorch's weight norm, which itself cannot be deep-copied.
    """

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x):
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """DINO's projection head: class tokens (B, D) -> MLP of three layers -> L2 norm -> last layer (B, out_dim)."""

    def __init__(self, in_dim, out_dim, hidden_dim, bottleneck_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                                 nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp[::2]:
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = NormLinear(bottleneck_dim, out_dim)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=1))


class DINO(nn.Module):
    """DINO's student and teacher, each a ViT `backbone` with a projection `head`; parameters have the official names.

    `config` describes the backbone of the teacher, the one that --init takes from the checkpoint.
    """

    def __init__(self, model="vit_tiny", *, img_size=224, local_size=96, patch_size=16, in_chans=3, num_heads=12,
                 out_dim=65536, hidden_dim=2048, bottleneck_dim=256, drop_path=0.1):
        super().__init__()
        settings = dict(img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=0,
                        num_heads=num_heads, global_pool="token")
        backbone = build_vit(model, drop_path=drop_path, **settings)
        self.config = backbone.config
        self.student = nn.ModuleDict({"backbone": backbone,
                                      "head": DINOHead(backbone.embed_dim, out_dim, hidden_dim, bottleneck_dim)})
        self.teacher = nn.ModuleDict({"backbone": build_vit(model, **settings),  # without drop path
                                      "head": copy.deepcopy(self.student["head"])})
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        matrix = resize_matrix(patch_grid(img_size, patch_size), patch_grid(local_size, patch_size))
        self.register_buffer("resize", matrix, persistent=False)

    def forward(self, large, small=None):
        """Compute the student's outputs for all crops, ((2 + n) B, K), and the teacher's for the large ones, (2 B, K).

        large: (B, 2, C, H, W); small: (B, n, C, h, w). Outputs are ordered by crop, then by image.
        """
        large = crops_first(large)
        tokens = [self.class_tokens(self.student, large)]
        if small is not None:
            tokens.append(self.class_tokens(self.student, crops_first(small), self.resize))
        student = self.student["head"](torch.cat(tokens))
        with torch.no_grad():
            teacher = self.teacher["head"](self.class_tokens(self.teacher, large))
        return student, teacher

    @staticmethod
    def class_tokens(network, crops, resize=None):
        """Encode crops to class tokens after the final norm: (B, C, h, w) -> (B, D).

        resize: the matrix of `resize_matrix` that resizes the position embedding to the grid of small crops.
        """
        vit = network["backbone"]
        x = vit.patch_embed.proj(crops).flatten(2).transpose(1, 2)  # (B, L, D)
        positions = vit.pos_embed
        if resize is not None:
            with torch.autocast(x.device.type, enabled=False):
                positions = torch.cat([positions[:, :1], resize @ positions[:, 1:]], dim=1)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + positions
        return vit.norm(vit.blocks(x))[:, 0]

    @torch.no_grad()
    def update_teacher(self, m):
        """Update all parameters: teacher = m * teacher + (1 - m) * student."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - m)


def crops_first(crops):
    """Flatten crops, ordered by crop, then by image: (B, n, C, H, W) -> (n B, C, H, W)."""
    return crops.transpose(0, 1).flatten(0, 1)


def resize_matrix(old, new):
    """Compute bicubic resizing from grid `old` (H, W) to `new` (h, w) as a matrix (h * w, H * W).

    As a matrix product its gradient is deterministic on every device. Departure: the official code scales by
    (h + 0.1) / H instead of h / H.
    """
    unit = torch.eye(old[0] * old[1]).view(-1, 1, *old)
    matrix = F.interpolate(unit, size=tuple(new), mode="bicubic", align_corners=False).flatten(1).T
    return matrix.clone(memory_format=torch.contiguous_format)


# The loss

def dino_loss(student, teacher, center, teacher_temp, student_temp=0.1):
    """Compute the mean cross-entropy between teacher and student over all pairs of different crops, in float32.

    student (n B, K), teacher (2 B, K): ordered by crop, then by image; center (1, K) -> scalar.
    """
    B = len(teacher) // 2
    targets = ((teacher.float() - center) / teacher_temp).softmax(dim=1).view(2, B, -1)
    logs = (student.float() / student_temp).log_softmax(dim=1).view(-1, B, targets.shape[2])
    pairs = []
    for t, target in enumerate(targets):
        for s, log in enumerate(logs):
            if s != t:
                pairs.append(-(target * log).sum(dim=1).mean())  # no matrix product: autocast would compute it in bf16
    return torch.stack(pairs).mean()


def update_center(center, teacher_sum, rows, momentum=0.9):
    """Return the new centre, (1, K): a moving average of the teacher's outputs; teacher_sum (K,): the sum of `rows`."""
    return momentum * center + (1 - momentum) * teacher_sum / rows


# Schedules and gradients

def teacher_temperature(epoch, start, end, warmup_epochs):
    """Return the temperature in a 0-based epoch: linear from `start` to `end` during the warm-up, then `end`."""
    return start + (end - start) * epoch / max(1, warmup_epochs - 1) if epoch < warmup_epochs else end


def clip_each(parameters, limit):
    """Clip the gradient norm of each parameter separately to `limit`, as the official code does.

    Norms stay on the device: reading them would synchronise it once per parameter.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scales = [(limit / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(gradients)]
    torch._foreach_mul_(gradients, scales)
