"""Test --from-numbers of every script with a figure: its own file is drawn, any other is refused in one line."""
import json
import re
import zlib

import numpy as np
import pytest

from appendix import a6_cka_settings, b1_stronger_references, claims
from appendix.evidence import OPEN
from common import options, scripts, tables
from common.errors import UserError
from sec3_benchmark import table2_sota_networks, table3_pretraining_data, table4_transfer
from sec4_analysis import (
    attention_maps,
    fig1_layer_similarity,
    fig2_leading_blocks,
    fig3_fourier,
    fig4_leading_blocks_small_data,
    fig5_attention,
)
from sec5_distill import fig6_distilled_similarity, fig7_distilled_layer


def own_numbers(item, folder):
    """Write a file of the smallest size that a figure's script could have written; return its path."""
    arrays = {"fig1": np.eye(13), "fig6": np.eye(13), "b1": np.eye(13), "fig3": np.ones((2, 13, 3)),
              "fig5": np.ones((2, 12, 4))}
    path = folder / f"{item}.npz"
    if item in arrays:
        np.savez(path, A=arrays[item], B=arrays[item], item=np.array(item))
    elif item == "a6":
        np.savez(path, **{f"{name}: as in Figure 1": np.eye(13) for name in "AB"}, item=np.array(item))
    elif item == "attention_maps":
        np.savez(path, **{"A/image": np.ones((8, 8, 3)), "A/block 1 head 1": np.ones((2, 2))}, item=np.array(item))
    else:
        row = {"name": "none", "measured": [1.0], "seconds_per_step": [1.0]}
        point = {"panel": "", "method": "MAE", "k": 0, "top1": [1.0]}
        claim = {"claim": "C1", "statement": "s", "unit": "points", "mark": "", "within": None, "verdict": OPEN,
                 "effect": {"mean": 1.0, "low": 0.0, "high": 2.0, "values": [1.0]}}
        network = {"name": "n", "marks": "", "ours": True, "published": {"top1": 1.0},
                   "measured": {"images_per_second": 2.0}}
        part = {"method": "MAE", "part": "full", "measured": [1.0, 2.0]}
        starts = [{"key": key, "name": key, "published": {"pets": 1.0}, "measured": {"a": [1.0, 2.0], "b": [2.0, 4.0]},
                   "train_images": {"a": 9, "b": 9}} for key in ("supervised", "mae")]
        rows = {"claims": [claim], "table2": [network], "table3": [part], "table4": starts}.get(item, [row])
        path = path.with_suffix(".json")
        path.write_text(json.dumps({"item": item, "points": [point], "rows": rows}))
    return path


DRAWING = {"fig1": fig1_layer_similarity, "fig2": fig2_leading_blocks, "fig3": fig3_fourier,
           "fig4": fig4_leading_blocks_small_data, "fig5": fig5_attention, "attention_maps": attention_maps,
           "fig6": fig6_distilled_similarity, "fig7": fig7_distilled_layer, "a6": a6_cka_settings,
           "b1": b1_stronger_references, "claims": claims, "table2": table2_sota_networks,
           "table3": table3_pretraining_data, "table4": table4_transfer}


def draw_again(module, path, *words):
    parser, words = module.build_parser(), ["--from-numbers", str(path), *words]
    if module is table2_sota_networks:
        return module.main(options.parse(parser, module.PRESETS, argv=words))
    return module.main(getattr(module, "parse_maps", tables.parse)(parser, words))


def pdf_text(path):
    """Return a PDF with its compressed streams inflated."""
    content = path.read_bytes()
    streams = re.findall(rb"/FlateDecode.*?stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL)
    return content + b"".join(zlib.decompressobj().decompress(stream) for stream in streams)


@pytest.mark.parametrize("item", DRAWING)
def test_a_pdf_has_its_fonts_in_it_and_changes_nothing_else(item, tmp_path):
    path = own_numbers(item, tmp_path)
    draw_again(DRAWING[item], path)
    png, pdf = path.with_suffix(".png"), path.with_suffix(".pdf")
    before = png.read_bytes()
    assert not pdf.exists()
    png.unlink()
    draw_again(DRAWING[item], path, "--figure-format", "pdf")
    assert pdf.read_bytes().startswith(b"%PDF") and png.read_bytes() == before
    text = pdf_text(pdf)
    assert b"/FontFile2" in text and b"/CIDFontType2" in text and b"/Type3" not in text


@pytest.mark.parametrize(("item", "sizes"), [("fig1", {(13, 13)}), ("attention_maps", {(8, 8), (2, 2)})])
def test_images_in_a_pdf_are_not_resampled_and_drawn_again_it_is_the_same_file(item, sizes, tmp_path):
    path = own_numbers(item, tmp_path)
    draw_again(DRAWING[item], path, "--figure-format", "pdf")
    drawn = path.with_suffix(".pdf").read_bytes()
    draw_again(DRAWING[item], path, "--figure-format", "png", "pdf")
    assert path.with_suffix(".pdf").read_bytes() == drawn
    images = re.findall(rb"<<[^<>]*/Subtype /Image[^<>]*", drawn)
    found = {tuple(int(re.search(rb"/%s (\d+)" % side, entry)[1]) for side in (b"Width", b"Height"))
             for entry in images}
    assert sizes <= found


def test_the_format_of_a_figure_stays_out_of_its_stages():
    parser = fig2_leading_blocks.build_parser()
    args = tables.parse(parser, ["--figure-format", "pdf", "--workers", "0"])
    for script in ("sec3_benchmark/pretrain_mae.py", "sec3_benchmark/finetune.py", "sec3_benchmark/transfer.py"):
        words = tables.words_of(script, args, 0)[1]
        assert "--workers" in words and "--figure-format" not in words
        assert "figure_format" not in scripts.own_settings(script)


@pytest.mark.parametrize("item", DRAWING)
def test_a_figure_is_drawn_from_its_own_numbers_alone(item, tmp_path):
    """Any other file is refused in one line and leaves no picture."""
    for other in DRAWING:
        path = own_numbers(other, tmp_path)
        if other == item:
            assert len(draw_again(DRAWING[item], path)) and path.with_suffix(".png").exists()
        else:
            with pytest.raises(UserError, match=f"--from-numbers {path}"):
                draw_again(DRAWING[item], path)
            assert not path.with_suffix(".png").exists()
    own = own_numbers(item, tmp_path)
    whole = own.read_bytes()
    wrong = {"text": b"some text\n", "nothing": b"", "half": whole[:len(whole) // 2], "list": b"[1, 2]", "zero": b"{}",
             "no rows": json.dumps({"item": item, "points": [], "rows": []}).encode(),
             "other rows": json.dumps({"item": item, "points": [{"k": "x"}], "rows": [3]}).encode()}
    for name, content in wrong.items():
        path = tmp_path / f"{name}{own.suffix}"
        path.write_bytes(content)
    if own.suffix == ".npz":
        np.savez(tmp_path / "shapes.npz", A=np.ones(3), B=np.array("text"), item=np.array(item))
        np.savez(tmp_path / "objects.npz", A=np.array([{}], dtype=object), item=np.array(item))
        np.save(tmp_path / "array.npy", np.ones(3))
        (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / f"folder{own.suffix}").mkdir()
    unfit = [path for path in tmp_path.glob(f"*{own.suffix}") if path.stem not in DRAWING]
    assert len(unfit) >= 8
    for path in (*unfit, tmp_path / f"absent{own.suffix}", tmp_path, tmp_path / "text.md"):
        with pytest.raises(UserError, match=f"--from-numbers {path}"):
            draw_again(DRAWING[item], path)
        assert not path.with_suffix(".png").exists()


def test_the_picture_of_claims_shows_those_that_are_named(tmp_path, monkeypatch):
    path, drawn = own_numbers("claims", tmp_path), []
    content = json.loads(path.read_text())
    content["rows"].append({**content["rows"][0], "claim": "C2"})
    path.write_text(json.dumps(content))
    draw_panel = claims.draw_panel
    monkeypatch.setattr(claims, "draw_panel", lambda axis, rows: (drawn.append([row["claim"] for row in rows]),
                                                                  draw_panel(axis, rows)))
    draw_again(claims, path)
    draw_again(claims, path, "--claims", "C2", "C8")
    assert drawn == [["C1", "C2"], ["C2"]]
    with pytest.raises(UserError, match="^--claims C8: .* holds only C1 C2$"):
        draw_again(claims, path, "--claims", "C8")
