"""--from-numbers of every figure and of the claims: its own file is drawn, any other is refused in one line."""
import json

import numpy as np
import pytest

from appendix import a6_cka_settings, b1_stronger_references, claims
from appendix.evidence import OPEN
from common import tables
from common.errors import UserError
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
    """A file that a figure's script could have written, of the smallest size."""
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
        claim = {"claim": "C1", "statement": "s", "unit": "points", "beyond": 0, "within": None, "verdict": OPEN,
                 "effect": {"mean": 1.0, "low": 0.0, "high": 2.0, "values": [1.0]}}
        path = path.with_suffix(".json")
        path.write_text(json.dumps({"item": item, "points": [point], "rows": [claim if item == "claims" else row]}))
    return path


DRAWING = {"fig1": fig1_layer_similarity, "fig2": fig2_leading_blocks, "fig3": fig3_fourier,
           "fig4": fig4_leading_blocks_small_data, "fig5": fig5_attention, "attention_maps": attention_maps,
           "fig6": fig6_distilled_similarity, "fig7": fig7_distilled_layer, "a6": a6_cka_settings,
           "b1": b1_stronger_references, "claims": claims}


def draw_again(module, path):
    parse = getattr(module, "parse_maps", tables.parse)
    return module.main(parse(module.build_parser(), ["--from-numbers", str(path)]))


@pytest.mark.parametrize("item", DRAWING)
def test_a_figure_is_drawn_from_its_own_numbers_alone(item, tmp_path):
    """Any other file is refused in one line, and leaves no picture."""
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
