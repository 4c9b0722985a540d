"""A tensor left on the CPU is found without a GPU: every loss, the evaluation and the measures of Section 4 run once on
fake CUDA tensors, which have a shape, a type and a device but no values. The backward pass needs a true device, and is
in tests/test_gpu.py.
"""
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from appendix import finetune_distilled, pretrain_dino, pretrain_simmim
from appendix.dino import DINO
from appendix.simmim import SimMIM
from common.loader import to_device
from common.mae import MAE
from common.vit import SIZES, build_model, build_vit, eval_mode
from sec3_benchmark import evaluate, finetune, pretrain_mae, pretrain_mocov3, transfer
from sec3_benchmark.moco import MoCo
from sec4_analysis import attention_maps, cka, fig3_fourier, fig5_attention, similarity
from sec5_distill import pretrain_dmae
from sec5_distill.decoupled import DecoupledMAE
from sec5_distill.distillation import DMAE
from sec5_distill.teachers import Teacher

CUDA, B, CLASSES = torch.device("cuda"), 4, 3
SIZE = dict(img_size=24, patch_size=6)  # 16 patches
MIXED = SimpleNamespace(mixup=0.8, cutmix=1.0, smoothing=0.1, alpha=0.5)
PLAIN = SimpleNamespace(mixup=0.0, cutmix=0.0, smoothing=0.1)


def move(module, fn, recurse=True):
    """Module.to() for fake tensors, which cannot be swapped in place: the same tensors, and no others, are moved."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            part._parameters[name] = None if tensor is None else nn.Parameter(fn(tensor), tensor.requires_grad)
        for name, tensor in part._buffers.items():
            part._buffers[name] = None if tensor is None else fn(tensor)
    return module


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors; true ones count as those of the CPU. Where Python asks for values it gets ones."""
    def on_cpu(tensor):
        assert tensor.device.type == "cpu"
        return np.ones(tensor.shape)
    monkeypatch.setitem(SIZES, "vit_demo", {"embed_dim": 24, "depth": 2})
    monkeypatch.setitem(SIZES, "vit_tiny", {"embed_dim": 48, "depth": 2})
    monkeypatch.setattr(nn.Module, "_apply", move)
    monkeypatch.setattr(FakeTensor, "numpy", on_cpu, raising=False)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: np.ones(tensor.shape).tolist(), raising=False)
    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: False, raising=False)
    return FakeTensorMode(allow_non_fake_inputs=True)


def batch(*views, **labels):
    """What a loader gives: bytes of images under these names, on the CPU, and labels."""
    return {**{name: torch.zeros(B, 3, 24, 24, dtype=torch.uint8) for name in views}, **labels}


def labelled():
    return batch("image", label=torch.arange(B) % CLASSES)


def classifier():
    return build_vit("vit_demo", num_classes=CLASSES, drop_path=0.1, **SIZE)


def moco():
    args = SimpleNamespace(temperature=0.2, momentum=0.99)
    return pretrain_mocov3.MoCoMethod(MoCo("vit_demo", mlp_dim=16, out_dim=8, **SIZE), args, total_steps=4)


def dino():
    args = SimpleNamespace(epochs=2, out_dim=16, weight_decay=0.04, weight_decay_end=0.4, momentum=0.99,
                           teacher_temp=0.07, teacher_temp_start=0.04, teacher_temp_epochs=1)
    model = DINO("vit_demo", local_size=12, out_dim=16, hidden_dim=8, bottleneck_dim=4, **SIZE)
    return pretrain_dino.DINOMethod(model, args, SimpleNamespace(param_groups=[]), per_epoch=2)


def dmae():
    teacher = Teacher(MAE("vit_tiny", **SIZE), blocks=[2], layers=[1])
    return pretrain_dmae.DMAEMethod(DMAE(MAE("vit_demo", **SIZE), teacher, [2], [1]), teacher)


def d2mae():
    """With a teacher of other patches, registers and images."""
    vit = build_vit("vit_demo", img_size=40, patch_size=8, reg_tokens=2)
    vit.statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
    teacher = Teacher(vit, [2], grid=(4, 4), statistics={"mean": [0.4] * 3, "std": [0.2] * 3})
    return pretrain_dmae.DMAEMethod(DMAE(DecoupledMAE("vit_demo", decoder_block=1, **SIZE), teacher, [3]), teacher)


def distilled():
    vit = build_vit("vit_demo", num_classes=CLASSES, architecture=finetune_distilled.DistilledViT, **SIZE)
    return finetune_distilled.Distilled(vit, MIXED, CLASSES, teacher=classifier())


METHODS = {
    "MAE": (lambda: pretrain_mae.MAEMethod(MAE("vit_demo", **SIZE)), lambda: batch("image", noise=torch.rand(B, 16))),
    "MoCo-v3": (moco, lambda: batch("view1", "view2")),
    "D-MAE": (dmae, lambda: batch("image", noise=torch.rand(B, 16))),
    "D2-MAE": (d2mae, lambda: batch("image", noise=torch.rand(B, 16))),
    "DINO": (dino, lambda: {"large": torch.zeros(B, 2, 3, 24, 24, dtype=torch.uint8),
                            "small": torch.zeros(B, 3, 3, 12, 12, dtype=torch.uint8)}),
    "SimMIM": (lambda: pretrain_simmim.SimMIMMethod(SimMIM("vit_demo_simmim", **SIZE)),
               lambda: batch("image", mask=torch.zeros(B, 4, 4, dtype=torch.bool))),
    "fine-tuning": (lambda: finetune.Supervised(classifier(), PLAIN, CLASSES), labelled),
    "fine-tuning with mixup": (lambda: finetune.Supervised(classifier(), MIXED, CLASSES), labelled),
    "transfer": (lambda: transfer.CrossEntropy(classifier()), labelled),
    "distilled fine-tuning": (distilled, labelled),
}


def accumulate(method, loaded):
    """A method's part of a step, without the backward pass; the loss."""
    method.model.to(CUDA)
    method.prepare(CUDA, None, compiled=False)
    statistics = torch.ones(3).to(CUDA), torch.ones(3).to(CUDA)
    engine = SimpleNamespace(accumulation=1, autocast=nullcontext, log=lambda **values: None,
                             backward=lambda loss: None, batch=lambda *place: to_device(loaded, CUDA, *statistics))
    method.before_step(0)
    loss = method.accumulate(0, engine)
    method.after_step(0)
    return loss


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_is_computed_on_the_device(name, fake):
    build, load = METHODS[name]
    method = build()
    with fake:
        if name == "distilled fine-tuning":  # where D-MAE's teacher is moved by the method, this one comes moved
            eval_mode(method.teacher, CUDA)
        loss = accumulate(method, load())
    assert isinstance(loss, FakeTensor) and loss.device.type == "cuda" and loss.shape == ()


@pytest.mark.skipif(torch.__version__ < "2.14", reason="fake tensors compared the devices of fewer operations (2.10)")
@pytest.mark.parametrize("name", METHODS)
def test_a_tensor_left_on_the_cpu_is_noticed(name, fake):
    """Here the weights of the patch embedding, the only ones of four axes."""
    build, load = METHODS[name]
    method = build()
    method.model.to = lambda device: move(method.model, lambda one: one if one.ndim == 4 else one.to(device))
    with fake, pytest.raises(RuntimeError, match="same device"):
        accumulate(method, load())


def test_the_evaluation_is_computed_on_the_device(fake, monkeypatch):
    monkeypatch.setattr(evaluate, "on_device", lambda batches, *place: (to_device(one, *place) for one in batches))
    model = classifier()
    with fake:
        statistics = torch.ones(3).to(CUDA), torch.ones(3).to(CUDA)
        result = evaluate.accuracy(model.to(CUDA), [labelled()], CUDA, *statistics)
    assert result["images"] == 1


MEASURES = {
    "CKA": lambda model, images: cka.minibatch_cka([2 * similarity.layer_grams(model, [images])]),
    "CKA, authors' norm": lambda model, images: torch.stack(similarity.layer_grams(model, [images], authors_norm=True)),
    "amplitudes": lambda model, images: fig3_fourier.amplitudes(model, [images], "with-positions", sub_blocks=True),
    "attention": lambda model, images: fig5_attention.distance_and_entropy(model, [images], "pixels", keep_prefix=True),
    "maps": lambda model, images: attention_maps.head_maps(model, images, [1, 2], [1, 12]),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("model", ["vit_demo", "vit_demo_rpe", "MAE"])
def test_the_measures_are_computed_on_the_device(model, measure, fake):
    built = MAE("vit_demo", **SIZE) if model == "MAE" else build_model(model, num_classes=CLASSES, **SIZE)
    with fake:
        MEASURES[measure](eval_mode(built, CUDA), torch.rand(B, 3, 24, 24, device=CUDA))
