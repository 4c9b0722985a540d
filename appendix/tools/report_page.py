"""Collect every table and figure, from outputs/ and from the sections' results/, in one HTML page.

    python appendix/tools/report_page.py                        # writes outputs/report.html; seconds
    python appendix/tools/report_page.py --folders DIR --output-file page.html

The first part holds what was made here, in outputs/; the second what the repository keeps in results/, both in the
order of the paper. With --folders each of these folders is a part. Each item shows its path, its table or picture, and
when, by which command, with which preset and data it was made. The page needs no network and no other file. Numbers of
the demo preset are marked, as they are no evidence.
"""
import argparse
import base64
import html
import json
import re
import shlex
import time
from pathlib import Path
from urllib.parse import quote

from common import entry, options
from common.checkpoint import write_atomically
from common.distributed import print0
from common.errors import UserError
from common.tables import NOTES

SECTIONS = ("sec3_benchmark", "sec4_analysis", "sec5_distill", "appendix")
MADE, KEPT = "Made here: outputs/", "Kept with the repository: each section's results/"
MAPS = "CKA of every pair of layers with the first model, then of equal layers."
ITEMS = {  # (title, caption of its picture); the claims first, then in the order of the paper
    "claims": ("The paper's claims", "A line for each claim: its effect with the 95 % interval, small strokes for each "
               "seed. Right of 0 it is as the paper says."),
    "table1": ("Table 1: pre-training methods", ""),
    "table2": ("Table 2: light networks", "Accuracy, published, against images a second, measured."),
    "table3": ("Table 3: pre-training data", "Accuracy after fine-tuning on all labels, by the part pre-trained on."),
    "table4": ("Table 4: transfer", "How far each start is behind the supervised one on each set, the smallest first."),
    "fig1": ("Figure 1: similarity of layers", MAPS),
    "fig2": ("Figure 2: leading blocks", "Accuracy over the number of pre-trained blocks that are kept."),
    "fig3": ("Figure 3: Fourier amplitudes", "High frequencies after each block; then all frequencies of each model."),
    "fig4": ("Figure 4: leading blocks on small sets", "Accuracy over the number of pre-trained blocks that are kept."),
    "fig5": ("Figure 5: attention distance and entropy", "Boxes show the heads of each block."),
    "attention_maps": ("Attention of single heads", "Where the marked patch looks, for each block and head."),
    "fig6": ("Figure 6: similarity after distillation", MAPS),
    "fig7": ("Figure 7: which layer to distil", "Accuracy, and the time of a step of pre-training."),
    "table5": ("Table 5: distillation", ""),
    "a1": ("A.1: recipes", ""),
    "a2": ("A.2: settings of MAE", ""),
    "a3": ("A.3: settings of MoCo-v3", ""),
    "a4": ("A.4: settings of the transfer", ""),
    "a5_detection": ("A.5: settings of the detector", ""),
    "a6": ("A.6: what CKA depends on", "CKA of equal layers with the first model, measured in several ways."),
    "b1": ("B.1: other references for Figure 1", MAPS),
    "b5": ("B.5: DINO and SimMIM", ""),
}
STYLE = """
:root { color-scheme: light dark; --line: #8885; --note: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
h1 { font-size: clamp(1.3rem, 5vw, 2rem); }
h2 { margin-top: 4rem; }
h3 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
h3 small { color: #888; font-weight: normal; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
.short { white-space: nowrap; }
.long { min-width: 14rem; }
figure { margin: 1rem 0; overflow-x: auto; }
figcaption { color: #888; font-size: .85rem; position: sticky; left: 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; cursor: zoom-in; }
img:focus { max-width: none; cursor: zoom-out; outline: none; }
.about { color: #888; font-size: .85rem; overflow-wrap: anywhere; }
.demo { background: var(--note); padding: .3rem .7rem; border-radius: 4px; }
nav a { display: inline-block; margin-right: 1rem; }
"""


def build_parser():
    parser = options.make_parser(__doc__)
    parser.add_argument("--folders", nargs="+", metavar="DIR", help="default: outputs/, and every section's results/")
    parser.add_argument("--output-file", default=str(options.ROOT / "outputs" / "report.html"), metavar="FILE")
    return parser


def parts_of(args):
    """Return the parts of the page: {heading: folders}. Raises UserError if one of --folders does not exist."""
    if absent := [str(folder) for folder in args.folders or () if not Path(folder).is_dir()]:
        raise UserError(f"--folders {' '.join(absent)}: no such folder")
    if args.folders:
        return {str(folder): [folder] for folder in args.folders}
    # The reader's own results come first; the kept ones are there for comparison
    return {MADE: [options.ROOT / "outputs"], KEPT: [options.ROOT / name / "results" for name in SECTIONS]}


def find_items(folders, seen):
    """Yield (path, content) of every <item>.json that a table or figure script wrote, in the order of ITEMS.

    seen: the set of paths found before, which are left out; new ones are added.
    """
    order = list(ITEMS)

    def place(path):
        known = [name for name in (path.stem, path.stem.split("_")[0]) if name in ITEMS]
        return order.index(known[0]) if known else len(order)

    files = [path for folder in folders for path in sorted(Path(folder).rglob("*.json"))]
    for path in sorted(files, key=place):
        try:
            content = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError, OSError):
            continue
        if isinstance(content, dict) and "item" in content and path.resolve() not in seen:
            seen.add(path.resolve())
            yield path, content


def table_html(lines):
    """Convert the lines of a Markdown table to HTML."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    head, body = rows[0], rows[2:]

    def row(cells, tag):
        kinds = ("long" if len(cell) > 40 else "short" for cell in cells)  # no line breaks in numbers
        return "<tr>" + "".join(f'<{tag} class="{kind}">{html.escape(cell)}</{tag}>'
                                for cell, kind in zip(cells, kinds)) + "</tr>"
    return f'<div class="table"><table>{row(head, "th")}{"".join(row(cells, "td") for cells in body)}</table></div>'


def markdown_html(text):
    """Convert the Markdown of our tables to HTML: paragraphs, lists, tables. Rows that were not run are collapsed."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            parts.append(table_html(lines))
        elif lines[0].startswith("- "):
            parts.append("<ul>" + "".join(f"<li>{html.escape(line[2:])}</li>" for line in lines) + "</ul>")
        elif block.startswith("Not measured here"):
            parts.append(f"<details><summary>Rows without a number</summary>{html.escape(block)}</details>")
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(parts)


def item_html(path, content):
    """Return the HTML of one table or figure: its Markdown, its pictures, and how it was made."""
    text = path.with_suffix(".md")
    pictures = [picture for picture in sorted(path.parent.glob("*.png")) if picture.stem.startswith(path.stem)]
    environment = content.get("environment", {})
    images = [content.get("data"), data_path(environment.get("command"))]  # neither alone says which images
    about = {**settings(content), "data": ", ".join(str(value) for value in images if value),
             "made": environment.get("date"), "command": environment.get("command"),
             "on": environment.get("gpu") or environment.get("cpu"), "torch": environment.get("torch"),
             "numbers": location(path)}
    folder = html.escape(location(path.parent))
    parts = [f'<h3 id="{anchor(path)}">{html.escape(title(content))} <small>{folder}/</small></h3>']
    if content.get("preset") == "demo":
        parts.append('<p class="demo">Demo: generated images, minutes of training. It shows that the chain works and '
                     'is no evidence for the paper.</p>')
    if text.exists():
        parts.append(markdown_html(text.read_text(encoding="utf-8").replace(NOTES["demo"], "")))  # shown above
    parts += [figure_html(picture, content) for picture in pictures]
    line = "; ".join(f"{name}: {html.escape(str(value))}" for name, value in about.items() if value)
    return "\n".join([*parts, f'<p class="about">{line}</p>'])


def figure_html(picture, content):
    """Return the HTML of a picture with its caption. A click or tap shows it at full size, scrollable."""
    data = base64.b64encode(picture.read_bytes()).decode()
    caption = html.escape(ITEMS.get(content["item"], ("", ""))[1] or picture.stem.replace("_", " "))
    return (f'<figure><img tabindex="0" alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>")


def settings(content):
    """Return {"preset": name}, or {"settings": "the paper's"} for preset paper on images other than ImageNet."""
    preset, data = content.get("preset"), content.get("data")
    return {"settings": "the paper's"} if preset == "paper" and data != "imagenet" else {"preset": preset}


def title(content):
    """Return the title of an item as in ITEMS, otherwise its own name."""
    return ITEMS.get(content["item"], (str(content["item"]),))[0]


def data_path(command):
    """Return the --data-path of a recorded command, or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-path", nargs="?")
    return parser.parse_known_args(shlex.split(command or ""))[0].data_path


def location(path):
    """Return a path relative to the repository if it is inside, otherwise absolute."""
    path, root = Path(path).absolute(), options.ROOT.absolute()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def anchor(path):
    """Return the HTML id of a file, unique in the page."""
    return quote(location(path))


def page(parts):
    """Return the HTML of the whole page. parts: {heading: [(path, content)]}."""
    links, body = [], []
    for heading, items in parts.items():
        anchors = [f'<a href="#{anchor(path)}">{html.escape(title(content))}</a>' for path, content in items]
        links.append(f"<nav><b>{html.escape(heading)}</b><br>{' '.join(anchors)}</nav>")
        body += [f"<h2>{html.escape(heading)}</h2>", *(item_html(path, content) for path, content in items)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tables and figures</title><style>{STYLE}</style></head>
<body><h1>A Closer Look at Self-Supervised Lightweight Vision Transformers: tables and figures</h1>
<p>Measured beside published, made {time.strftime("%Y-%m-%d")}.</p>
""" + "\n".join([*links, *body, "</body></html>", ""])


def main(args):
    """Write the page; return {"page": file, "items": number of items}."""
    parts, seen = parts_of(args), set()
    found = {heading: list(find_items(folders, seen)) for heading, folders in parts.items()}
    if not seen:
        raise UserError(f"no table or figure in {', '.join(map(str, sum(parts.values(), [])))}: run one first, for "
                        f"example python sec3_benchmark/table1_pretraining_methods.py")
    text = page({heading: items for heading, items in found.items() if items}).encode()
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output_file, lambda file: file.write(text))
    print0(f"{len(seen)} items, {len(text) / 1e6:.1f} MB: {args.output_file}")
    return {"page": args.output_file, "items": len(seen)}


if __name__ == "__main__":
    entry.run_script(main, build_parser())
