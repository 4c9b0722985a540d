"""Reading weights from a file, a timm folder or timm's hub: tensors under public names, and their model's settings.

Files are not trusted. Only tensors, plain values and SAFE_GLOBALS are read, and no code in a file is run. For a file
that cannot be read or understood, a FormatError names the file and a remedy. common/filling.py loads the weights into a
model that is to be trained, common/rebuilding.py makes their own model.
"""
import argparse
import difflib
import hashlib
import re
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from common.checkpoint import verify
from common.data import channel_statistics
from common.distributed import print0
from common.errors import FormatError, UserError, listed
from common.shapes import STEM, TABLE, vit_config

SCALAR = np.float64(0).__reduce__()[0]  # the function that rebuilds a NumPy number, renamed in NumPy 2
SAFE_GLOBALS = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode"),  # SimMIM's settings, read without yacs
                (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
                *(type(np.dtype(t)) for t in ("bool", "float16", "float32", "float64", "int32", "int64"))]
# Keys under which a file may hold the state dict: the first of them that is there is read.
PARTS = ("model", "state_dict", "teacher", "model_ema", "state_dict_ema", "model_state_dict", "module")
# What DDP, averaged models, torch.compile, FSDP and activation checkpointing insert into names.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
NO_WEIGHTS = ("relative_position_index", "n_averaged")  # buffers, which have nothing to load
LEAST = {"num_classes": 0, "reg_tokens": 0, "patch_size": 1, "in_chans": 1, "num_heads": 1, "decoder_dim": 1,
         "decoder_depth": 1, "decoder_heads": 1}  # settings that are whole numbers -> smallest value


class HubError(FormatError):
    """timm's hub did not deliver the weights `source`. A table catches this and goes on without that row."""

    def __init__(self, problem, source):
        super().__init__(problem)
        self.source = source


@dataclass
class Weights:
    """Weights as they were read. Creating them raises FormatError if no model can be made of them (see `problem`)."""

    state: dict  # public name -> tensor
    config: dict | None  # arguments of build_model or MAE, num_heads among them; None if the source does not hold them
    source: str  # the file, folder or timm:NAME, for messages
    layout: str  # the entry of LAYOUTS that was recognised, or "ours" or "timm"
    left_out: list  # names of the source's tensors that are no part of the model, such as a teacher's
    model: nn.Module | None = None  # timm's own model, for `timm:NAME` and timm folders
    statistics: dict | None = None  # {"mean", "std"} of the images per channel, in 0..1, if the source holds them
    classes: list | None = None  # names of the classes, if the source holds them
    fingerprint: str = field(init=False)  # of `state` alone: the same in every layout and format

    def __post_init__(self):
        if found := problem(self):
            raise FormatError(f"{self.source}: {found}")
        self.fingerprint = fingerprint(self.state)


def problem(weights):
    """Say why no model can be made of Weights (values that are not finite, invalid settings), or return None."""
    state, config, images, classes = weights.state, weights.config or {}, weights.statistics, weights.classes
    if strange := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        return f"not tensors: {listed(strange)}. Save the state_dict without them"
    if spoilt := [name for name, value in state.items() if not value.float().isfinite().all()]:
        return (f"NaN or infinite values in {listed(spoilt)}: its training diverged, or the file is damaged. Take an "
                f"earlier checkpoint, or fetch it again")
    if wrong := [name for name, value in config.items() if not valid_setting(name, value)]:
        return f"its settings say {wrong[0]} = {config[wrong[0]]!r}, which no model has: the file was changed"
    outputs = len(state.get("head.weight", ()))
    if classes is not None and not (isinstance(classes, (list, tuple)) and outputs in (0, len(classes))):
        return f"it names {str(classes)[:50]}, which is no name for each of its {outputs} classes: correct that"
    try:
        if images:
            channel_statistics(len(images["mean"]), images["mean"], images["std"])
    except (TypeError, KeyError, AttributeError, UserError):
        return f"its images have {images}, where a mean and a std should be, from 0 to 1 for each channel. Correct them"
    return None


def valid_setting(name, value):
    """Return whether a setting in a file has a possible value, so that it is safe to compute with it."""
    if name in LEAST:
        return type(value) is int and value >= LEAST[name]  # isinstance would accept True
    if name == "img_size":
        sides = value if isinstance(value, (list, tuple)) else ()
        return len(sides) in (1, 2) and all(type(side) is int and side > 0 for side in sides)
    if name == "mask_ratio":
        return isinstance(value, (float, int)) and 0 <= value <= 1
    if name == "model":
        return value is None or isinstance(value, str)  # None: a width and depth without a name in SIZES
    return name != "global_pool" or isinstance(value, str)


def fingerprint(state):
    """Hash a state dict: the sha256, in hexadecimal, of its sorted names with dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Name, prefix of the model's tensors, prefixes of tensors to leave out; the first layout that explains all names counts
LAYOUTS = [
    ("mae-lite", "model.", ("tch_model.", "attn_adapter.", "hidden_adapter.")),  # D-MAE's teacher and adapters
    ("MoCo-v3", "base_encoder.", ("base_encoder.head.", "momentum_encoder.", "predictor.")),  # this head: the projector
    ("DINO: the teacher", "backbone.", ("head.",)),
    ("DINO of ours: the teacher", "teacher.backbone.", ("teacher.head.", "student.")),
    ("SimMIM", "encoder.", ("encoder.mask_token", "decoder.")),
    ("plain names, as MAE, DeiT and timm", "", ()),
]


def read_weights(source):
    """Read Weights from a file (ours or in one of LAYOUTS, torch or safetensors), a timm folder or `timm:NAME`.

    Raises FileNotFoundError if there is no such file, and FormatError if it cannot be read or understood.
    """
    if str(source).startswith("timm:") or Path(source).is_dir():
        return read_timm(str(source))
    return interpret(read_file(Path(source)), source)


def interpret(content, source):
    """Make Weights of a file's content, a dict. `source` names it in messages. Raises FormatError."""
    config, tensors = own_config(content), unwrap(content, source)
    half = half_blocks(tensors)
    for layout, prefix, beside in LAYOUTS:
        left_out = [name for name in tensors if name.startswith((*beside, *half)) or name.endswith(NO_WEIGHTS)]
        state = {name.removeprefix(prefix): value for name, value in tensors.items()
                 if name.startswith(prefix) and name not in left_out}
        if STEM in state and len(state) + len(left_out) == len(tensors):
            share_table(state)
            about = content if config else {}  # a foreign file may hold something else under these names
            return Weights(state, config, str(source), "ours" if config else layout, left_out, None,
                           about.get("statistics"), about.get("classes"))
    raise FormatError(f"{source} holds no ViT in a known layout ({'; '.join(name for name, *_ in LAYOUTS)}), but "
                      f"{listed(content)} and inside {listed(tensors)}. Save its state_dict under timm's names")


def half_blocks(names):
    """Return the prefixes of blocks that have norm1 and qkv alone, as D2-MAE's last (sec5_distill/decoupled.py)."""
    modules = defaultdict(set)
    for name in names:
        if match := re.fullmatch(r"(model\.blocks\.\d+\.)(.+)\.(?:weight|bias)", name):
            modules[match[1]].add(match[2])
    return [block for block, inside in modules.items() if inside == {"norm1", "attn.qkv"}]


def share_table(state):
    """Give each block a copy of the table of relative positions that all share in SimMIM, in place."""
    if (table := state.pop(f"rel_pos_bias.{TABLE}", None)) is not None:
        blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        state.update({f"blocks.{block}.attn.{TABLE}": table for block in sorted(blocks, key=int)})


def own_config(content):
    """Return the settings in a file of ours; None for a foreign file, which may have another kind of "config"."""
    config = content.get("config")
    ours = isinstance(config, dict) and {"model", "img_size", "patch_size", "num_heads"} <= config.keys()
    return config if ours else None


def unwrap(content, source):
    """Find the state dict in a file's content, however deep, and remove the WRAPPERS from its names.

    Of several state dicts the one under the first of PARTS is taken, and a line says so.
    """
    while parts := [key for key in PARTS if isinstance(content.get(key), dict)]:
        if len(parts) > 1:
            print0(f"{source} holds weights as {' and '.join(parts)}: {parts[0]} is read (to read another, save it "
                   f"alone as {{'model': state_dict}})")
        content = content[parts[0]]
    bare = {name: ".".join(part for part in str(name).split(".") if part not in WRAPPERS) for name in content}
    if len(set(bare.values())) < len(bare):
        raise FormatError(f"{source} holds two models, one in a wrapper ({', '.join(WRAPPERS)}): save one of them")
    return {bare[name]: value for name, value in content.items()}


def read_file(path):
    """Read a torch or safetensors file onto the CPU: a dict. Raises FileNotFoundError, FormatError or OSError."""
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: check the path, or give timm:NAME for timm's hub")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):  # files from before torch 1.6 are not, and have no checksums
            verify(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # permissions or a failing disk: the content is not at fault
    except Exception as error:  # damaged or foreign bytes can raise any exception
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise FormatError(f"{path} needs {refused[1]}, which could run code, so it is not read. Where you trust "
                              f"it, save its tensors anew as {{'model': state_dict}}") from error
        raise FormatError(f"{path} ({path.stat().st_size:,} bytes) is no whole torch or safetensors file "
                          f"({type(error).__name__}): compare its size with the original, fetch it again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}, not a dict of tensors: save model.state_dict()")
    return content


def read_timm(source):
    """Read Weights by timm, from its hub (`timm:NAME`) or from a folder. Raises HubError or FormatError."""
    hub, name = source.startswith("timm:"), source.removeprefix("timm:")
    absent = [file for file in ("config.json", "model.safetensors") if not (Path(name) / file).is_file()]
    if absent and not hub:
        raise FormatError(f"{source} is a folder without {' and '.join(absent)}, so not timm's: give a file inside it")
    if hub and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise FormatError(f"{source}: timm has no such model" + (f"; perhaps {', '.join(near)}?" if near else ""))
    try:
        model = timm.create_model(name if hub else f"local-dir:{name}", pretrained=True)
    except Exception as error:  # errors of timm, the hub and the network have no common class
        remedy = (f"Without the hub, fetch config.json and model.safetensors of huggingface.co/timm/{name} (the name "
                  f"with its tag) elsewhere and give the folder that holds both" if hub else "Fetch both files again")
        problem = f"timm cannot load {source} ({type(error).__name__}: {error}). {remedy}"
        raise (HubError(problem, source) if hub else FormatError(problem)) from error
    plain = isinstance(model, VisionTransformer) and hasattr(model.blocks[0], "attn")  # some have blocks of other kinds
    state, model.config = model.state_dict(), vit_config(model) if plain else None
    statistics = {name: list(model.pretrained_cfg[name]) for name in ("mean", "std")}
    names = model.pretrained_cfg.get("label_names") or ()
    if isinstance(names, dict):  # number -> name. JSON has made the numbers text, but "2" must come before "10"
        names = [names[number] for number in sorted(names, key=lambda number: (len(str(number)), str(number)))]
    return Weights(state, model.config, source, "timm", [], model, statistics, [str(name) for name in names] or None)
