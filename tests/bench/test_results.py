"""Rows, tables and the figure, from cells whose numbers are known."""

import csv
import io
import re
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from dattri_bench.figure import draw
from dattri_bench.summary import Row, interval_of, rows_of
from dattri_bench.tables import COLUMNS, as_csv, as_markdown, as_text
from dattri_parts.choices import Choice, choices_of

import dattri_core as dattri

ROWS = [
    Row("lds", "good", 1, (0,), 0.5, 0.4, 0.62, 0.95, 0.0, 0.8, True, 1.5, 2**20, ("a note",)),
    Row("lds", "bad", 1, (0,), -0.1, -0.2, 0.05, 0.95, 0.0, 0.8, True, 0.25, None),
    Row("lds", "none", 1, error="ValueError: a, b | c"),
    Row("drop", "good", 1, (0,), 0.2, 0.1, 0.3, 0.95, 0.5, None, False, 1.5, 2**20),
]


def finished(method, metric, seed, value, higher=True, **record):
    cell = SimpleNamespace(
        measure=SimpleNamespace(label=metric, needs_wrong_labels=False),
        entrant=SimpleNamespace(label=method, models=1),
        seed=seed,
    )
    result = None
    if value is not None:
        result = {"value": value, "low": value - 1, "high": value + 2, "chance": seed / 10,
                  "ceiling": None if seed == 1 else 0.9, "confidence": 0.9,
                  "higher_is_better": higher}  # fmt: skip
    attribution = {"seconds": 1.0 + seed, "peak_bytes": 100 * (seed + 1), "notes": []}
    return SimpleNamespace(
        cell=cell, record={"result": result, "attribution": attribution, **record}
    )


def test_rows_are_means_over_seeds_best_first():
    rows = rows_of(
        [
            finished("low", "m", 0, 0.1),
            finished("two", "m", 0, 0.5),
            finished("two", "m", 2, 0.7),
            finished("half", "m", 0, 0.55),
            finished("half", "m", 1, None, error="E: why"),
            finished("none", "m", 0, None, error="E: not"),
            finished("low", "down", 0, 0.1, higher=False),
            finished("two", "down", 0, 0.5, higher=False),
        ]
    )
    assert [(r.metric, r.method) for r in rows] == [
        ("m", "two"), ("m", "low"), ("m", "half"), ("m", "none"), ("down", "low"), ("down", "two")
    ]  # fmt: skip
    two, low, half, none = rows[:4]
    assert np.allclose([two.value, two.chance, two.ceiling, two.seconds], [0.6, 0.1, 0.9, 2.0])
    assert (two.peak_bytes, two.seeds) == (300, (0, 2))
    # own half-widths of 2 give 2 / sqrt(2); Student's t of 0.5 and 0.7 is less, 0.63
    assert np.allclose([two.low, two.high], 0.6 + np.sqrt(2) * np.array([-1, 1]))
    assert half.notes == ("seed 1 gave none: E: why",)
    assert (half.seeds, half.failed, half.counted) == ((0,), (1,), "1 of 2")
    assert (two.failed, two.counted) == ((), "2")
    assert (low.low, low.high) == (0.1 - 1, 2.1)
    assert (none.value, none.error) == (None, "E: not")


def seed_result(value, half=0.0, **more):
    return {"value": value, "low": value - half, "high": value + half, "confidence": 0.9, **more}


def test_an_interval_over_seeds_covers():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        low, high = interval_of([seed_result(v) for v in rng.normal(3.0, 0.2, size=4)])
        inside += low <= 3.0 <= high
    assert abs(inside / 2000 - 0.9) < 0.025


def test_an_interval_over_seeds_is_students_or_what_the_seeds_own_give():
    # t with 1 degree of freedom at 90 %: tan(0.45 pi); s / sqrt(2) of 0.5 and 0.7 is 0.1
    students = 0.1 * np.tan(0.45 * np.pi)
    for half, want in ((0.0, students), (0.5, students), (2.0, np.sqrt(2 * 2.0**2) / 2)):
        found = interval_of([seed_result(0.5, half), seed_result(0.7, half)])
        assert np.allclose(found, [0.6 - want, 0.6 + want])
    # the wider side of an interval counts
    lopsided = [{**seed_result(0.5), "low": 0.4, "high": 0.8}] * 2
    assert np.allclose(interval_of(lopsided), [0.5 - 0.3 / np.sqrt(2), 0.5 + 0.3 / np.sqrt(2)])


def test_an_interval_over_seeds_stays_within_the_metrics_values():
    values = [0.9, 0.6]
    free = interval_of([seed_result(v) for v in values])
    assert free[0] < 0 < 1 < free[1]
    assert interval_of([seed_result(v, bounds=[0.0, 1.0]) for v in values]) == (0.0, 1.0)
    assert interval_of([seed_result(v, bounds=[0.0, None]) for v in values]) == (0.0, free[1])
    # a record of an earlier release among them says nothing of bounds
    mixed = [seed_result(0.9, bounds=[0.0, 1.0]), seed_result(0.6)]
    assert interval_of(mixed) == free
    assert interval_of([seed_result(0.9, bounds=None), seed_result(0.6)]) == free


def test_shares_of_few_tests_are_covered_though_seeds_agree():
    from scipy.stats import t

    rng, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        results = []
        for right in rng.random((2, 20)) < 0.9:
            half = t.ppf(0.95, 19) * right.std(ddof=1) / np.sqrt(20)
            results.append(seed_result(right.mean(), half))
        low, high = interval_of(results)
        inside += low <= 0.9 <= high
    assert inside / 1000 > 0.9  # 0.79 by Student's alone: one pair of seeds in five agrees


def test_how_many_seeds_a_row_has_is_shown_where_there_are_several():
    rows = [
        Row("m", "whole", 1, (0, 1), 0.5, 0.4, 0.6, 0.95, 0.0),
        Row("m", "lacks", 1, (0,), 0.9, 0.8, 1.0, 0.95, 0.0, failed=(1,)),
        Row("n", "whole", 1, (0, 1), 0.5, 0.4, 0.6, 0.95, 0.0),
    ]
    text, page = as_text(rows), as_markdown(rows)
    assert re.search(r"^method .* seeds$", text, re.MULTILINE)
    assert re.search(r"^whole .* 2$", text, re.MULTILINE)
    assert re.search(r"^lacks .* 1 of 2$", text, re.MULTILINE)
    assert "| - | 1 of 2 |" in page
    assert [line["failed"] for line in csv.DictReader(io.StringIO(as_csv(rows)))] == ["", "1", ""]
    assert "seeds" not in as_text(ROWS)


def test_csv_holds_every_number_in_full():
    lines = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    assert list(lines[0]) == list(COLUMNS)
    assert [float(lines[0][k]) for k in ("value", "low", "high")] == [0.5, 0.4, 0.62]
    assert lines[2]["error"] == "ValueError: a, b | c"
    assert lines[2]["value"] == ""
    assert lines[0]["notes"] == "a note"


def test_text_and_markdown_show_every_row():
    text, page = as_text(ROWS), as_markdown(ROWS)
    assert re.search(r"^good +0\.500 \[0\.400, 0\.620\] +0\.000 +0\.800 +1\.50 +1\.0 MiB$", text,
                     re.MULTILINE)  # fmt: skip
    assert re.search(r"^bad +-0\.100 \[-0\.200, 0\.050\] +0\.000 +0\.800 +0\.25 +-$", text,
                     re.MULTILINE)  # fmt: skip
    assert re.search(r"^none +not run: ValueError: a, b \| c$", text, re.MULTILINE)
    assert "## drop (lower is better)" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {7}
    assert "- good: a note" in page


def test_the_figure_has_a_bar_an_interval_and_both_levels(tmp_path):
    files = draw(ROWS, "a title", tmp_path / "results")
    assert [path.name for path in files] == ["results.png", "results.svg"]
    assert files[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    tree = ElementTree.parse(files[1])
    words = [e.text.strip() for e in tree.iter() if e.tag.endswith("text") and e.text]
    for word in ("good", "bad", "none", "not run", "chance", "ceiling", "lds", "a title"):
        assert word in words, words
    assert words.count("good") == 2
    assert any("lower is better" in word for word in words)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as matplotlib holds them."""
    from matplotlib.figure import Figure

    found, save = [], Figure.savefig

    def keep(self, *arguments, **named):
        found.append(self)
        save(self, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def test_bars_stand_where_the_numbers_are(tmp_path, drawn):
    draw(ROWS, "t", tmp_path / "r")
    top, bottom = drawn[0].axes
    assert [bar.get_height() for bar in top.patches] == [0.5, -0.1]
    ends = [tuple(line.get_ydata()) for line in top.lines]
    assert (0.4, 0.62) in ends
    assert (-0.2, 0.05) in ends
    labelled = {line.get_label(): line.get_ydata()[0] for line in top.lines}
    assert labelled["chance"] == 0.0
    assert labelled["ceiling"] == 0.8
    assert [label.get_text() for label in top.get_xticklabels()] == ["good", "bad", "none"]
    assert "ceiling" not in {line.get_label() for line in bottom.lines}
    assert [bar.get_height() for bar in bottom.patches] == [0.2]


def test_levels_that_differ_are_drawn_one_by_one(tmp_path, drawn):
    rows = [
        Row("m", name, 1, (0,), 0.5, 0.4, 0.6, 0.95, chance, None)
        for name, chance in (("a", 0.1), ("b", 0.3))
    ]
    draw(rows, "t", tmp_path / "r")
    (axis,) = drawn[0].axes
    flat = [tuple(line.get_ydata()) for line in axis.lines]
    assert (0.1, 0.1) in flat
    assert (0.3, 0.3) in flat


def test_the_same_rows_give_the_same_figure(tmp_path):
    first = [path.read_bytes() for path in draw(ROWS, "t", tmp_path / "a")]
    assert [path.read_bytes() for path in draw(ROWS, "t", tmp_path / "b")] == first


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(dattri.InputError, match=r'pip install "dattri-core\[plot\]"'):
        draw(ROWS, "t", tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_choices_are_read_as_they_are_spelled():
    found = choices_of("method", ["trak:seed=4:damping=1e-3,if-cg", "if-cg"])
    assert found == [Choice("trak", {"seed": 4, "damping": 1e-3}), Choice("if-cg")]
    assert found[0].label == "trak (seed=4, damping=0.001)"
    (nested,) = choices_of("method", ['trak:damping={"relative":0.5}:scorer=dot'])
    assert nested.fields == {"damping": {"relative": 0.5}, "scorer": "dot"}
    assert len(choices_of("method", ["all"])) == len(dattri.default_registry().names("method"))
    with pytest.raises(dattri.InputError, match="NAME:FIELD=VALUE"):
        choices_of("method", ["trak:seed"])


def test_commas_and_colons_inside_json_separate_nothing():
    words = ["removal-curve:shares=[0.0,0.3]:trials=2,lds"]
    assert choices_of("metric", words) == [
        Choice("removal-curve", {"shares": [0.0, 0.3], "trials": 2}), Choice("lds")
    ]  # fmt: skip
    (nested,) = choices_of("method", ['trak:projector={"name":"a,b:c=1]","dims":[1,[2,3]]}:seed=4'])
    assert nested.fields == {"projector": {"name": "a,b:c=1]", "dims": [1, [2, 3]]}, "seed": 4}
    assert choices_of("method", ["trak:source=module:attr"])[0].fields == {"source": "module:attr"}
    (quoted,) = choices_of("method", ['trak:source="a\\",b"'])
    assert quoted.fields == {"source": 'a",b'}
    for word in ("removal-curve:shares=[0.0", 'lds:a="b', "lds:a=1]"):
        with pytest.raises(dattri.InputError, match="without its other half"):
            choices_of("metric", [word])


def test_dampings_are_split_outside_of_json():
    from dattri_bench.tuning import dampings_of

    assert dampings_of('damping=0.1,{"relative":0.5}') == (0.1, {"relative": 0.5})
    with pytest.raises(dattri.InputError, match="without its other half"):
        dampings_of('damping=0.1,{"relative":0.5')
