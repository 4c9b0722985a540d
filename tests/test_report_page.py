"""appendix/tools/report_page.py: every item once, with its numbers, picture and origin; nothing from outside."""
import json
from argparse import Namespace
from html.parser import HTMLParser

import pytest

from appendix.tools import report_page
from common import report
from common.errors import UserError
from common.tables import NOTES
from tests.helpers import settings_of

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


class Reader(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.ids, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                self.addresses.append(value)
            elif name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text.append(data)


def make(folders, tmp_path):
    args = settings_of(report_page, {"folders": [str(folder) for folder in folders] or None,
                                     "output_file": str(tmp_path / "page" / "report.html")})
    result = report_page.main(args)
    return result, Reader((tmp_path / "page" / "report.html").read_text())


def test_the_page_holds_every_item_and_nothing_from_elsewhere(tmp_path):
    columns = {"row": lambda row: row["name"], "measured": lambda row: row["measured"]}
    rows = [{"name": "a <b> & c", "published": 78.0, "status": "run", "measured": 12.5}]
    demo = Namespace(preset="demo", data="fractals", output=tmp_path / "outputs")
    small = Namespace(preset="small", data="folder", output=tmp_path / "results")
    later = {"name": "later", "published": 2.0, "status": "not chosen", "measured": []}
    report.write_table("table9", demo, columns, [*rows, later], notes=["- first\n- second", "A note.", NOTES["demo"]])
    (tmp_path / "outputs" / "table9" / "table9.png").write_bytes(PNG)
    (tmp_path / "outputs" / "table9" / "other.png").write_bytes(PNG)
    report.write_table("fig9", small, columns, rows)
    report.write_table("fig2", small, columns, rows)
    (tmp_path / "outputs" / "settings.json").write_text(json.dumps({"epochs": 1}))  # no item
    (tmp_path / "outputs" / "broken.json").write_text("{")
    result, page = make([tmp_path / "outputs", tmp_path / "results"], tmp_path)
    text = " ".join(page.text)
    assert result["items"] == 3 and page.tags.count("h3") == 3 and page.tags.count("table") == 3
    places = [text.rindex(title) for title in ("table9", "Figure 2: leading blocks", "fig9")]
    assert places == sorted(places)  # folder by folder, and there in the paper's order
    assert page.tags.count("img") == 1 and page.tags.count("li") == 2
    assert page.tags.count("details") == 1 and "later (2.0: not chosen)" in text  # folded away, but there
    assert "a <b> & c" in page.text and "12.5" in page.text and "A note." in text  # escaped, so it reads as written
    assert text.count("is no evidence for the paper") == 1 and NOTES["demo"] not in text  # the demo is marked once
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} == set(page.ids)
    assert "script" not in page.tags and "link" not in page.tags


def test_what_was_made_here_and_what_is_kept_are_two_parts(tmp_path, monkeypatch):
    """The same figure in both: each says where it lies and of which images it is, and has an anchor of its own."""
    monkeypatch.setattr(report_page.options, "ROOT", tmp_path)
    for place, options in (("outputs/fig1", "--preset small --data-path 'my images'"), ("sec4_analysis/results", ""),
                           ("outputs/other-fig1", "--data-path=DIR"), ("outputs/other/fig1", "--models 'a'")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "fig1.json").write_text(json.dumps({
            "item": "fig1", "data": "folder", "environment": {"command": f"python fig1.py {options}"}}))
    result, page = make((), tmp_path)
    text = (tmp_path / "page" / "report.html").read_text()
    made, kept = text.split("<h2>Made here: outputs/</h2>")[1].split("<h2>Kept with the repository: ")
    assert result["items"] == 4 == len(set(page.ids)) and made.count("<h3") == 3 and kept.count("<h3") == 1
    assert {address[1:] for address in page.addresses} == set(page.ids)
    for place, data in (("outputs/fig1", "folder, my images"), ("outputs/other-fig1", "folder, DIR"),
                        ("outputs/other/fig1", "folder")):
        assert f"Figure 1: similarity of layers <small>{place}/</small>" in made and f"data: {data};" in made
        assert f"numbers: {place}/fig1.json<" in made and place not in kept
    assert "<small>sec4_analysis/results/</small>" in kept and "data: folder;" in kept
    (tmp_path / "sec4_analysis" / "results" / "fig1.json").unlink()
    assert make((), tmp_path)[1].tags.count("h2") == 1  # no heading of nothing
    outputs = tmp_path / "outputs"
    result, page = make([outputs / "fig1", outputs], tmp_path)  # once, where it is named first
    assert result["items"] == 3 == len(page.ids) and page.tags.count("h2") == 2


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no table or figure in"):
        make([tmp_path], tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        make([tmp_path / "absent"], tmp_path)
