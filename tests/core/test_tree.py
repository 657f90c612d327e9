"""The tree's own rules: which part may import which, what is packaged, what a container gets."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "samp_core": "samp_core",
    "samp_kernels": "kernels",
    "samp_client": "client",
    "samp_loadtest": "loadtest",
    "samp_templates": "model_repository/templates",
}
OURS = frozenset(PACKAGES)
# What the modules of a package may import of ours; itself always.
ALLOWED = {
    "samp_core": {"samp_kernels"},
    "samp_kernels": set(),
    "samp_client": set(),
    "samp_loadtest": {"samp_client"},
    "samp_templates": {"samp_core"},
}
WITH_TRITONCLIENT = {"tritonclient", "grpc", "google", "gevent", "geventhttpclient", "urllib3"}
WITH_TRITONCLIENT |= {"aiohttp"}
# The command line and the demo call every part.
CALLERS = {"cli", "demo"}


@cache
def source_files() -> list[Path]:
    """Every file of ours: what git would commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return sorted(path for path in paths if path.is_file())


def modules(package: str) -> list[Path]:
    folder = ROOT / PACKAGES[package]
    return [path for path in source_files() if folder in path.parents and path.suffix == ".py"]


def imported(path: Path) -> set[str]:
    """First names of all modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = modules(package)
    assert files
    for path in files:
        if package == "samp_core" and (path.stem in CALLERS or path.stem.startswith("cli_")):
            continue
        wrong = imported(path) & OURS - {package} - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def rungs() -> dict[str, int]:
    """Module of samp_core -> its rung in CONTRIBUTING.md."""
    found: dict[str, int] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        row = re.match(r"\| (\d+) [a-z ]+\| (.*?) \|", line)
        folder = ""
        for name in re.findall(r"`([^`]+)`", row[2]) if row else ():
            folder, _, last = name.rpartition("/") if "/" in name[:-1] else (folder, "", name)
            if folder == "samp_core":
                module = last.removesuffix(".py").rstrip("/")
                assert module not in found, f"{module} is on two rungs"
                found[module] = int(row[1])
    return found


def imported_modules(path: Path) -> set[str]:
    """Modules of samp_core that a file imports, without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "samp_core":
            names = [f"samp_core.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        found |= {name.split(".")[1] for name in names if name.startswith("samp_core.")}
    return found


def test_no_module_calls_a_rung_above() -> None:
    height = rungs()
    folder = ROOT / "samp_core"
    modules_there = {
        p.relative_to(folder).parts[0].removesuffix(".py") for p in modules("samp_core")
    }
    assert set(height) == modules_there - {"__init__"}
    for path in modules("samp_core"):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        if own != "__init__":
            above = {name for name in imported_modules(path) if height[name] > height[own]}
            assert not above, f"{own} (rung {height[own]}) imports {', '.join(sorted(above))}"


def test_the_client_needs_two_packages() -> None:
    for path in modules("samp_client"):
        outside = imported(path) - sys.stdlib_module_names - OURS
        assert outside <= {"numpy", *WITH_TRITONCLIENT}, path


@pytest.mark.parametrize("package", ["samp_core", "samp_client", "samp_kernels"])
def test_a_package_is_light(package: str) -> None:
    code = f"import sys, json, {package}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "scipy", "locust", "pydantic", "rich", "tokenizers"}
    if package != "samp_client":
        heavy |= {"numpy", "tritonclient"}
    assert not heavy & set(json.loads(done.stdout))


def test_every_package_is_installed() -> None:
    """An editable install forgives a forgotten sub-package; a real one does not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    wanted = set()
    for name, folder in PACKAGES.items():
        for path in modules(name):
            if path.name == "__init__.py":
                inner = path.parent.relative_to(ROOT / folder).parts
                wanted.add(".".join((name, *inner)))
    assert set(settings["packages"]) == wanted


def test_no_file_names_this_machine() -> None:
    private = {str(ROOT), str(Path.home())} - {"/", "/root", "/app", "/src"}
    for path in source_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        assert not [name for name in private if name + "/" in text], path.relative_to(ROOT)


def limit(path: Path) -> int:
    """Most lines of a file; a list of tests may be longer than code that is read as one."""
    return 600 if ROOT / "tests" in path.parents else 480


def test_no_file_is_a_drawer() -> None:
    names = {path.name for path in source_files()}
    assert not names & {"utils.py", "helpers.py", "misc.py", "common.py"}
    # The house rule says about 400.
    long = {
        str(path.relative_to(ROOT)): count
        for path in source_files()
        if path.suffix == ".py" and (count := len(path.read_text().splitlines())) > limit(path)
    }
    assert not long


def test_tested_versions_are_within_the_ranges() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *extras.values()]
    ranges = [Requirement(text) for texts in lists for text in texts]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tested = {name.lower().replace("_", "-"): version for name, version in tested.items()}
    checked = 0
    for requirement in ranges:
        version = tested.get(requirement.name.lower())
        if version is not None:
            assert requirement.specifier.contains(version), requirement
            checked += 1
    assert checked >= 15


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == set(phony[1].split())


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    parts = [line.split(None, 1) for line in lines if line.strip()]
    return [(name.upper(), rest) for name, rest in parts]


def test_dockerfile_is_pinned_small_and_unprivileged() -> None:
    steps = instructions()
    names = [name for name, _ in steps]
    values = dict(steps)
    assert re.fullmatch(r"TRITON=\d\d\.\d\d", steps[0][1])
    image = "nvcr.io/nvidia/tritonserver:${TRITON}-py3"
    assert [rest for name, rest in steps if name == "FROM"] == [f"{image} AS build", image]
    # Everything is installed in the first stage, with a compiler that the second has not.
    assert names.count("RUN") == 1
    assert names.index("RUN") < names.index("COPY")
    assert values["COPY"] == "--from=build /opt/samp /opt/samp"
    assert "ADD" not in names
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", values["USER"])
    assert names.index("USER") > names.index("COPY")
    assert "/v2/health/ready" in values["HEALTHCHECK"]
    ast.parse(json.loads(values["HEALTHCHECK"].partition("CMD ")[2])[2])
    given = " ".join(rest for name, rest in steps if name in ("ARG", "ENV"))
    assert not re.search(r"(\b|_)(token|secret|password|credentials?|key)\b", given.lower())


def test_dockerfile_runs_the_shared_install_steps() -> None:
    run = shlex.split(dict(instructions())["RUN"])
    script = next(word for word in run if word.endswith(".sh"))
    path = ROOT / script.removeprefix("/src/")
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)
    environment = dict(instructions())["ENV"]
    assert f"VIRTUAL_ENV={run[-1]} " in environment
    assert f"PATH={run[-1]}/bin:" in environment


def test_the_context_has_what_the_install_copies() -> None:
    patterns = (ROOT / ".dockerignore").read_text().split()
    kept = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert patterns[0] == "*"
    for name in kept:
        assert (ROOT / name).exists(), name
    script = (ROOT / "deploy" / "install.sh").read_text()
    copied = re.search(r'"\$root"/\{([^}]*)\}', script)
    assert copied
    for name in [*copied[1].split(","), "model_repository/templates", "constraints.txt", "deploy"]:
        assert any(fnmatch(name, pattern) for pattern in kept), name


def test_the_server_knows_every_option_of_the_container() -> None:
    from samp_core.embedded import find_triton

    triton = find_triton()
    done = subprocess.run(
        [str(triton.binary), "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=triton.environment({}),
    )
    known = set(re.findall(r"--[a-z-]+", done.stdout + done.stderr))
    command = json.loads(dict(instructions())["CMD"])
    options = {word.partition("=")[0] for word in command[1:]}
    assert command[0] == "tritonserver"
    assert len(options) == len(command) - 1
    assert options <= known


def test_this_python_passes_the_makefiles_check() -> None:
    script = ROOT / "deploy" / "check_python.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert "allowed: 3.11 or 3.12" in done.stderr


def test_ci_is_a_valid_script() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()
    targets = re.findall(r"^(?:step|beside) \w+ make ([a-z-]+)$", script.read_text(), re.M)
    assert targets == ["venv", "lint", "demo-checkpoint", "test", "sanitize", "demo"]
