"""``dattri report``: the page of results with known numbers."""

import base64
import copy
import json
import re
from html.parser import HTMLParser

import pytest
from dattri_reports.bars import WIDTH, bar
from dattri_reports.joined import scale_of
from dattri_reports.results import find_results

import dattri_core as dattri
from dattri_core.cli import main


def row(metric, method, value, **changes):
    found = {
        "metric": metric, "method": method, "models": 1, "seeds": [0, 1], "value": value,
        "low": value - 0.1, "high": value + 0.1, "confidence": 0.95, "chance": 0.0,
        "ceiling": 0.9, "higher_is_better": True, "seconds": 1.5, "peak_bytes": 2**20,
        "notes": [], "error": None,
    }  # fmt: skip
    return {**found, **changes}


def failed(metric, method, error):
    blank = dict.fromkeys(row("", "", 0.0))
    return {**blank, "metric": metric, "method": method, "notes": [], "error": error}


def results(**changes):
    return {
        "format": 1, "setting": "toy", "title": "toy <data>", "size": [24, 8], "seeds": [0, 1],
        "command": "dattri bench toy", "notes": ["said & done"], "versions": {"torch": "9"},
        "hardware": {"cores": 2},
        "rows": [
            row("lds", "good", 0.5, notes=["a < b"]),
            row("lds", "bad", -0.25),
            failed("lds", "none", "ValueError: <no> luck"),
            row("drop", "good", 0.3, higher_is_better=False, ceiling=None, seconds=None),
            row("drop", "bad", 0.2, higher_is_better=False, peak_bytes=None),
        ],
        **changes,
    }  # fmt: skip


def write(folder, data, name="results.json"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def page(tmp_path):
    write(tmp_path / "runs" / "one", results())
    other = results(setting="other", rows=[row("lds", "good", 0.75)])
    write(tmp_path / "runs" / "two", other)
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Every tag with its attributes; raises where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "line", "rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(page):
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "iframe", "img")]
    for _, attributes in parsed.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "ValueError: &lt;no&gt; luck" in page
    assert "a &lt; b" in page
    assert "said &amp; done" in page
    assert "toy &lt;data&gt;" in page


def test_every_number_is_on_the_page(page):
    tables = page.split('<table class="methods">')[1:]
    assert len(tables) == 3
    first = tables[0].split("</table>")[0]
    good, bad, none = first.split("<tr")[2:]
    assert "<b>0.500</b>" in good
    assert "0.400 to 0.600" in good
    numbers = re.findall(r'"number">([^<]*)<', good)
    assert numbers == ["0.000", "0.900", "1.5 s", "1.0 MiB"]
    assert "<b>-0.250</b>" in bad
    assert "not run" in none
    assert re.findall(r'"number">([^<]*)<', tables[1].split("<tr")[2]) == [
        "0.000", "&ndash;", "&ndash;", "1.0 MiB"
    ]  # fmt: skip
    assert page.count("lower is better") == 1


def test_the_overview_marks_the_best_of_each_column(page):
    overview = page.split('<table class="overview">')[1].split("</table>")[0]
    lines = {
        re.search(r"<code>(\w+)</code>", line)[1]: re.findall(r"<td[^>]*>[^<]*</td>", line)
        for line in overview.split("<tr>")[2:]
    }
    best = '<td class="best">'
    assert lines["good"] == [f"{best}0.500</td>", "<td>0.300</td>", f"{best}0.750</td>"]
    assert lines["bad"] == ["<td>-0.250</td>", f"{best}0.200</td>", "<td></td>"]
    assert "not run" in lines["none"][0]


def test_of_equal_columns_the_later_run_counts(tmp_path):
    first = write(tmp_path / "a", results(rows=[row("lds", "good", 0.1), row("lds", "old", 0.2)]))
    second = write(tmp_path / "b", results(rows=[row("lds", "good", 0.9)]))
    out = tmp_path / "r.html"
    assert main(["report", str(first), str(second), "--out", str(out)]) == 0
    overview = out.read_text().split('<table class="overview">')[1].split("</table>")[0]
    assert "0.900" in overview
    assert "0.100" not in overview
    assert "0.200" in overview


def test_an_axis_holds_all_that_is_drawn():
    assert scale_of([row("m", "a", 0.5), row("m", "b", -0.3)]) == (-0.4, 0.9)
    assert scale_of([]) == (0.0, 1.0)
    drawn = bar(0.5, -0.5, 1.5, 0.0, ceiling=1.0, scale=(-1.0, 1.0))
    assert f'cx="{0.75 * WIDTH:.1f}"' in drawn
    assert f'class="chance" x1="{0.5 * WIDTH:.1f}"' in drawn
    assert f'class="ceiling" x1="{WIDTH:.1f}"' in drawn
    assert f'x="{0.25 * WIDTH:.1f}" y="6" width="{0.75 * WIDTH:.1f}"' in drawn  # cut at the end


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rows"), "has no rows"),
        (lambda d: d.update(format=7), "format 7"),
        (lambda d: d["rows"][0].update(low=None), "a row without"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, change, message):
    data = copy.deepcopy(results())
    change(data)
    path = write(tmp_path, data)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(path) in said
    assert not (tmp_path / "r.html").exists()


def test_places_without_results_are_refused(tmp_path):
    with pytest.raises(dattri.InputError, match=r"no results\.json"):
        find_results([str(tmp_path)])
    (tmp_path / "results.json").write_text('{"format": 1')
    with pytest.raises(dattri.StoreError, match="is no JSON"):
        find_results([str(tmp_path)])


# --- seeds that failed ----------------------------------------------------------------------------
def test_rows_that_lack_seeds_are_marked_and_never_the_best(tmp_path):
    rows = [row("lds", "good", 0.5), row("lds", "lucky", 0.9, seeds=[1])]
    write(tmp_path, results(rows=rows))
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    page = out.read_text()
    overview = page.split('<table class="overview">')[1].split("</table>")[0]
    assert '<td class="best">0.500</td>' in overview
    assert "<td>0.900 <small>1 of 2 seeds</small></td>" in overview
    assert "<code>lucky</code> <small>1 of 2 seeds</small>" in page
    assert "<code>good</code></th>" in page
    write(tmp_path, results(rows=rows[1:]))
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    assert '<td class="best">0.900 <small>' in out.read_text()  # no row has all seeds


# --- studies --------------------------------------------------------------------------------------
def comparison(what, difference, p, **changes):
    found = {
        "setting": "toy", "metric": "lds", "what": what, "against": "dot", "over": "seeds",
        "count": 2, "difference": difference, "low": difference - 0.1, "high": difference + 0.1,
        "p": p, "p_holm": p, "better": True,
    }  # fmt: skip
    return {**found, **changes}


def mean(label, value, **changes):
    found = {
        "setting": "toy", "metric": "lds", "label": label, "levels": {"scorer": label},
        "seeds": [0, 1], "value": value, "low": value - 0.1, "high": value + 0.1, "chance": 0.0,
        "higher_is_better": True, "rank": 1.5, "seconds": 0.25, "peak_bytes": None, "error": None,
        "failed": 0,
    }  # fmt: skip
    return {**found, **changes}


def study(**changes):
    blank = dict.fromkeys(("value", "low", "high", "chance", "rank", "seconds"))
    return {
        "format": 1, "study": "which <scorer>", "notes": ["said of it"], "versions": {"torch": "9"},
        "hardware": {"cores": 2}, "rows": [],
        "saved": [{"what": "attributions", "alone": 8, "done": 4}],
        "means": [
            mean("dot", 0.625), mean("lacks", 0.75, seeds=[1], failed=1),
            {**mean("none", 0.0), **blank, "error": "E: <why>", "seeds": [], "failed": 2},
        ],
        "effects": [comparison("scorer: cosine", -0.125, 0.0004)],
        "comparisons": [comparison("lacks", 0.375, None, low=None, high=None, p_holm=None)],
        **changes,
    }  # fmt: skip


def test_a_study_is_joined_with_its_tables_and_figures(tmp_path, capsys):
    write(tmp_path / "bench", results())
    write(tmp_path / "studies" / "one", study(), "study.json")
    figure = tmp_path / "studies" / "one" / "effects.svg"
    figure.write_text("<svg>drawn</svg>")
    out = tmp_path / "r.html"
    places = [str(tmp_path / "bench"), str(tmp_path / "studies")]
    assert main(["report", *places, "--out", str(out)]) == 0
    assert "2 joined" in capsys.readouterr().out
    page = out.read_text()
    for tag, attributes in Page(page.replace("<img ", "<line ")).tags:
        assert tag not in ("script", "iframe")
        assert attributes.get("src", "data:").startswith("data:")
    own = page.split("<h2>Study which &lt;scorer&gt;</h2>")[1]
    assert base64.b64decode(own.split("base64,")[1].split('"')[0]) == figure.read_bytes()
    means, effects, tests = (part.split("</table>")[0] for part in own.split("<table ")[1:])
    assert "<b>0.625</b>" in means
    assert re.findall(r'"number">([^<]*)<', means.split("<tr")[2]) == [
        "0.000", "1.5", "250 ms", "&ndash;"
    ]  # fmt: skip
    assert "<code>lacks</code> <small>1 of 2 seeds</small>" in means
    assert "E: &lt;why&gt;" in means
    assert "<td>-0.125 [-0.225, -0.025]</td>" in effects
    assert re.findall(r'"number">([^<]*)<', effects)[2:] == ["&lt; 0.001", "&lt; 0.001"]
    assert "<td>2 seeds</td><td>+0.375</td>" in tests
    assert re.findall(r'"number">([^<]*)<', tests)[2:] == ["&ndash;", "&ndash;"]
    assert "attributions: 8 if each cell had been alone, 4 done" in own
    assert "said of it" in own


def test_a_study_alone_has_no_overview(tmp_path):
    path = write(tmp_path, study(), "study.json")
    out = tmp_path / "r.html"
    assert main(["report", str(path), "--out", str(out)]) == 0
    page = out.read_text()
    assert "All settings" not in page
    assert "<dt>study</dt><dd>1</dd>" in page
    assert "benchmark</dt>" not in page


def test_a_place_without_results_is_passed_over_where_others_have_some(tmp_path, capsys):
    write(tmp_path / "bench", results())
    (tmp_path / "empty").mkdir()
    out = tmp_path / "r.html"
    places = [str(tmp_path / "empty"), str(tmp_path / "bench"), str(tmp_path / "nowhere")]
    assert main(["report", *places, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for name in ("empty", "nowhere"):
        assert f"passed over {str(tmp_path / name)!r}: it holds no results.json" in said
    assert "1 joined" in said
    assert "<b>0.500</b>" in out.read_text()


def test_what_is_no_study_is_refused(tmp_path, capsys):
    data = study()
    del data["means"]
    path = write(tmp_path, data, "study.json")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert f"{str(path)!r} has no means; expected the study.json that dattri ablate writes" in said


def test_the_results_of_a_study_are_what_the_report_reads(tmp_path):
    """The other side of the contract: `dattri ablate` writes these keys."""
    from dattri_bench.studies.command import write as write_study
    from dattri_bench.studies.results import Results, Row

    rows = tuple(
        Row(
            "digits", 1, {"scorer": name}, name, "lds", seed, "done",
            {"value": value + seed / 8, "low": 0.0, "high": 1.0, "confidence": 0.95,
             "chance": 0.0, "ceiling": None, "higher_is_better": True},
        )
        for name, value in (("dot", 0.5), ("cosine", 0.25)) for seed in (0, 1)
    )  # fmt: skip
    asked = dattri.Study(
        name="s", setting="digits", metrics=["lds"], factors={"scorer": ["dot", "cosine"]},
        seeds=[0, 1],
    )  # fmt: skip
    write_study(Results(asked, rows, (), frozenset({"lds"})), tmp_path)
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    page = out.read_text()
    assert "<b>0.562</b>" in page
    assert page.count("data:image/svg+xml") == len(list(tmp_path.glob("*.svg"))) > 0
    assert "scorer: cosine" in page
