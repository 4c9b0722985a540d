"""Draw what an MAE reconstructs: input, masked input and reconstruction, side by side.

    python appendix/tools/reconstruct.py --checkpoint outputs/pretrain_mae/RUN/weights.pt --data-path DIR  # any images
    python appendix/tools/reconstruct.py --checkpoint outputs/pretrain_mae/RUN/weights.pt              # generated ones

Takes seconds. Any MAE checkpoint that holds its decoder will do (ours, mae-lite's, facebook's "full" ones). With
normalised targets the network predicts each patch without its mean and contrast; the picture restores those of the
input patch, and says so. Checkpoints of other projects are assumed to have normalised targets, unless --raw-pixels is
given. The last column shows visible patches as they are, predicted ones elsewhere. Writes reconstruction.png and .npz.
"""
from pathlib import Path

import numpy as np
import torch

from appendix.tools.convert_checkpoint import add_unrecorded
from common import data, distributed, entry, options
from common.augment import eval_transform
from common.checkpoint import save_arrays
from common.data import images_to_analyse, statistics
from common.distributed import print0
from common.errors import UserError
from common.loader import seed_everything
from common.mae import take
from common.pretrained import read_weights
from common.ranges import Float, Int
from common.rebuilding import load_model
from common.report import save_figure, subplots
from common.vit import eval_mode
from sec4_analysis.attention_maps import visible

PRESETS = {"demo": {"data": "fractals"}, "laptop": {"data": "folder"}, "small": {"data": "folder"},
           "paper": {"data": "folder"}}


def build_parser():
    parser = options.make_parser(__doc__)  # without options.add_data: size and channels are the checkpoint's
    parser.add_argument("--data", choices=data.NAMES, default="imagenet", help="data set, see common/data.py")
    parser.add_argument("--data-path", metavar="DIR", help="folder that holds the data set")
    parser.add_argument("--preset", choices=options.PRESET_NAMES, help="default: demo without --data-path, else paper")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the data set")
    parser.add_argument("--checkpoint", "--init", required=True, help="an MAE with its decoder")
    add_unrecorded(parser)
    parser.add_argument("--decoder-heads", type=Int(1), help="as --num-heads")
    parser.add_argument("--raw-pixels", action="store_true", help="as --num-heads: it predicts raw pixels")
    parser.add_argument("--mask-ratio", type=Float(0, 1),
                        help="share of patches removed; default: the checkpoint's, else 0.75")
    parser.add_argument("--num-images", type=Int(1), default=8)
    parser.add_argument("--seed", type=Int(0), default=0, help="chooses images and masks")
    parser.add_argument("--output", default=str(options.ROOT / "outputs"), metavar="DIR")
    parser.add_argument("--device", default="auto")
    return parser


def predict_all(model, images, noise):
    """Predict every patch (B, L, p*p*C), in image order; also return the mask (B, L), 1 for removed patches."""
    ids_shuffle = noise.argsort(dim=1)
    ids_visible = ids_shuffle[:, : model.num_visible]
    latent = model.forward_encoder(take(model.patchify(images), ids_visible), ids_visible, last=model.decoder_block)
    mask = torch.ones_like(noise).scatter(1, ids_visible, 0.0)
    return take(model.forward_decoder(latent, ids_shuffle), ids_shuffle.argsort(dim=1)), mask


def unpatchify(model, patches):
    """Invert `MAE.patchify`: (B, L, p*p*C) -> (B, C, H, W)."""
    B, C, (h, w), p = len(patches), model.in_chans, model.grid, model.patch_size
    return patches.reshape(B, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, h * p, w * p)


def pixels_from(pred, patches, norm_pix):
    """Convert predicted patches to pixels: with normalised targets, restore mean and deviation of the input patches."""
    if not norm_pix:
        return pred
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return pred * (var + 1e-6).sqrt() + mean


def reconstruct(model, images, noise):
    """Reconstruct images (B, C, H, W); return three tensors of that shape.

    These are the masked images (grey where removed), the predictions with visible patches pasted in, and the
    predictions alone.
    """
    pred, mask = predict_all(model, images, noise)
    patches, mask = model.patchify(images), mask.unsqueeze(-1)
    predicted = pixels_from(pred, patches, model.norm_pix)
    return tuple(unpatchify(model, seen) for seen in (
        patches * (1 - mask), patches * (1 - mask) + predicted * mask, predicted))


def caption(mask_ratio, norm_pix):
    """Return the caption that explains the picture."""
    return "\n".join([
        f"{mask_ratio:.0%} of the patches were removed (grey); the model predicts them from the visible ones.",
        "It does not learn to predict visible patches: what it shows in their place has no meaning.",
        *["Mean and contrast of a patch are not predicted, but taken from the input image."] * bool(norm_pix)])


def draw(arrays, path, title):
    """Draw arrays {name: (B, H, W, C) in 0..1}: one row per image, one column per array."""
    rows = len(next(iter(arrays.values())))
    figure, axes = subplots(rows, len(arrays), figsize=(1.5 * len(arrays), 1.5 * rows + 0.5), squeeze=False)
    for column, (name, images) in enumerate(arrays.items()):
        axes[0, column].set_title(name, fontsize=8)
        for row in range(rows):
            axes[row, column].imshow(visible(images[row]), cmap="gray", vmin=0, vmax=1)
            axes[row, column].axis("off")
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path)


@torch.inference_mode()
def main(args):
    """Write reconstruction.npz and reconstruction.png; return {"folder": where they are}."""
    device = distributed.start_process_group(args.device)
    weights = read_weights(args.checkpoint)
    if "decoder_embed.weight" not in weights.state:
        raise UserError(f"{args.checkpoint} holds no MAE decoder, so nothing can be reconstructed")
    model = load_model(weights, num_heads=args.num_heads, decoder_heads=args.decoder_heads, img_size=args.img_size,
                       mask_ratio=args.mask_ratio, norm_pix=False if args.raw_pixels else None)
    model = eval_mode(model, device)
    args = options.replaced(args, img_size=model.config["img_size"], in_chans=model.config["in_chans"])
    args = options.with_statistics(args, weights)
    images = images_to_analyse(args)
    seed_everything("images", args.seed)
    chosen = np.random.permutation(len(images))[:args.num_images]
    transform = eval_transform(args.img_size)
    mean, std = (values.view(-1, 1, 1).to(device) for values in statistics(args))
    batch = (torch.stack([transform(images.read(int(i))) for i in chosen]).to(device) - mean) / std
    masked, pasted, predicted = reconstruct(model, batch, torch.rand(len(batch), model.num_patches).to(device))

    folder = Path(args.output) / "reconstruct" / f"{Path(args.checkpoint).stem}-{weights.fingerprint[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: ((x * std + mean) / 255).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy() for name, x in (
        ("input", batch), ("visible", masked), ("predicted", predicted), ("predicted + visible", pasted))}
    save_arrays(folder / "reconstruction.npz", arrays)
    draw(arrays, folder / "reconstruction.png", caption(model.config["mask_ratio"], model.norm_pix))
    print0(f"written to {folder / 'reconstruction.png'}: " + ", ".join(images.where(int(i)) for i in chosen))
    return {"folder": str(folder)}


if __name__ == "__main__":
    entry.run_script(main, build_parser(), PRESETS)
