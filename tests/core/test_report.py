"""The report's page: what it says of a real build, of an old one, and of hostile names."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Done, forks
from separable import small
from small_tasks import make

from samp_core.config import BuildConfig
from samp_core.manifest import read_manifest
from samp_core.report import render
from samp_core.report_facts import read_facts
from samp_core.report_html import safe, tag

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
VOID = {"meta", "link"}


class Reader(HTMLParser):
    """Elements, ids and text of a page; every element must be closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, name: str, attributes: Any) -> None:
        self.tags[name] = self.tags.get(name, 0) + 1
        given = dict(attributes)
        assert not [key for key in given if key.startswith("on")], given
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[key] for key in ("href", "src") if key in given]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@dataclass(frozen=True)
class Page:
    out: Path
    page: str

    @property
    def read(self) -> Reader:
        return Reader(self.page)

    @property
    def figures(self) -> Any:
        found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', self.page)
        assert found
        return json.loads(found[1])


def page_of(out: Path) -> Page:
    return Page(out, render(read_facts(out)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build by the default search, in which some tier serves an int8 plan."""
    folder = tmp_path_factory.mktemp("report")
    out = folder / "out"
    tiers = {"high": {"drop": 0.5}, "fast": {"drop": 30}, "quick": {"latency": 100}, "free": {}}
    yaml_file = small().yaml(
        folder / "build.yaml", out=str(out), tiers=tiers, strategy="milp", budget_s=20
    )
    done = forks().samp("build", "-c", yaml_file, "--json")
    assert done.code in (0, 1), done.err
    return out


@pytest.fixture(scope="module")
def page(built: Path) -> Page:
    return page_of(built)


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """The same build, to be changed."""
    shutil.copytree(built, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


def edit(out: Path, change: Any) -> None:
    path = out / "current" / "build.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def edit_plan(out: Path, tier: str, change: Any) -> None:
    path = out / "current" / "models" / f"encoder_small_{tier}" / "1" / "plan.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))


# the page of a whole build


def test_the_command_writes_one_file(built: Path, tmp_path: Path) -> None:
    done: Done = forks().samp("report", built, "--json")
    assert done.code == 0, done.err
    written = built / "report.html"
    assert done.json == {"page": str(written), "bytes": written.stat().st_size, "missing": []}
    other = tmp_path / "elsewhere.html"
    done = forks().samp("report", built, "--out", other)
    assert (done.code, done.out.strip()) == (0, str(other))
    assert other.read_bytes() == written.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere.html"]


def test_the_page_is_well_formed_and_needs_nothing(page: Page) -> None:
    read = page.read
    assert read.open == []
    assert len(read.ids) == len(set(read.ids))
    assert {link.removeprefix("#") for link in read.links if link != "data:,"} <= set(read.ids)
    assert read.tags["script"] == 3
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.page)
    assert policy
    told = html.unescape(policy[1])
    assert "default-src 'none'" in told
    assert told.count("'sha256-") == 2
    assert "unsafe" not in told.partition("style-src")[0]
    assert set(page.figures) <= set(read.ids)
    assert len(page.page) < 6e6


def test_every_tier_and_every_figure_of_it(page: Page) -> None:
    facts, words = read_facts(page.out), page.read.words
    for tier in facts.tiers:
        assert tier.name in words
        assert tier.plan.summary() in words
        assert tier.value is not None
        assert f"{100 * tier.value:.2f}%" in words
        assert tier.ci95 is not None
        assert f"{100 * tier.ci95[0]:.1f}, {100 * tier.ci95[1]:.1f}" in words
        assert f"{tier.size_mb:.1f} MB of weights" in words
    assert "at most 0.5 points lost" in words
    assert "at most 100 ms" in words
    assert f"{facts.rows:,} rows that the search never saw" in words
    for note in facts.record["warnings"]:
        assert " ".join(note.split()) in words


def test_every_test_is_there(page: Page) -> None:
    facts, words = read_facts(page.out), page.read.words
    tests = [(tier.name, test) for tier in facts.tiers for test in tier.tests]
    assert tests
    for name, test in tests:
        outcome = "held" if test["passed"] else "failed, and ended the sequence"
        drop = f"{100 * test['drop']:+.2f}".replace("-", "\u2212")
        row = (
            f"{name} {test['plan']} {test['b']} / {test['c']} of {test['n']:,} {drop} "
            f"{100 * test['bound']:.2f} {100 * test['promise']:g}"
        )
        assert row in words
        assert outcome in words
    made = page.figures["chart-tests"]
    shown = [y for trace in made["data"][:-1] for y in trace["y"]]
    assert len(shown) == len(tests)
    for trace in made["data"][:-1]:
        ends = [x + e for x, e in zip(trace["x"], trace["error_x"]["array"], strict=True)]
        assert all(any(abs(100 * t["bound"] - end) < 1e-9 for _, t in tests) for end in ends)


def test_the_front_has_every_plan_once(page: Page) -> None:
    facts, made = read_facts(page.out), page.figures["chart-front"]
    texts = [text for trace in made["data"] for text in trace.get("text") or []]
    for candidate in facts.candidates:
        found = [text for text in texts if f"<b>{candidate.name}</b>" in text]
        assert len(found) == (candidate.name != "float"), candidate.name
    for group in facts.groups():
        assert f"<b>{' = '.join(t.name for t in group)}</b>" in texts
    for view in made["views"].values():
        assert len(view["traces"]) == len(made["data"])
    modes = {trace["name"] for trace in made["data"]}
    assert {"SAMP full(k)", "plans of the search"} <= modes


def test_plan_maps_are_the_plans(page: Page) -> None:
    facts = read_facts(page.out)
    for place, group in enumerate(facts.groups()):
        plan, heat = group[0].plan, page.figures[f"chart-plan-{place}"]["data"][0]
        assert (len(heat["z"]), len(heat["z"][0])) == (plan.layers, 6)
        for layer, row in enumerate(heat["customdata"]):
            for site, told in zip(heat["x"], row, strict=True):
                name = f"layer.{layer}.{site}"
                assert told.startswith(f"<b>{name}</b>: {plan.precision(name)}")
                assert f"ran in {plan.precision(name)}" in told
    assert any(not group[0].is_float for group in facts.groups())
    assert "as planned" in page.read.words
    assert "not as planned" not in page.read.words


def test_maps_of_loss_and_time(page: Page) -> None:
    facts = read_facts(page.out)
    heat = page.figures["chart-loss"]["data"][0]
    kl = {site["node"]: site["estimate"] for site in facts.search["sites"]}
    for layer, row in enumerate(heat["customdata"]):
        for node, told in zip(heat["x"], row, strict=True):
            name = f"layer.{layer}.{node}"
            wanted = f"{kl[name]:.2e} nats" if name in kl else "not quantizable"
            assert wanted in told
    slow = page.figures["chart-time-1"]["data"][0]
    edges = facts.search["costs"]["1"]["edges"]
    assert slow["z"][0][0] == pytest.approx(1e3 * edges[1][0][0])
    errors = page.figures["chart-errors"]["data"]
    quantized = [g for g in facts.groups() if not g[0].is_float]
    assert len(errors) == len(quantized)


def test_where_it_comes_from(page: Page) -> None:
    facts, words = read_facts(page.out), page.read.words
    for split in facts.splits.values():
        assert split["sha256"] in words
        assert f"{split['n']:,}" in words
    assert facts.exact.plan.model_sha256 in words
    for name, version in facts.exact.plan.versions.items():
        assert f"{name} {version}" in words
    for name, sha256 in facts.manifest.files.items():
        assert f"{name} {sha256}" in words
    config = re.search(r'<pre id="config">(.*?)</pre>', page.page, re.S)
    assert config
    again = BuildConfig.model_validate(yaml.safe_load(html.unescape(config[1])))
    assert again == BuildConfig.model_validate(facts.config)


# builds that lack something


def test_an_older_build_says_what_it_lacks(copy: Path) -> None:
    def older(record: dict[str, Any]) -> None:
        for key in ("observed", "tiers", "plans", "made"):
            del record[key]

    edit(copy, older)
    made = page_of(copy)
    words = made.read.words
    assert "each layer's error (`observed` of build.json)" in words
    assert "which kernels ran was not recorded" in words
    assert "build again to see it" in words
    assert "chart-errors" not in made.figures
    assert {"chart-front", "chart-tests", "chart-loss", "chart-plan-0"} <= set(made.figures)


def test_without_build_json(copy: Path) -> None:
    (copy / "current" / "build.json").unlink()
    made = page_of(copy)
    assert "the configuration of the build" in made.read.words
    assert {"chart-front", "chart-plan-0"} <= set(made.figures)
    assert "chart-loss" not in made.figures


def test_a_kernel_that_ran_something_else_is_shown(copy: Path) -> None:
    def lie(record: dict[str, Any]) -> None:
        record["observed"]["float"]["executed"]["layer.1.out"] = "int8"

    edit(copy, lie)
    assert "not as planned: layer.1.out" in page_of(copy).read.words


def test_every_tier_exact(copy: Path) -> None:
    """As a build without a kernel for int8 leaves it."""
    manifest = read_manifest(copy)
    exact = copy / "current" / "models" / "encoder_small_exact" / "1" / "plan.json"
    plan = json.loads(exact.read_text())
    for tier in manifest.tiers:
        path = copy / "current" / "models" / f"encoder_small_{tier}" / "1" / "plan.json"
        path.write_text(json.dumps(plan | {"search": json.loads(path.read_text())["search"]}))

    def alone(record: dict[str, Any]) -> None:
        record["candidates"] = record["candidates"][:1]
        record["tiers"] = {
            name: entry | {"plan": "float"} for name, entry in record["tiers"].items()
        }
        del record["search"]

    edit(copy, alone)
    made = page_of(copy)
    assert "Every tier serves exact's plan, fp32 everywhere" in made.read.words
    assert "every tier runs in float" in made.read.words
    assert len([name for name in made.figures if name.startswith("chart-plan")]) == 1


@pytest.mark.parametrize("layers", [12, 24])
def test_deep_models(copy: Path, layers: int) -> None:
    def deeper(plan: dict[str, Any]) -> None:
        plan["config"]["layers"] = layers

    for tier in read_manifest(copy).tiers:
        edit_plan(copy, tier, deeper)
    figure = page_of(copy).figures["chart-plan-0"]
    assert len(figure["data"][0]["y"]) == layers
    rows = figure["layout"]["height"] - figure["layout"]["margin"]["t"]
    assert rows / layers >= 15, "a layer's row would be too low to read"


# what comes from data


def test_hostile_names_stay_text(copy: Path) -> None:
    manifest = json.loads((copy / "current" / "manifest.json").read_text())
    manifest["labels"] = [HOSTILE, "</script>"]
    (copy / "current" / "manifest.json").write_text(json.dumps(manifest))

    def hostile(record: dict[str, Any]) -> None:
        record["config"]["model"] = HOSTILE
        record["warnings"] = [HOSTILE]
        record["plans"] = dict.fromkeys(record["plans"], HOSTILE)
        for candidate in record["candidates"][1:]:
            candidate["name"] += HOSTILE
        record["splits"]["search"]["sha256"] = HOSTILE

    def hostile_plan(plan: dict[str, Any]) -> None:
        plan["device"]["cpu"] = HOSTILE
        plan["versions"][HOSTILE] = HOSTILE
        plan["measured"]["metric"] = HOSTILE
        for test in plan["measured"]["tests"]:
            test["plan"] = HOSTILE

    edit(copy, hostile)
    for tier in manifest["tiers"]:
        edit_plan(copy, tier, hostile_plan)
    made = page_of(copy)
    read = made.read
    assert read.open == []
    assert read.tags["script"] == 3
    assert "img" not in read.tags
    assert read.words.count(HOSTILE) >= 5
    assert "</script>" in read.words
    assert "<img" not in json.dumps(made.figures), "plotly reads a little HTML in its texts"


def test_html_is_escaped_unless_it_is_html() -> None:
    assert tag("b", "<i>", title='"') == '<b title="&quot;"><i></b>'.replace("<i>", "&lt;i&gt;")
    assert tag("p", tag("b", "a&b")) == "<p><b>a&amp;b</b></p>"
    assert safe(safe("<")) == "&lt;"


# other tasks and strategies


@pytest.mark.parametrize(("task", "strategy"), [("regression", "greedy"), ("entities", "samp")])
def test_other_metrics(task: str, strategy: str, tmp_path: Path) -> None:
    made = make(task, tmp_path / "task", rows=260)
    out = tmp_path / "out"
    rest = ("--strategy", strategy, "--budget", "20s", "--tier", "fast:drop=0.01pt")
    done = forks().samp(*made.command(out, *rest))
    assert done.code in (0, 1), done.err
    page = page_of(out)
    words = page.read.words
    metric = {"regression": "Pearson", "entities": "F1"}[task]
    assert metric in words
    names = {trace["name"] for trace in page.figures["chart-front"]["data"]}
    if strategy == "samp":
        assert {"SAMP ffn_only(k)", "SAMP full(k)"} <= names
        assert "looks at no site by itself" in words
    else:
        assert any(name.startswith("greedy") for name in names)


def test_no_build(tmp_path: Path) -> None:
    done = forks().samp("report", tmp_path, "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "no_build"


def test_a_place_that_cannot_be_written(built: Path, tmp_path: Path) -> None:
    done = forks().samp("report", built, "--out", tmp_path / "no" / "page.html")
    assert done.code == 2
    assert "a file that can be written" in done.err
