"""appendix/report_page.py: every item appears once, with its numbers, picture and origin; nothing from outside."""
import json
from argparse import Namespace
from html.parser import HTMLParser

import pytest

from appendix import report_page
from common import report
from common.errors import UserError
from common.options import resolve
from common.tables import NOTES

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
    parser = report_page.build_parser()
    args = resolve(parser, {}, explicit={"folders": [str(folder) for folder in folders],
                                         "output_file": str(tmp_path / "page" / "report.html")})
    result = report_page.main(args)
    return result, Reader((tmp_path / "page" / "report.html").read_text())


def test_the_page_holds_every_item_and_nothing_from_elsewhere(tmp_path):
    columns = {"row": lambda row: row["name"], "measured": lambda row: row["measured"]}
    rows = [{"name": "a <b> & c", "published": 78.0, "status": "run", "measured": 12.5}]
    demo, small = Namespace(preset="demo", data="fractals"), Namespace(preset="small", data="folder")
    later = {"name": "later", "published": 2.0, "status": "not chosen", "measured": []}
    report.write_table(tmp_path / "outputs" / "table9", "table9", demo, columns, [*rows, later],
                       notes=["- first\n- second", "A note.", NOTES["demo"]])
    (tmp_path / "outputs" / "table9" / "table9.png").write_bytes(PNG)
    (tmp_path / "outputs" / "table9" / "other.png").write_bytes(PNG)
    report.write_table(tmp_path / "results", "fig9", small, columns, rows)
    report.write_table(tmp_path / "results", "fig2", small, columns, rows)
    (tmp_path / "outputs" / "settings.json").write_text(json.dumps({"epochs": 1}))  # no item
    (tmp_path / "outputs" / "broken.json").write_text("{")
    result, page = make([tmp_path / "outputs", tmp_path / "results"], tmp_path)
    text = " ".join(page.text)
    assert result["items"] == 3 and page.tags.count("h2") == 3 and page.tags.count("table") == 3
    places = [text.rindex(title) for title in ("table9", "Figure 2: leading blocks", "fig9")]
    assert places == sorted(places)  # folder by folder, and there in the paper's order
    assert page.tags.count("img") == 1 and page.tags.count("li") == 2
    assert page.tags.count("details") == 1 and "later (2.0: not chosen)" in text  # folded away, but there
    assert "a <b> & c" in page.text and "12.5" in page.text and "A note." in text  # escaped, so it reads as written
    assert text.count("is no evidence for the paper") == 1 and NOTES["demo"] not in text  # the demo is marked once
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} == set(page.ids)
    assert "script" not in page.tags and "link" not in page.tags


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no table or figure in"):
        make([tmp_path], tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        make([tmp_path / "absent"], tmp_path)
