"""The demo, from the command to the page, with methods of known scores."""

import argparse
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from dattri_reports import outcome as outcome_module
from dattri_reports.demo import Demo, command

import dattri_core as dattri
from dattri_core.registry import LOCAL, Registry, using
from dattri_core.scores import Scores


class Oracle:
    """Scores that know the wrong labels: they harm every test image."""

    def __init__(self, flipped):
        self.flipped = flipped

    def attribute(self, task, train, test, **settings):
        n, m = len(train[1]), len(test[1])
        noise = np.random.default_rng(0).normal(size=(n, m))
        return Scores(np.where(self.flipped[:, None], -20.0, 0.0) + noise)


class Broken:
    def attribute(self, task, train, test, **settings):
        raise ValueError('no <luck> & "none" at all')


class Page(HTMLParser):
    """Every tag with its attributes, and what lies open around it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag not in ("meta", "link", "img", "br", "line", "rect", "circle", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


WORLD = {}


class Small:
    """A setting like the embedded one, small."""

    title = "digits"
    sizes = {"full": (1437, 200), "small": (300, 60)}
    metrics = ("mislabel-auroc",)

    def load(self, size, seed=0, wrong=None):
        from dattri_benchmarks import digits

        WORLD["made"] = digits.setting.load(size, seed, wrong)
        return WORLD["made"]


class Text(Small):
    """A setting without classes."""

    metrics = ("lds",)


small, text = Small(), Text()


class LateOracle(Oracle):
    """Knows the world that was just made."""

    def __init__(self):
        super().__init__(None)

    def attribute(self, task, train, test, **settings):
        self.flipped = WORLD["made"].flipped
        return super().attribute(task, train, test, **settings)


oracle, broken = LateOracle(), Broken()


def extra_section(report):
    return f"<section id='extra'>{len(report.outcomes)} methods</section>"


@pytest.fixture(scope="module")
def registry():
    made = Registry(LOCAL)
    here = __name__
    made.part("setting", "small", f"{here}:small")
    made.part("setting", "text", f"{here}:text")
    made.part("metric", "mislabel-auroc", "dattri_metrics.mislabel:MislabelAuroc")
    made.part("attributor", "oracle", f"{here}:oracle")
    made.part("attributor", "broken", f"{here}:broken")
    made.part("attributor", "random", "dattri_baselines.random:Random")
    made.part("report_section", "extra", f"{here}:extra_section")
    for name in ("oracle", "broken", "random"):
        made.method(name, {"attributor": name}, summary=f"the {name}", formula="S", citation="-")
    with using(made):
        yield made


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


@pytest.fixture(scope="module")
def page(registry, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "report.html"
    assert run("--data", "small", "--out", str(out)) == 0
    text = out.read_text(encoding="utf-8")
    return text, Page(text), WORLD["made"]


def test_the_page_is_well_formed_and_complete(page):
    text, parsed, _ = page
    sections = [a["id"] for tag, a, _ in parsed.tags if tag == "section"]
    assert sections == [
        "table", "suspects", "neighbours", "histogram", "agreement", "extra", "reading"
    ]  # fmt: skip
    assert "3 methods" in text


def test_the_page_loads_nothing_from_elsewhere(page):
    text, parsed, _ = page
    assert not [tag for tag, _, _ in parsed.tags if tag in ("script", "iframe", "object", "base")]
    for _, attributes, _ in parsed.tags:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in style


def test_exactly_the_wrong_labels_are_marked(page):
    text, parsed, world = page
    where = {name: i for i, name in enumerate(world.train_ids)}
    seen = set()
    for tag, attributes, _ in parsed.tags:
        if tag == "figure" and "train" in attributes.get("class", "").split():
            position = where[attributes["data-id"]]
            seen.add(position)
            assert ("flipped" in attributes["class"].split()) == bool(world.flipped[position])
    assert {bool(world.flipped[i]) for i in seen} == {True, False}
    for match in re.finditer(
        r'<figure class="train flipped" data-id="([^"]+)">.*?<figcaption>label (\d) '
        r'<b class="truth">true (\d)</b>', text
    ):  # fmt: skip
        position = where[match[1]]
        assert int(match[2]) == int(world.train[1][position])
        assert int(match[3]) == int(world.true_labels[position])


def test_the_images_are_those_of_the_examples(page):
    from dattri_reports.png import data_address

    text, _, world = page
    sides = {
        "train": (world.train_ids, world.pictures[0]),
        "test": (world.test_ids, world.pictures[1]),
    }
    found = re.findall(
        r'<figure class="(train|test)[^"]*" data-id="([^"]+)"><img src="([^"]+)"', text
    )
    assert len(found) > 50
    for side, name, address in found:
        ids, images = sides[side]
        assert address == data_address(images[ids.index(name)])


def test_each_row_shows_the_top_and_bottom_of_its_method(page):
    text, _, world = page
    scores = Oracle(world.flipped).attribute(None, world.train, world.test).values.numpy()
    block = next(b for b in text.split("<details")[1:] if "<code>oracle</code>" in b)
    rows = block.split('<div class="row">')[1:]
    assert len(rows) == 8
    for row in rows:
        name = re.search(r'class="test [a-z]+" data-id="([^"]+)"', row)[1]
        column = scores[:, world.test_ids.index(name)]
        helpful, harmful = row.split('<div class="harmful">')
        for part, order in ((helpful, np.argsort(-column)), (harmful, np.argsort(column))):
            ids = re.findall(r'class="train[^"]*" data-id="([^"]+)"', part)
            assert ids == [world.train_ids[i] for i in order[:7]]


def test_every_image_says_what_it_is(page):
    _, parsed, _ = page
    alts = [a.get("alt", "") for tag, a, _ in parsed.tags if tag == "img"]
    assert all(len(alt) > 20 for alt in alts)


def test_a_method_that_fails_is_a_row_with_its_error(page):
    text, _, _ = page
    assert "ValueError: no &lt;luck&gt; &amp; &quot;none&quot; at all" in text
    assert "<luck>" not in text


def test_the_table_holds_the_metric_of_the_scores(page):
    from dattri_metrics.mislabel import auroc

    text, _, world = page
    scores = Oracle(world.flipped).attribute(None, world.train, world.test)
    want = auroc(-scores.mean_over_tests().numpy(), world.flipped)
    row = next(r for r in text.split("<tr>") if "<code>oracle</code>" in r and "measure" in r)
    assert f"<b>{want.value:.3f}</b>" in row
    assert f"{want.low:.3f} to {want.high:.3f}" in row
    assert "15 of 15 wrong labels" in text


def test_the_printed_table(registry, tmp_path, capsys):
    args = ("--data", "small", "--methods", "oracle,broken", "--out", str(tmp_path / "r.html"))
    assert run(*args) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^oracle +- +1\.000 \[0\.\d{3}, 1\.000\] +\d+\.\d\d s", printed, re.MULTILINE)
    assert re.search(r"^broken +not run: ValueError", printed, re.MULTILINE)
    assert str(tmp_path / "r.html") in printed


def test_when_every_method_fails_nothing_is_written(registry, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert run("--data", "small", "--methods", "broken", "--out", str(out)) == 1
    assert not out.exists()


def test_bad_options_are_refused_before_training(registry, tmp_path):
    WORLD.clear()
    with pytest.raises(dattri.InputError, match="did you mean 'oracle'"):
        run("--data", "small", "--methods", "oracel")
    with pytest.raises(dattri.SpecError, match="small"):
        run("--data", "smal")
    with pytest.raises(dattri.InputError, match="'text' is not meant for 'mislabel-auroc'"):
        run("--data", "text")
    with pytest.raises(dattri.InputError, match="is a folder"):
        run("--data", "small", "--out", str(tmp_path))
    assert not WORLD


def test_numbers_that_differ_by_rounding_are_ties():
    rng = np.random.default_rng(0)
    assert outcome_module._is_constant(1 + 1e-7 * rng.normal(size=50))
    assert not outcome_module._is_constant(np.append(np.zeros(50), 1e-9))
    assert not outcome_module._is_constant(np.exp(20 * rng.random(50)))


def test_the_help_names_the_report():
    parser = argparse.ArgumentParser()
    Demo().add_arguments(parser)
    assert parser.parse_args([]).out == "demo-report.html"
    assert parser.parse_args([]).data == "digits"
