"""Reading weights: any source to plain tensors under public names, with what is known about them.

Files are untrusted. Tensors, plain values and SAFE_GLOBALS are read and no code runs; whatever cannot be read or is not
understood is a FormatError that names the file and a remedy. common/filling.py makes a model of what is read.
"""
import argparse
import difflib
import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from common.errors import UserError
from common.vit import SIZES

SCALAR = np.float64(0).__reduce__()[0]  # rebuilds a NumPy number; NumPy 2 moved it, and files hold either name
SAFE_GLOBALS = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode"),  # SimMIM's settings, without yacs
                (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
                *(type(np.dtype(t)) for t in ("bool", "float16", "float32", "float64", "int32", "int64"))]
STEM = "patch_embed.proj.weight"  # the name by which a ViT is known
TABLE = "relative_position_bias_table"


class FormatError(UserError):
    """A source that cannot be read, is not understood or does not fit: says which, and what to do."""


class HubError(FormatError):
    """timm's hub did not give the weights of `source`: a table can go on without that row."""

    def __init__(self, problem, source):
        super().__init__(problem)
        self.source = source


@dataclass
class Weights:
    state: dict  # name -> tensor, public names
    config: dict | None  # arguments of build_vit or MAE, where the source has them (num_heads among them)
    source: str
    layout: str  # what was recognised
    fingerprint: str  # of `state`, whatever the file around it
    left_out: list  # names of tensors beside the model (D-MAE's teacher)
    model: nn.Module | None = None  # timm's own, for `timm:NAME` and timm folders
    statistics: dict | None = None  # mean and std, per channel in 0..1, of the images, where the source says them
    classes: list | None = None  # their names, where the source is a classifier and says them


def fingerprint(state):
    """sha256 in hex over sorted names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


LAYOUTS = [  # name, prefix of the network, what may lie beside it and is left out; the first to explain all names reads
    ("mae-lite", "model.", ("tch_model.", "attn_adapter.", "hidden_adapter.")),  # the teacher and the maps
    ("MoCo-v3", "base_encoder.", ("base_encoder.head.", "momentum_encoder.", "predictor.")),  # this head: the projector
    ("DINO: the teacher", "backbone.", ("head.",)),
    ("DINO of ours: the teacher", "teacher.backbone.", ("teacher.head.", "student.")),
    ("SimMIM", "encoder.", ("encoder.mask_token", "decoder.")),
    ("plain names, as MAE, DeiT and timm", "", ()),
]


def read_weights(source):
    """A file (ours, mae-lite, MAE, MoCo-v3, DINO, SimMIM, DeiT, timm, .safetensors), a timm folder or `timm:NAME`
    -> Weights. FileNotFoundError if nothing is there, FormatError if it cannot be read or understood.
    """
    if str(source).startswith("timm:") or Path(source).is_dir():
        return read_timm(str(source))
    content = read_file(Path(source))
    config, tensors = own_config(content), unwrap(content)
    for layout, prefix, beside in LAYOUTS:
        left_out = [name for name in tensors if name.startswith(beside) or name.endswith("relative_position_index")]
        state = {name.removeprefix(prefix): value for name, value in tensors.items()
                 if name.startswith(prefix) and name not in left_out}
        if STEM in state and len(state) + len(left_out) == len(tensors):
            share_table(state)
            if strange := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
                raise FormatError(f"{source}: not tensors: {listed(strange)}. Save the state_dict without them")
            return Weights(state, config, str(source), "ours" if config else layout, fingerprint(state), left_out,
                           **{name: content.get(name) for name in ("statistics", "classes") if config})
    raise FormatError(f"{source} holds no ViT in a known layout ({'; '.join(name for name, *_ in LAYOUTS)}), but "
                      f"{listed(content)} and inside {listed(tensors)}. Save its state_dict under timm's names")


def share_table(state):
    """One table of relative positions for all blocks, as SimMIM pre-trains it, becomes each block's own, in place."""
    if (table := state.pop(f"rel_pos_bias.{TABLE}", None)) is not None:
        blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        state.update({f"blocks.{block}.attn.{TABLE}": table for block in sorted(blocks, key=int)})


def own_config(content):
    """The settings in a file of ours; None in a foreign one, whose "config" is something else."""
    config = content.get("config")
    ours = isinstance(config, dict) and {"model", "img_size", "patch_size", "num_heads"} <= config.keys()
    return config if ours else None


def unwrap(content):
    """The dict under "model", "state_dict" or "teacher" (DINO's), else all, and without DDP's prefix."""
    parts = [content[key] for key in ("model", "state_dict", "teacher") if isinstance(content.get(key), dict)]
    tensors = parts[0] if parts else content
    prefix = "module." if all(str(name).startswith("module.") for name in tensors) else ""
    return {str(name).removeprefix(prefix): value for name, value in tensors.items()}


def listed(names):
    """`2 (a, b)`: how many, and the first ten by name."""
    shown = ", ".join([str(name) for name in names][:10]) + (", ..." if len(names) > 10 else "")
    return f"{len(names)} ({shown})" if names else "0"


def read_file(path):
    """A torch or safetensors file as a dict, on the CPU."""
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: check the path, or give timm:NAME for timm's hub")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # permissions, a failing disk: not the content
    except Exception as error:  # foreign bytes raise anything, a text file a KeyError
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise FormatError(f"{path} needs {refused[1]}, which could run code, so it is not read. Where you trust "
                              f"it, save its tensors anew as {{'model': state_dict}}") from error
        raise FormatError(f"{path} ({path.stat().st_size:,} bytes) is no whole torch or safetensors file "
                          f"({type(error).__name__}): compare its size with the original, fetch it again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}, not a dict of tensors: save model.state_dict()")
    return content


def read_timm(source):
    """timm builds and loads the model of `timm:NAME` or of a folder; a ViT's settings become its `config`."""
    hub, name = source.startswith("timm:"), source.removeprefix("timm:")
    absent = [file for file in ("config.json", "model.safetensors") if not hub and not (Path(name) / file).is_file()]
    if absent:
        raise FormatError(f"{source} is a folder without {' and '.join(absent)}, so not timm's: give a file inside it")
    if hub and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise FormatError(f"{source}: timm has no such model" + (f"; perhaps {', '.join(near)}?" if near else ""))
    try:
        model = timm.create_model(name if hub else f"local-dir:{name}", pretrained=True)
    except Exception as error:  # timm, the hub and the network share no class of errors
        remedy = (f"Without the hub, fetch config.json and model.safetensors of huggingface.co/timm/{name} (the name "
                  f"with its tag) elsewhere and give the folder that holds both" if hub else "Fetch both files again")
        problem = f"timm cannot load {source} ({type(error).__name__}: {error}). {remedy}"
        raise (HubError(problem, source) if hub else FormatError(problem)) from error
    state, model.config = model.state_dict(), vit_config(model) if isinstance(model, VisionTransformer) else None
    statistics = {name: list(model.pretrained_cfg[name]) for name in ("mean", "std")}
    names = model.pretrained_cfg.get("label_names") or ()  # a list, or numbers to names
    classes = [str(name) for name in (names.values() if isinstance(names, dict) else names)] or None
    return Weights(state, model.config, source, "timm", fingerprint(state), [], model, statistics, classes)


def vit_config(vit):
    """The arguments of build_vit for a timm VisionTransformer; `model` is None where no size of ours is its."""
    return shape_config(vit.state_dict(), img_size=list(vit.patch_embed.img_size), global_pool=vit.global_pool,
                        num_heads=vit.blocks[0].attn.num_heads)


def shape_config(state, **known):
    """The arguments of build_vit, or of MAE where there is a decoder, as far as shapes tell; `known` has precedence."""
    width, in_chans, patch_size, _ = state[STEM].shape
    depth, decoder_depth = (len({name.split(".")[1] for name in state if name.startswith(part)})
                            for part in ("blocks.", "decoder_blocks."))
    size = {"embed_dim": width, "depth": depth}
    config = {"model": next((name for name in SIZES if SIZES[name] == size), None), "patch_size": patch_size,
              "in_chans": in_chans}
    if "decoder_embed.weight" in state:
        return {**config, "decoder_dim": len(state["decoder_embed.weight"]), "decoder_depth": decoder_depth, **known}
    return {**config, "num_classes": len(state.get("head.weight", ())), "class_token": "cls_token" in state,
            "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
            "global_pool": "avg" if "fc_norm.weight" in state else "token", **known}
