"""Writing the result of a probe, shared by linear_probe.py and knn_probe.py."""
from pathlib import Path

from common import distributed, report
from common.checkpoint import save_json
from common.distributed import print0
from common.errors import UserError
from common.runs import deliver, settings_hash


def check_save_to(args):
    """Raise UserError if --init is not a file, so that --save-to cannot copy the probed weights."""
    if args.save_to and args.init and (args.init.startswith("timm:") or Path(args.init).is_dir()):
        raise UserError(f"--save-to {args.save_to} copies the weights of --init, and {args.init} is not a file: leave "
                        f"--save-to out")


def write_result(script, args, fingerprint, data, result):
    """Write <output>/<script>/<data>-<model>-<weights>-<hash>.json and print the accuracy.

    Returns the result with "run", the path of this file, and "checkpoint", the probed weights, from which the next
    stage of a row starts.
    """
    folder = Path(args.output) / script
    prints = {"init": fingerprint, "data": [images.fingerprint() for images in data]}
    name = f"{args.data}-{args.model}-{fingerprint[:8]}-{settings_hash(vars(args), prints)}"
    result = {**result, "run": str(folder / f"{name}.json"), "checkpoint": args.init}
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / f"{name}.json", {**result, "settings": vars(args), "environment": report.environment()})
    accuracy = f"top-1 {result['top1']:.2f}, top-5 {result['top5']:.2f}" if "top1" in result else "written"
    print0(f"{accuracy}: {folder / name}.json")
    deliver(result, args.save_to)
    return result
