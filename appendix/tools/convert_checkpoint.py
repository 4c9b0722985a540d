"""A checkpoint in another project's format: read any, write one, and compare what both compute before saying done.

    python appendix/tools/convert_checkpoint.py --checkpoint FILE --to timm --output FOLDER  # for timm's local-dir:
    python appendix/tools/convert_checkpoint.py --checkpoint FILE --to plain --output out.pth  # {"model": public names}
    python appendix/tools/convert_checkpoint.py --checkpoint FILE --to mocov3 --output out.tar  # module.base_encoder.*

Reads what common/pretrained.py reads: ours, mae-lite, MAE, MoCo-v3, DeiT, timm; not models of relative positions. A
file of another project does not hold the number of heads; pass --num-heads (12 is assumed, and said). What is written
does, with image size, mean and std, for timm and for the scripts here. Other projects' readers look at the tensors
alone:
what they must be told is printed. Plain is what facebook's MAE and DeiT read, and detectron2's ViTDet with
`out.pth?matching_heuristics=True`.
"""
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.models import VisionTransformer

from common import entry, options
from common.augment import CROP_PCT
from common.checkpoint import save_json, save_torch, write_atomically
from common.data import channel_statistics, with_statistics
from common.distributed import print0
from common.errors import UserError
from common.filling import DECODER, load_model
from common.mae import DECODERS, MAE
from common.pretrained import read_weights
from common.ranges import Float, Int
from common.shapes import STEM, TABLE, require_fit, shape_config, vit_config
from common.vit import SIZES, eval_mode

PREFIXES = {"plain": ("model", ""), "mocov3": ("state_dict", "module.base_encoder.")}  # outer key, before each name
TOLERANCE = 1e-5  # largest difference of the outputs, relative to the largest output


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--checkpoint", "--init", required=True, help="as common/pretrained.py reads, also timm:NAME")
    parser.add_argument("--to", choices=("timm", *PREFIXES), required=True)
    parser.add_argument("--output", required=True, help="a folder for timm, else a file")
    parser.add_argument("--num-heads", type=Int(1), help="only for a foreign file, which cannot say")
    parser.add_argument("--decoder-heads", type=Int(1), help="likewise")
    parser.add_argument("--img-size", type=Int(1), nargs="+", help="positions are resized to it; default: as "
                        "the file says, or as many positions make a square")
    parser.add_argument("--mean", type=Float(0, 1), nargs="+", help="of the inputs; default: as the file says")
    parser.add_argument("--std", type=Float(1e-6, 1), nargs="+", help="likewise")
    return parser


def export_timm(model, folder, mean, std, class_names=None):
    """Writes config.json and model.safetensors for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    A classifier, or the encoder of an MAE: no classes, token pooling, its norm. mean, std: per channel, of the inputs.
    A UserError for a model that timm's plain ViT cannot be.
    """
    if not isinstance(model, MAE) and type(model) is not VisionTransformer:
        raise UserError(f"timm's plain ViT or an MAE can be exported, not a {type(model).__name__}: give one of these")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
             if not name.startswith(DECODER)}
    if isinstance(model, MAE):
        args = shape_config(state, img_size=model.config["img_size"], num_heads=model.config["num_heads"])
    else:
        args = vit_config(model)
    # Any plain ViT of timm serves: these arguments say everything in which they differ, the number of heads too.
    name = args.pop("model")
    architecture = f"{name if name in ('vit_small', 'vit_base') else 'vit_tiny'}_patch16_224"
    args |= {"embed_dim": len(state[STEM]), "depth": len(model.blocks), "fc_norm": "fc_norm.weight" in state}
    classes, channels = args["num_classes"], args["in_chans"]
    if {len(mean), len(std)} != {channels} or (class_names and len(class_names) != classes):
        raise UserError(f"{len(mean)} means, {len(std)} deviations and {len(class_names or ())} class names do not "
                        f"suit a model of {channels} channels and {classes} classes: give one for each, or none")
    rebuilt = timm.create_model(architecture, **args)  # a model with query norms is refused here
    require_fit("the export", rebuilt.state_dict(), state)

    data = {"input_size": [channels, *args["img_size"]], "fixed_input_size": True, "mean": list(mean), "std": list(std),
            "num_classes": classes, "crop_pct": CROP_PCT, "interpolation": "bicubic", "first_conv": "patch_embed.proj",
            "classifier": "head"}
    content = {"architecture": architecture, "num_classes": classes, "num_features": args["embed_dim"],
               "global_pool": args["global_pool"], "model_args": args, "pretrained_cfg": data}
    if class_names:
        content["label_names"] = list(class_names)
    Path(folder).mkdir(parents=True, exist_ok=True)
    packed = safetensors.torch.save(state, metadata={"format": "pt"})
    write_atomically(Path(folder) / "model.safetensors", lambda file: file.write(packed))
    save_json(Path(folder) / "config.json", content)


def encoder_state(to, model):
    """All weights; for MoCo-v3, whose head is its projector, those of the encoder alone."""
    state = model.state_dict()
    if to == "mocov3" and (isinstance(model, MAE) or "fc_norm.weight" in state):
        raise UserError("MoCo-v3's encoder is a ViT that reads its class token: an MAE's decoder or an average-pooling "
                        "classifier has no place in it. Choose --to plain")
    return {name: value for name, value in state.items() if to == "plain" or not name.startswith("head.")}


def unsaid(config, statistics):
    """What other projects' readers, who look at the tensors alone, would take for something else: words to pass."""
    usual = channel_statistics(config["in_chans"])
    assumed = {"num_heads": 12, "decoder_heads": DECODERS.get(config["model"], (None,) * 3)[2],
               "img_size": config["img_size"][:1] * 2, **usual}  # a square image, as positions have it
    own = {**config, **statistics}
    return options.to_argv({name: own[name] for name, value in assumed.items() if name in own and own[name] != value})


def encode(model, images, head):
    """What a model computes: logits of a classifier, else normalised tokens, of an MAE those of all patches."""
    if isinstance(model, MAE):
        patches = model.patchify(images)
        ids = torch.arange(model.num_patches).expand(len(images), -1)
        return model.forward_encoder(patches, ids)
    return model(images) if model.num_classes and head else model.forward_features(images)


@torch.inference_mode()
def largest_difference(model, again, head=True):
    """Between the outputs of two models for the same noise images, relative to the largest output."""
    config = model.config
    images = torch.randn(2, config["in_chans"], *config["img_size"], generator=torch.Generator().manual_seed(0))
    ours, theirs = (encode(eval_mode(m, "cpu"), images, head) for m in (model, again))
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def checked(model, again, args):
    """The largest difference between both models' outputs; an error unless it is rounding alone."""
    difference = largest_difference(model, again, head=args.to != "mocov3")
    if not difference <= TOLERANCE:
        raise UserError(f"{args.output} computes something else: outputs differ by {difference:.1e}. Keep the original")
    return difference


def write_file(model, args, about):
    """A file under the chosen names with `about` beside them, read back and compared before it gets its own name."""
    key, prefix = PREFIXES[args.to]
    if any(name.endswith(TABLE) for name in model.state_dict()):
        raise UserError(f"{args.checkpoint} has relative positions, which no plain ViT has: it cannot be converted")
    state = {prefix + name: value for name, value in encoder_state(args.to, model).items()}
    draft = Path(f"{args.output}.unchecked")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_torch(draft, {key: state, **about})
        difference = checked(model, load_model(draft), args)
        draft.replace(args.output)
    finally:
        draft.unlink(missing_ok=True)
    return difference


def main(args):
    """Writes the file or folder, reads it back, compares; returns {"output", "difference"}."""
    given = dict(num_heads=args.num_heads, decoder_heads=args.decoder_heads, img_size=args.img_size)
    weights = read_weights(args.checkpoint)
    model = load_model(weights, **given)
    if model.config is None:
        raise UserError(f"{args.checkpoint} is a {type(model).__name__}: ViTs and MAEs can be converted, no others")
    if args.to != "timm" and model.config["model"] is None:
        raise UserError(f"{args.checkpoint} has the width and depth of none of {', '.join(SIZES)}: choose --to timm")
    args = with_statistics(options.replaced(args, in_chans=model.config["in_chans"]), weights)
    statistics = channel_statistics(args.in_chans, args.mean, args.std)
    names = weights.classes if getattr(model, "num_classes", 0) else None
    if args.to == "timm":
        export_timm(model, args.output, **statistics, class_names=names)
        difference = checked(model, timm.create_model(f"local-dir:{args.output}", pretrained=True), args)
    else:
        config = {**model.config, **({"num_classes": 0} if args.to == "mocov3" else {})}
        difference = write_file(model, args, {"config": config, "statistics": statistics, "classes": names})
    print0(f"{args.output}: same outputs as {args.checkpoint} (largest relative difference {difference:.1e})")
    if args.to != "timm" and (words := unsaid(model.config, statistics)):
        print0(f"tell other projects' readers: {' '.join(words)}")
    return {"output": args.output, "difference": difference}


if __name__ == "__main__":
    entry.run_script(main, build_parser())
