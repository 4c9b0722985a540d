"""Shared by Tables 4 and 5 and Figure 4: transfer settings of each data set, published numbers, rows and columns.

The data sets themselves, and the files expected in --dataset-path, are in sec3_benchmark/downstream_sets.py.
"""
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from common import options, report
from common.data import channel_statistics
from common.distributed import print0
from common.errors import DataError, UserError
from common.pretrained import HubError, read_weights
from common.rows import Row, settings_set
from sec3_benchmark.downstream_sets import FRACTALS, SETS, check_path, load_downstream

# Differences from transfer.py's defaults, which are the authors' class defaults. Only CIFAR-100's settings are in a
# published source (scripts/transfer.sh, equal for every initialisation). The others are ours and not tuned.
SETTINGS = {
    "cifar100": dict(epochs=50, warmup_epochs=10, lr=0.1, layer_decay=0.75),
    "flowers": dict(lr=0.1),  # CIFAR-100's rate; 300 epochs are 900 steps here
    "pets": dict(lr=0.1),
    "aircraft": dict(lr=0.1),
    "cars": dict(lr=0.1),
    "inat18": dict(epochs=100, warmup_epochs=10, lr=0.1),  # 300 epochs would cost more than pre-training
    "fractals-small": dict(epochs=15, warmup_epochs=2, lr=0.1, eval_every=5),
    "fractals-large": dict(epochs=5, warmup_epochs=1, lr=0.1, eval_every=5),
}

COCO = "coco"  # trained by detect.py instead of transfer.py on ROOT/coco/; two columns, box and mask AP
COCO_AP = {"coco-box": "box_ap", "coco-mask": "mask_ap"}
TITLES = {**{name: about["title"] for name, about in SETS.items()}, "coco-box": "COCO box AP",
          "coco-mask": "COCO mask AP"}

# Tables 4 and 5: top-1 and COCO AP (ICML slides; COCO also on the authors' code page). ImageNet is from Table 1, which
# has no row for random weights.
PUBLISHED_COLUMNS = (*SETS, *COCO_AP, "imagenet")
PUBLISHED = {row: dict(zip(PUBLISHED_COLUMNS, values)) for row, values in {
    "random": (30.2, 26.1, 9.4, 6.8, 42.7, 58.7, 32.7, 28.9),
    "supervised": (96.4, 93.1, 73.5, 85.6, 85.8, 63.6, 40.4, 35.5, 75.8),
    "mocov3": (94.8, 87.8, 73.7, 83.9, 83.9, 54.5, 39.7, 35.1, 76.8),
    "mae": (85.8, 76.5, 64.6, 78.8, 78.9, 60.6, 39.9, 35.4, 78.0),
    "dino": (95.6, 89.3, 73.6, 84.5, 84.7, 58.7, 41.4, 36.7, 77.2),
    "simmim": (77.2, 68.9, 55.9, 70.4, 77.7, 60.8, 39.3, 34.8, 77.9),
    "dmae": (95.2, 89.1, 79.2, 87.5, 85.0, 63.6, 42.3, 37.4, 78.4),  # 37.3 in a later version of the code page
    "d2mae": (*[None] * len(SETS), 42.5, 37.5, 78.7),  # the follow-up's code page, which has none of SETS
}.items()}

MOCO_FINETUNING = "--layer-decay 0.75"  # the authors' only change for fine-tuning MoCo-v3's weights (Tables 1, 3, 5)
TRANSFER = "sec3_benchmark/transfer.py --init {previous}"


def row(key, name, before):
    """Make a row that runs the script `before` and transfers the weights that it leaves."""
    return Row(key, name, PUBLISHED[key], [before, TRANSFER])


ROWS = [  # in both tables; each adds one of its own
    row("supervised", "supervised (DeiT-Tiny)", "sec3_benchmark/finetune.py"),
    row("mocov3", "MoCo-v3", "sec3_benchmark/pretrain_mocov3.py"),
    row("mae", "MAE", "sec3_benchmark/pretrain_mae.py"),
    row("dino", "DINO", "appendix/pretrain_dino.py"),
    row("simmim", "SimMIM", "appendix/pretrain_simmim.py"),
]
# SimMIM is pre-trained with relative positions, and detect.py takes plain ViTs. Weights given by --models may be plain.
UNFIT = {("simmim", COCO)}


def add_datasets(parser):
    group = parser.add_argument_group("data sets to transfer to")
    group.add_argument("--datasets", nargs="+", metavar="NAME",
                       help=f"of {', '.join([*SETS, *FRACTALS, COCO])}, or folders in --dataset-path; default: the two "
                            f"fractals in the demo preset, the first six in the paper preset")
    group.add_argument("--dataset-path", metavar="ROOT", help="see sec3_benchmark/downstream_sets.py")


def add_models(parser):
    parser.add_argument("--models", nargs="+", action="extend", default=[], metavar="NAME=CHECKPOINT",
                        help="transfer the weights in CHECKPOINT as row NAME, one of the rows or a new one, instead of "
                             "pre-training; other rows run only if --rows names them")


def with_models(rows, args):
    """Apply --models: return (rows, settings).

    A row named there is replaced by the transfer of the given weights; any other name becomes a new row. In the
    settings, --rows lists these rows too.
    """
    models = options.parse_pairs(args.models, "--models")
    by_key, key_of = {row.key: row for row in rows}, {row.name: row.key for row in rows}
    for name, file in models.items():
        if name not in by_key and name in key_of:
            raise UserError(f"--models {name}={file}: {name} is the title of a row; write {key_of[name]}={file}")
        row = by_key.get(name, Row(name, name, {}, [TRANSFER]))
        by_key[name] = replace(row, note=f"weights given: {'/'.join(Path(file).parts[-2:])}",
                               lines=[row.lines[-1].replace("{previous}", shlex.quote(file))])
    if models:
        args = options.replaced(args, rows=[*(args.rows or []), *models])
    return list(by_key.values()), args


def settings_told(args, script):
    """Return the names of the settings that a table's command line gives a script, directly or by --set."""
    return {*args.given, *settings_set(script, args)}


def scratch_settings(loaded, told):
    """Return the settings that give a training from random weights the same network as the loaded weights.

    loaded: {name: Weights}. The result has the network's shape and normalisation, without the settings named in `told`;
    it is {} if no weights state them. Raises UserError if the weights are of different networks.
    """
    networks = {name: network_settings(weights, told) for name, weights in loaded.items() if weights.config}
    first_name, first = next(iter(networks.items()), ("", {}))
    for name, network in networks.items():
        differing = [key for key in {**first, **network} if first.get(key) != network.get(key)]
        if differing:
            values = ", ".join(f"{key} ({first.get(key)}, {network.get(key)})" for key in differing)
            raise UserError(f"--models: the start from random weights is one network for all, and {first_name} and "
                            f"{name} differ in {values}: run them apart")
    return first


def network_settings(weights, told):
    """Return shape and unusual normalisation of the weights' network, where known and not in `told`."""
    usual = channel_statistics(weights.config["in_chans"])
    shape = {key: weights.config.get(key) for key in options.SHAPE}
    unusual = {key: value for key, value in (weights.statistics or {}).items() if value != usual[key]}
    return {key: value for key, value in {**shape, **unusual}.items() if value is not None and key not in told}


def random_like(row, args):
    """Return the row of random weights; if it is to be run, with the same network as the weights in --models."""
    files = options.parse_pairs(args.models, "--models")
    asked = set(args.rows or ()) - files.keys()
    if not asked & {row.key, "all"}:
        return row
    loaded = {}
    for name, file in files.items():
        if args.dry_run and not Path(file).exists():
            print0(f"# {file} is not read in a dry run: settings that it would give the random row are missing here")
            continue
        with suppress(HubError):  # the row of these weights reports it
            loaded[name] = read_weights(file)
    network = scratch_settings(loaded, settings_told(args, "transfer.py"))
    return replace(row, lines=[shlex.join([*shlex.split(row.lines[-1]), *options.to_argv(network)])])


def chosen_sets(args):
    """Return the names in --datasets, or those of the preset.

    Each data set is checked here rather than after a long pre-training: raises UserError or DataError.
    """
    names = args.datasets or {"demo": [*FRACTALS], "paper": [*SETS]}.get(args.preset)
    if not names:
        raise UserError(f"--preset {args.preset} needs --datasets: some of {', '.join(SETS)}, or folders that lie in "
                        f"--dataset-path")
    for name in names:
        if name == COCO:
            require_coco(args)
            continue
        check_path(name, args.dataset_path)
        if name not in FRACTALS and not (args.dry_run and not Path(args.dataset_path or "").is_dir()):
            load_downstream(options.replaced(options.resolve(args), dataset=name))
    return list(dict.fromkeys(names))


def require_coco(args):
    """Raise DataError if --dataset-path lacks a part of COCO. The demo's generated scenes and a dry run need none."""
    needed = ("annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017", "val2017")
    absent = [name for name in needed if not (Path(args.dataset_path or "") / COCO / name).exists()]
    if args.preset != "demo" and not args.dry_run and absent:
        raise DataError(f"{COCO} needs --dataset-path, where coco/ holds {', '.join(needed)}; there is no "
                        f"{', '.join(absent)}")


def cells(rows, names, asked=()):
    """Return the table's cells: for each row and data set a row for tables.run_rows, without those in UNFIT.

    rows: end with transfer.py. Raises UserError if a row whose key is in `asked` has no cell that can run.
    """
    found = [cell(row, name) for row in rows for name in names
             if (row.key, name) not in UNFIT or len(row.lines) == 1]  # one line: no pre-training, weights are given
    for row in rows:
        if row.key in (asked or ()) and row.key not in {one.key for one in found}:
            raise UserError(f"--rows {row.key}: detect.py takes plain ViTs, and this row's has relative positions; "
                            f"give plain weights by --models {row.key}=FILE")
    return found


def cell(row, name):
    """Return the row with its transfer to one data set.

    On COCO, transfer.py is replaced by detect.py, where --position-size is the ViT's image size.
    """
    *before, last = row.lines
    if name == COCO:
        last = last.replace("transfer.py", "detect.py").replace("--img-size", "--position-size")
    else:
        last = f"{last} --dataset {shlex.quote(name)}"
    return replace(row, name=f"{row.name} {name}", column=name, lines=[*before, last])


def measured(results):
    """Return {column: [top-1 or AP for each seed]} from {data set: [results of the stages, for each seed]}."""
    found = {name: [stages[-1]["top1"] for stages in seeds] for name, seeds in results.items() if name != COCO}
    if COCO in results:
        found |= {column: [stages[-1][key] for stages in results[COCO]] for column, key in COCO_AP.items()}
    return found


def title(name):
    return TITLES.get(name, name)


def summary(row, results):
    """Summarise a row for the table's json file; results as in `measured`, with empty lists if it was not run."""
    def values(key):
        return {name: [stages[-1][key] for stages in seeds if key in stages[-1]] for name, seeds in results.items()}
    return {"key": row.key, "name": row.name, "published": row.published, "note": row.note,
            "measured": measured(results), "best_epoch": values("best_top1"), "run": values("run"),
            "seconds": values("seconds"), "seeds": max(map(len, results.values())),
            "train_images": {name: sizes[0] for name, sizes in values("train_images").items() if sizes}}


def summaries(rows, results, names):
    """Summarise all rows, given the results of those that were run, on the data sets `names`."""
    nothing = {name: [] for name in names}
    return [summary(row, results.get(row.key, nothing)) for row in rows]


def remarks(rows):
    """Return the notes of a table's summarised rows."""
    return [f"{row['name']}: {row['note']}." for row in rows if row["note"]]


def column(name):
    """Return the function that formats this column of a row of `summary`: the published number / ours over seeds."""
    def text(row):
        theirs, ours = row["published"].get(name), row["measured"].get(name)
        return f"{'-' if theirs is None else theirs} / {report.mean_std(ours) if ours else 'not run'}"
    return text


def columns(names):
    """Return {title: function of a row} of all columns, for report.write_table. COCO's are always included."""
    names = [*(name for name in names if name != COCO), *COCO_AP]
    return {"initialisation": lambda row: row["name"], **{title(name): column(name) for name in names},
            "seeds": lambda row: row["seeds"] or ""}
