"""Convert a checkpoint to the format of another project, and verify that the result computes the same outputs.

    python appendix/tools/convert_checkpoint.py --checkpoint FILE --to timm --output FOLDER  # for timm's local-dir:
    python appendix/tools/convert_checkpoint.py --checkpoint FILE --to plain --output out.pth  # {"model": public names}
    python appendix/tools/convert_checkpoint.py --checkpoint FILE --to mocov3 --output out.tar  # module.base_encoder.*

Reads all formats of common/pretrained.py: ours, mae-lite, MAE, MoCo-v3, DeiT, timm. Models with relative positions
cannot be converted. Checkpoints of other projects do not hold the number of heads: pass --num-heads (otherwise 12 is
assumed, and reported). The output holds it, with image size, mean and std, for timm and for the scripts here. Other
projects read the tensors alone; what they must be told is printed. "plain" is read by facebook's MAE and DeiT, and by
detectron2's ViTDet as `out.pth?matching_heuristics=True`.
"""
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.models import VisionTransformer

from common import entry, options
from common.augment import CROP_PCT
from common.checkpoint import save_json, save_torch, write_atomically
from common.data import channel_statistics
from common.distributed import print0
from common.errors import UserError
from common.mae import DECODERS, MAE
from common.pretrained import read_weights
from common.ranges import Float, Int
from common.rebuilding import load_model
from common.shapes import DECODER, STEM, TABLE, require_fit, shape_config, vit_config
from common.vit import SIZES, eval_mode

PREFIXES = {"plain": ("model", ""), "mocov3": ("state_dict", "module.base_encoder.")}  # outer key, prefix of each name
TOLERANCE = 1e-5  # of the outputs, relative to the largest one


def add_unrecorded(parser):
    """Add the arguments for what checkpoints of other projects may not record: heads, image size, mean, deviation."""
    parser.add_argument("--num-heads", type=Int(1), help="only for other projects' checkpoints, which do not hold it")
    parser.add_argument("--img-size", type=Int(1), nargs="+", metavar="PX", help="position embeddings are resized to "
                        "it; default: the checkpoint's, else the square that has as many positions")
    parser.add_argument("--mean", type=Float(0, 1), nargs="+",
                        help="of the images, per channel, in 0..1; default: the checkpoint's")
    parser.add_argument("--std", type=Float(1e-6, 1), nargs="+", help="likewise")


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--checkpoint", "--init", required=True, help="in any format of common/pretrained.py")
    parser.add_argument("--to", choices=("timm", *PREFIXES), required=True)
    parser.add_argument("--output", required=True, help="a folder for timm, else a file")
    add_unrecorded(parser)
    parser.add_argument("--decoder-heads", type=Int(1), help="as --num-heads")
    return parser


def export_timm(model, folder, mean, std, class_names=None):
    """Write config.json and model.safetensors for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    model: a classifier, or an MAE, of which the encoder with its norm is written: no classes, token pooling.
    mean, std: per channel of the inputs. Raises UserError for a model that is not a plain ViT of timm.
    """
    if not isinstance(model, MAE) and type(model) is not VisionTransformer:
        raise UserError(f"timm's plain ViT or an MAE can be exported, not a {type(model).__name__}: give one of these")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
             if not name.startswith(DECODER)}
    if isinstance(model, MAE):
        args = shape_config(state, img_size=model.config["img_size"], num_heads=model.config["num_heads"])
    else:
        args = vit_config(model)
    # Any plain ViT of timm can be the base: these arguments set all in which they differ, including the number of heads
    name = args.pop("model")
    architecture = f"{name if name in ('vit_small', 'vit_base') else 'vit_tiny'}_patch16_224"
    args |= {"embed_dim": len(state[STEM]), "depth": len(model.blocks), "fc_norm": "fc_norm.weight" in state}
    classes, channels = args["num_classes"], args["in_chans"]
    if {len(mean), len(std)} != {channels} or (class_names and len(class_names) != classes):
        raise UserError(f"{len(mean)} means, {len(std)} deviations and {len(class_names or ())} class names do not "
                        f"suit a model of {channels} channels and {classes} classes: give one for each, or none")
    rebuilt = timm.create_model(architecture, **args)
    require_fit("the export", rebuilt.state_dict(), state)  # refuses other ViTs, such as those with query norms

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
    """Return the weights to write: all of them, but for MoCo-v3 without the head, where MoCo-v3 has its projector."""
    state = model.state_dict()
    if to == "mocov3" and (isinstance(model, MAE) or "fc_norm.weight" in state):
        raise UserError("MoCo-v3's encoder is a ViT that reads its class token: an MAE's decoder or an average-pooling "
                        "classifier has no place in it. Choose --to plain")
    return {name: value for name, value in state.items() if to == "plain" or not name.startswith("head.")}


def not_in_tensors(config, statistics):
    """Return, as arguments, the settings that other projects would assume wrongly, as tensors do not tell them."""
    usual = channel_statistics(config["in_chans"])
    assumed = {"num_heads": 12, "decoder_heads": DECODERS.get(config["model"], (None,) * 3)[2],
               "img_size": config["img_size"][:1] * 2, **usual}  # assumed: a square image
    own = {**config, **statistics}
    return options.to_argv({name: own[name] for name, value in assumed.items() if name in own and own[name] != value})


def encode(model, images, head):
    """Compute the outputs to compare: logits of a classifier if `head`, otherwise tokens after the final norm.

    An MAE encodes all patches, without masking.
    """
    if isinstance(model, MAE):
        patches = model.patchify(images)
        ids = torch.arange(model.num_patches).expand(len(images), -1)
        return model.forward_encoder(patches, ids)
    return model(images) if model.num_classes and head else model.forward_features(images)


@torch.inference_mode()
def largest_difference(model, reread, head=True):
    """Return the largest difference between two models' outputs for noise images, relative to the largest output."""
    config = model.config
    images = torch.randn(2, config["in_chans"], *config["img_size"], generator=torch.Generator().manual_seed(0))
    ours, theirs = (encode(eval_mode(m, "cpu"), images, head) for m in (model, reread))
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def verify(model, reread, args):
    """Return the largest difference between both models' outputs. Raises UserError if it exceeds TOLERANCE."""
    difference = largest_difference(model, reread, head=args.to != "mocov3")
    if not difference <= TOLERANCE:
        raise UserError(f"{args.output} computes something else: outputs differ by {difference:.1e}. Keep the original")
    return difference


def write_file(model, args, about):
    """Write the weights under the chosen names, and `about` beside them; return the largest difference of the outputs.

    The file gets its name only after it was read back and gave the same outputs.
    """
    key, prefix = PREFIXES[args.to]
    if any(name.endswith(TABLE) for name in model.state_dict()):
        raise UserError(f"{args.checkpoint} has relative positions, which no plain ViT has: it cannot be converted")
    state = {prefix + name: value for name, value in encoder_state(args.to, model).items()}
    draft = Path(f"{args.output}.unchecked")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_torch(draft, {key: state, **about})
        difference = verify(model, load_model(draft), args)
        draft.replace(args.output)
    finally:
        draft.unlink(missing_ok=True)
    return difference


def main(args):
    """Write the file or folder, read it back and compare the outputs; return {"output", "difference"}."""
    given = dict(num_heads=args.num_heads, decoder_heads=args.decoder_heads, img_size=args.img_size)
    weights = read_weights(args.checkpoint)
    model = load_model(weights, **given)
    if model.config is None:
        raise UserError(f"{args.checkpoint} is a {type(model).__name__}: ViTs and MAEs can be converted, no others")
    if args.to != "timm" and model.config["model"] is None:
        raise UserError(f"{args.checkpoint} has the width and depth of none of {', '.join(SIZES)}: choose --to timm")
    args = options.with_statistics(options.replaced(args, in_chans=model.config["in_chans"]), weights)
    statistics = channel_statistics(args.in_chans, args.mean, args.std)
    names = weights.classes if getattr(model, "num_classes", 0) else None
    if args.to == "timm":
        export_timm(model, args.output, **statistics, class_names=names)
        difference = verify(model, timm.create_model(f"local-dir:{args.output}", pretrained=True), args)
    else:
        config = {**model.config, **({"num_classes": 0} if args.to == "mocov3" else {})}
        difference = write_file(model, args, {"config": config, "statistics": statistics, "classes": names})
    print0(f"{args.output}: same outputs as {args.checkpoint} (largest relative difference {difference:.1e})")
    if args.to != "timm" and (words := not_in_tensors(model.config, statistics)):
        print0(f"tell other projects' readers: {' '.join(words)}")
    return {"output": args.output, "difference": difference}


if __name__ == "__main__":
    entry.run_script(main, build_parser())
