"""The task benchmark's own arithmetic: which rows are whose, what is absent, what was promised."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import tasks

    yield tasks
    sys.path.remove(str(BENCHMARKS))


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("count", [60, 5_000])
def test_no_row_is_on_two_sides(bench: Any, tmp_path: Path, apart: bool, count: int) -> None:
    def write(name: str, count: int) -> Path:
        rows = [{"text": f"{name} {i} caf\u00e9", "label": "a"} for i in range(count)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    searched = write("searched", 40) if apart else None
    pair = bench.Pair("x", tmp_path, write("rows", count), searched=searched)
    files = bench.parted(pair, tmp_path / "parts", None)
    assert files.keys() == {"search", "verification", "fresh"}
    found = [text for path in files.values() for text in texts(path)]
    assert len(found) == len(set(found)) == count + 40 * apart
    assert len(texts(files["fresh"])) >= len(texts(files["verification"])) // 2 - 1
    assert len(texts(files["verification"])) <= bench.VERIFICATION
    again = bench.parted(pair, tmp_path / "again", None)
    assert texts(again["fresh"]) == texts(files["fresh"])


def test_its_builds_are_builds(bench: Any, tmp_path: Path) -> None:
    """Every pair's fields make a configuration, whatever is on this machine."""
    from samp_core.config import load_config

    (tmp_path / "search.jsonl").write_text("{}\n" * 900)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("search", "verification", "fresh")}
    how = argparse.Namespace(threads=1, budget=60.0)
    for pair in bench.pairs(tmp_path, tmp_path):
        for strategy in bench.STRATEGIES:
            config = load_config(None, bench.fields(pair, files, strategy, how))
            assert config.rows.search == 512
            assert config.strategy == strategy
            drops = {
                name: bench.tasks_table.promised({"name": name})
                for name, spec in config.tiers.items()
                if spec.drop is not None
            }
            assert drops == {
                name: pytest.approx(spec.drop / 100)
                for name, spec in config.tiers.items()
                if spec.drop is not None
            }
            assert bench.tasks_table.promised({"name": "recommended"}) is None


def test_what_is_absent_is_said(bench: Any, tmp_path: Path) -> None:
    banking = next(p for p in bench.pairs(tmp_path, tmp_path) if p.name == "banking77")
    why = bench.missing(banking)
    assert why.startswith("banking77: no ")
    assert "banking77-test.jsonl" in why
    (tmp_path / "banking").mkdir()
    for name in ("banking/config.json", "banking77-test.jsonl"):
        (tmp_path / name).write_text("{}")
    assert bench.missing(banking) == ""


def test_pairs_are_added_to_the_newest_result(bench: Any, tmp_path: Path) -> None:
    assert bench.earlier(tmp_path) == []
    ending = bench.machine.slug("tasks")
    for date, model in (("2026-01-02", "new"), ("2026-01-01", "old")):
        rows = [{"kind": "run", "model": model}]
        (tmp_path / f"{date}-{ending}.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "2026-01-03-tasks-another-cpu.json").write_text("{}")
    assert [row["model"] for row in bench.earlier(tmp_path)] == ["new"]


@pytest.mark.parametrize(
    ("layers", "wanted"), [(6, range(1, 7)), (12, range(2, 13, 2)), (2, (1, 2))]
)
def test_modes_end_with_all_layers(bench: Any, layers: int, wanted: Any) -> None:
    kinds = ("ffn_only", "full")
    modes = dict.fromkeys(["float", *(f"{m}({k})" for m in kinds for k in range(1, layers + 1))])
    assert list(bench.some_of(modes)) == ["float", *(f"{m}({k})" for m in kinds for k in wanted)]


def test_milp_is_compared_at_equal_promise(bench: Any) -> None:
    def tier(strategy: str, name: str, ms: float) -> dict[str, Any]:
        return {"kind": "tier", "strategy": strategy, "name": name, "together_ms": {"1": ms}}

    rows = [tier("milp", "p0-5", 2.0), tier("samp", "p0-5", 3.0), tier("greedy", "p0-5", 1.0)]
    rows += [tier("milp", "exact", 9.0), tier("samp", "p1", 1.0), {"kind": "run"}]
    (found,) = bench.tasks_table.verdicts(rows)
    assert found["tier"] == "p0-5"
    assert found["others"] == "samp 1.500 times that, greedy 0.500 times that"


def test_what_sequences_serve_on_other_draws(bench: Any) -> None:
    """Rates that can be counted: a plan that loses nothing always passes, one that loses 5% never;
    behind a failure nothing is tested, and of what passed the fastest is served."""
    import draws
    import numpy as np

    from samp_core.metrics import Accuracy

    made = object.__new__(draws.Drawn)
    count = 4_000
    right = np.arange(count) % 10 != 0
    lost = right.copy()
    lost[:200] = False
    random = np.random.default_rng(1)
    swapped = right.copy()  # as many won as lost: sometimes a promise of 0.5 points is missed
    swapped[random.choice(np.flatnonzero(right), 20, replace=False)] = False
    swapped[random.choice(np.flatnonzero(~right), 20, replace=False)] = True
    made.texts = {"float": right, "same": right, "lost": lost, "swapped": swapped}
    made.ms = {"float": 4.0, "same": 2.0, "lost": 0.5, "swapped": 1.0}
    made.exact, made.metric, made.n = "float", Accuracy(), 2_000
    made.pair = argparse.Namespace(name="x", drops=(0.5, 2.0))
    made.sequences = {
        ("milp", 0.5): ["same", "swapped"],
        ("samp", 0.5): ["lost", "same"],
        ("greedy", 0.5): ["swapped", "same"],
        ("milp", 2.0): ["swapped", "lost"],
        ("samp", 2.0): ["same"],
        ("greedy", 2.0): [],
    }
    strict, loose = made.rows()
    assert (strict["n"], strict["pool"], strict["promise"]) == (2_000, 4_000, 0.5)
    chance = strict["greedy"]["mean_ms"]  # 1 where it passes, else 4
    passed = (4.0 - chance) / 3.0
    assert 0.5 < passed < 0.999
    assert strict["milp"]["mean_ms"] == pytest.approx(2.0 - passed)
    assert strict["samp"]["mean_ms"] == 4.0
    assert strict["samp"]["milp_faster"] == 1.0
    assert strict["greedy"]["milp_faster"] == pytest.approx(1.0 - passed)
    assert strict["greedy"]["milp_slower"] == 0.0
    assert loose["milp"]["mean_ms"] == 1.0
    assert loose["samp"]["mean_ms"] == 2.0
    assert loose["samp"]["times_milp"] == 2.0
    assert loose["greedy"]["median_ms"] == 4.0
    assert all(strict[s]["broken"] == loose[s]["broken"] == 0.0 for s in draws.STRATEGIES)
