"""The benchmark of the item index runs and says what was asked; its figures mean nothing here."""

from __future__ import annotations

import json

from benchmarks.perf import item_index


def test_the_quick_form_prints_one_line_of_json(capsys, tmp_path):
    output = tmp_path / "item_index.json"
    item_index.main(["--quick", "--kinds", "ivf", "--output", str(output)])
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["ivf_recall_at_100_of_3000"] >= 0.9
    assert {"3000.exact.build_s", "3000.ivf.build_s", "3000.load_s"} < set(line["medians"])
    assert {"3000.ivf.seen.k100_ms", "3000.exact.allowed.k100_ms"} < set(line["medians"])
    assert json.loads(output.read_text()) == line
