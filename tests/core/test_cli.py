"""What the command line says to mistakes: one line, what came, what is allowed, what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import forks
from separable import Small, small, write_rows

Command = list[object]
AWAY = "127.0.0.1:9"


def flags(made: Small, out: Path, **changes: object) -> Command:
    given = {"model": made.checkpoint, "data": made.data, "name": "small", "threads": 1, "out": out}
    return ["build", *(part for k, v in {**given, **changes}.items() for part in (f"--{k}", v))]


def refused(command: Command, code: int, *words: str, **options: Any) -> str:
    """The command fails with one line that has these words, and says the same in JSON."""
    done = forks().samp(*command, **options)
    assert done.code == code, done
    assert done.out == ""
    assert len(done.lines) == 1, done.err
    line = done.lines[0]
    assert line.startswith("samp: ")
    assert all(word in line for word in words), line
    told = forks().samp(*command, "--json", **options)
    assert (told.code, told.lines) == (code, [])
    error = told.json["error"]
    assert list(told.json) == ["error"]
    assert set(error) == {"code", "given", "allowed", "fix"}
    assert error["code"]
    assert error["given"]
    assert error["allowed"] or error["fix"]
    said = json.dumps(error, ensure_ascii=False)
    assert all(json.dumps(word, ensure_ascii=False)[1:-1] in said for word in words), said
    return line


# checkpoints


def checkpoint(folder: Path, **config: object) -> Path:
    """A copy of the small checkpoint with another config.json."""
    made = folder / "checkpoint"
    shutil.copytree(small().checkpoint, made)
    body = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**body, **config}))
    return made


def test_another_architecture(tmp_path: Path) -> None:
    other = checkpoint(tmp_path, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    words = ("unsupported_architecture", str(other), "'gpt2'", "allowed: model_type bert")
    refused(flags(small(), tmp_path / "out", model=other), 1, *words[:3], words[3][9:])


def test_a_truncated_safetensors_file(tmp_path: Path) -> None:
    made = checkpoint(tmp_path)
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    size = f"{weights.stat().st_size:,} bytes"
    refused(flags(small(), tmp_path / "out", model=made), 1, str(weights), "truncated", size)
    assert not (tmp_path / "out" / "current").exists()


def test_a_checkpoint_without_its_head(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    made = checkpoint(tmp_path)
    state = load_file(made / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, made / "model.safetensors")
    words = ("head_weights", "no classifier.weight", "BertForSequenceClassification")
    refused(flags(small(), tmp_path / "out", model=made), 1, *words)


def test_no_checkpoint(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    words = (str(nowhere), "no such folder", "save_pretrained()")
    refused(flags(small(), tmp_path / "out", model=nowhere), 1, *words)
    (tmp_path / "empty").mkdir()
    refused(flags(small(), tmp_path / "out", model=tmp_path / "empty"), 1, "config.json", "[]")


# data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "sentence,label\nx,fine\n", ["no column text", "'sentence', 'label'", ":1:"]),
        ("a.csv", "text,labels\nx,fine\n", ["no column label", "'labels'"]),
        ("a.jsonl", '{"text": "x"}\n', ["a.jsonl:1", "no column label"]),
        ("a.jsonl", "", ["no rows"]),
        ("a.csv", "text,label\n", ["no rows"]),
        ("a.tsv", "text\tlabel\nx\tfine\ny\tfine\n", ["2 rows have the label 'fine'"]),
        ("a.jsonl", '{"text": "x", "label": "fine"}\n{"text"\n', ["a.jsonl:2", "one JSON object"]),
        ("a.jsonl", '{"text": 5, "label": "fine"}\n', ["a.jsonl:1", "text is 5"]),
        ("a.txt", "x", ["'.txt'", ".jsonl, .csv, .tsv"]),
        ("a.csv", "text,label\nx,fine\ny,dull\n", ["2 distinct texts", "30 or more"]),
    ],
)
def test_data_that_cannot_be_used(
    name: str, content: str, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(content)
    refused(flags(small(), tmp_path / "out", data=file), 1, str(file), *words)


def test_labels_that_the_head_lacks(tmp_path: Path) -> None:
    rows = [{**row, "label": {"fine": "good"}.get(row["label"], "bad")} for row in small().rows]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = ("data_labels", "'bad', 'good'", "'dull', 'fine', or 0 to 1", "id2label")
    refused(flags(small(), tmp_path / "out", data=file), 1, str(file), *words)


def test_labels_that_disagree_with_the_model(tmp_path: Path) -> None:
    """Every label is the other one, as when id2label is the wrong way round."""
    other = {"fine": "dull", "dull": "fine"}
    rows = [{**row, "label": other[row["label"]]} for row in small().rows]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    line = refused(
        flags(small(), tmp_path / "out", data=file), 1, "labels_disagree", "float model", "id2label"
    )
    right = float(line.split("is right on ")[1].split("%")[0])
    assert right < 10
    assert not (tmp_path / "out" / "current").exists()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.jsonl")
    refused(flags(small(), tmp_path / "out", data=nowhere), 1, nowhere, "No such file")
    refused(flags(small(), tmp_path / "out", exclude=nowhere), 1, nowhere, "No such file")
    refused(["build", "-c", nowhere], 2, nowhere, "No such file", "YAML")
    refused(["ab", "--data", nowhere, "--url", AWAY], 1, nowhere, "No such file")
    refused(["predict", "--in", nowhere, "--url", AWAY], 1, nowhere, "No such file")


# the command line and the YAML


@pytest.mark.parametrize(
    ("tier", "words"),
    [
        ("fast:drop", ["NAME:drop=0.5pt,latency=8ms"]),
        ("fast:drop=much", ["fast:drop=much"]),
        ("fast:drop=0", ["greater than 0", "drop in (0, 100] pt"]),
        ("fast:speed=2", ["fast:speed=2"]),
        ("fast:drop=1,drop=2", ["fast:drop=1,drop=2"]),
        ("Fast", ["'Fast'", "a-z, 0-9 and -"]),
        ("exact:drop=1", ["'exact' is always made"]),
    ],
)
def test_a_bad_tier(tier: str, words: list[str], tmp_path: Path) -> None:
    refused(flags(small(), tmp_path / "out", tier=tier), 2, *words)
    assert not (tmp_path / "out").exists()


def test_a_tier_twice(tmp_path: Path) -> None:
    command = [*flags(small(), tmp_path / "out"), "--tier", "a:drop=1", "--tier", "a:drop=2"]
    refused(command, 2, "--tier a:drop=1 --tier a:drop=2", "each name once")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"colour": "red"}, ["colour", "'red'", "fields model, data", "calibrator"]),
        ({"rows": {"serch": 9}}, ["rows.serch", "fields calibration, search;"]),
        ({"tiers": {"a": {"dorp": 9}}}, ["tiers.a.dorp", "fields drop, latency;"]),
        ({"data": {"data": "x", "train": "y"}}, ["data.train", "verification, exclude;"]),
        ({"default_tier": "best"}, ["'best' is none of exact, high"]),
        ({"backend": "tpu"}, ["'onednn' or 'reference'", "'tpu'"]),
    ],
)
def test_a_bad_yaml(fields: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    yaml = small().yaml(tmp_path / "build.yaml", out=str(tmp_path / "out"), **fields)
    line = forks().samp("build", "-c", yaml)
    assert line.code == 2
    (said,) = line.err.splitlines()
    assert said.startswith("samp: bad_config: ")
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["build"], ["no model", "--model"]),
        (["build", "--modle", "x"], ["--modle", "samp build --help"]),
        (["build", "--threads", "two"], ["--threads"]),
        (["build", "--exclude", "x"], ["--exclude without --data"]),
        (["train"], ["'train'", "samp --help"]),
        (["serve"], ["samp serve --help"]),
        (["generate", "--model", "x"], ["--plan"]),
        (["predict", "text", "--in", "file"], ["texts and --in", "one of them"]),
    ],
)
def test_bad_usage(command: Command, words: list[str]) -> None:
    refused(command, 2, *words)


def test_no_command_at_all_is_shown_the_help() -> None:
    done = forks().samp()
    assert (done.code, done.err) == (2, "")
    assert "build" in done.out
    assert "loadtest" in done.out
    assert forks().samp("--help").code == 0


# servers


@pytest.mark.parametrize("protocol", [[], ["--http"]])
@pytest.mark.parametrize(
    "command", [["predict", "a text"], ["ab"], ["loadtest", "--seconds", "1"]], ids=lambda c: c[0]
)
def test_no_server(command: Command, protocol: Command) -> None:
    more: Command = ["--data", small().data] if command == ["ab"] else []
    line = refused([*command, *more, "--url", AWAY, *protocol], 1, AWAY, "Triton runs")
    assert line.startswith("samp: unavailable: ")


def test_a_folder_without_a_build(tmp_path: Path) -> None:
    words = (f"{tmp_path} holds no build", f"samp build --out {tmp_path}")
    refused(["serve", tmp_path], 1, *words)


def test_serving_what_was_not_built(tmp_path: Path) -> None:
    from tiny import write_tiny

    write_tiny(tmp_path, tiers=("exact", "fast"))
    words = ("unknown_tier", "'quick', 'slow'", "exact, fast")
    refused(["serve", tmp_path, "--tiers", "quick,fast,slow"], 1, *words)


# folders


def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    refused(flags(small(), file), 2, f"{file}: File exists", "a folder that can be written")


def test_names_and_folders_with_marks_of_style(tmp_path: Path) -> None:
    """Square brackets are rich's markup, and a long path is not to be broken."""
    out = tmp_path / "[bold]" / ("long-" * 30) / "[/bold]"
    yaml = small().yaml(tmp_path / "b.yaml", out=str(out), tiers={"a": {"latency": 1000}})
    done = forks().samp("build", "-c", yaml)
    assert done.code == 0, done.err
    assert f"{out}: accuracy on rows" in done.out


def test_a_promise_that_is_not_met_is_exit_code_1(tmp_path: Path) -> None:
    """In the table as in JSON; the build is there all the same."""
    yaml = small().yaml(
        tmp_path / "build.yaml", out=str(tmp_path), tiers={"a": {"latency": 1e-6}, "b": {}}
    )
    told = forks().samp("build", "-c", yaml, "--json")
    assert told.code == 1
    assert [row["met"] for row in told.json["tiers"]] == [True, False, True]
    shown = forks().samp("build", "-c", yaml)
    assert shown.code == 1
    assert "no plan is under 1e-06 ms" in shown.out
    assert (tmp_path / "current" / "manifest.json").is_file()


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    """Expected where the folder is made; not expected where the cache is."""
    refused(flags(small(), tmp_path / ("x" * 300)), 2, "File name too long")
    (tmp_path / "cache").touch()
    refused(flags(small(), tmp_path), 1, f"{tmp_path / 'cache'}", "directory")


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """`samp build | true`: no traceback from a closed pipe."""
    yaml = small().yaml(tmp_path / "b.yaml", out=str(tmp_path / "out"), tiers={"a": {}})
    samp = Path(sys.executable).with_name("samp")
    done = subprocess.run(
        ["bash", "-c", '"$0" build --json -c "$1" | true; echo "${PIPESTATUS[0]}"', samp, yaml],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "1"
    assert [line for line in done.stderr.splitlines() if not line.startswith("  ")] == []


def test_an_install_of_the_client_alone_says_so() -> None:
    """Without the extra `build` there is no typer: one line, not a traceback."""
    code = "import sys; sys.modules['typer'] = None; import samp_core.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("samp: not_installed: typer is not there")
    assert "samp-triton[build]" in line
    whole = [sys.executable, "-m", "samp_core", "--help"]
    assert "rollback" in subprocess.run(whole, capture_output=True, text=True).stdout
