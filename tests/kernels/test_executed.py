"""What really ran: in torch's profiler, in oneDNN's own log, and in a session's `executed()`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bert import Shape, backend, batch_of, float_plan, open_session, scaled_plan, write_bert
from close import BACKENDS, needs
from samp_kernels.interface import GEMM_SITES, QTensor, Weight
from samp_kernels.onednn import OneDnnBackend

from samp_core.checkpoint import Checkpoint, load_checkpoint
from samp_core.encoder import prepare, quantizable_sites
from samp_core.encoder_files import save_encoder
from samp_core.errors import SampError
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.quantize import export_weights
from samp_core.workbench import Workbench

SHAPE = Shape(layers=2, hidden=64, heads=2, ffn=96)
MODES = [("float", 0), *((kind, k) for kind in ("ffn_only", "full") for k in (1, 2))]
# Rows [out, in] of each site's matrix.
MATRICES = {"qkv": (192, 64), "out": (64, 64), "ffn_in": (96, 64), "ffn_out": (64, 96)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder, SHAPE)
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def scaled(checkpoint: Checkpoint) -> Plan:
    return scaled_plan(checkpoint)


def mode(scaled: Plan, name: str, kind: Any, k: int) -> Plan:
    return mode_plan(scaled, kind, k, quantizable_sites(backend(name)), Recipe())


def quantized_shapes(plan: Plan) -> list[tuple[int, int]]:
    kinds = [site.rsplit(".", 1)[1] for site in plan.quantized_sites()]
    return sorted(MATRICES[kind] for kind in kinds)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("kind", "k"), MODES)
def test_executed_equals_the_plan(
    name: str, kind: str, k: int, checkpoint: Checkpoint, scaled: Plan
) -> None:
    needs(name, "int8")
    plan = mode(scaled, name, kind, k)
    session = open_session(checkpoint, plan, name)
    assert session.executed() == {}
    for output in ("first", "tokens"):
        session.run(batch_of(), output=output)
        assert session.executed() == {site: plan.precision(site) for site in plan.sites}
    sites = len(quantizable_sites(backend(name))) if kind == "full" else 2
    assert list(session.executed().values()).count("int8") == k * sites


class Dequantizing(OneDnnBackend):
    """Claims int8 and runs its numbers through the fp32 GEMM."""

    def pack(self, weight: Weight, precision: str) -> Any:
        if precision == "int8":
            assert weight.scale is not None
            weight, precision = Weight(weight.data * weight.scale[:, None]), "fp32"
        return super().pack(weight, precision)

    def gemm(self, x: Any, packed: Any, bias: Any, **how: Any) -> Any:
        if isinstance(x, QTensor):
            x = (x.data.float() - 128) * x.scale
        return super().gemm(x, packed, bias, **how)


class SilentGemm(OneDnnBackend):
    """Does not say what its gemm ran; the op before it did."""

    def gemm(self, *args: Any, **how: Any) -> Any:
        before = self.ran
        y = super().gemm(*args, **how)
        self.ran = before
        return y


class SilentAttention(OneDnnBackend):
    """The same of attention."""

    def attention(self, *args: Any, **how: Any) -> Any:
        before = self.ran
        y = super().attention(*args, **how)
        self.ran = before
        return y


@pytest.mark.parametrize(
    ("kind", "sites", "ran"),
    [
        (Dequantizing, GEMM_SITES, "fp32"),
        (SilentGemm, GEMM_SITES, "unknown"),
        (SilentAttention, ("scores", "context"), "unknown"),
    ],
)
def test_a_backend_that_runs_something_else_is_seen(
    kind: type[OneDnnBackend],
    sites: tuple[str, ...],
    ran: str,
    checkpoint: Checkpoint,
    scaled: Plan,
) -> None:
    needs("onednn", "int8")
    plan = mode(scaled, "onednn", "full", 2)
    session = prepare(kind(), checkpoint.config, export_weights(checkpoint.tensors, plan), plan)
    session.run(batch_of())
    wrong = {s for s, p in session.executed().items() if p != plan.precision(s)}
    assert wrong == {f"layer.{layer}.{site}" for layer in range(2) for site in sites}
    assert {session.executed()[site] for site in wrong} == {ran}
    with pytest.raises(SampError, match=f"wrong_kernel: layer.0.{sites[0]} ran in {ran}"):
        Workbench._check_executed(None, session, plan)  # type: ignore[arg-type]


def test_a_failed_pass_leaves_no_claims(checkpoint: Checkpoint) -> None:
    session = open_session(checkpoint, float_plan(checkpoint), "reference")
    session.run(batch_of())
    assert session.executed()
    batch = batch_of()
    batch.ids[0] = -1
    with pytest.raises(Exception, match="embed_layernorm"):
        session.run(batch)
    assert session.executed() == {}


@pytest.mark.parametrize(("kind", "k"), MODES)
def test_the_profiler_sees_int8_gemms(
    kind: str, k: int, checkpoint: Checkpoint, scaled: Plan
) -> None:
    needs("onednn", "int8")
    plan = mode(scaled, "onednn", kind, k)
    session = open_session(checkpoint, plan, "onednn")
    batch = batch_of()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        session.run(batch, output="tokens")
    events = [e for e in profile.events() if e.name == "onednn::qlinear_pointwise"]
    # The packed weight is [in, out]; its scales are operand 4.
    shapes = [(e.input_shapes[4][0], e.input_shapes[0][1]) for e in events]
    assert sorted(shapes) == quantized_shapes(plan)
    assert all(e.input_shapes[0][0] == batch.tokens for e in events)
    floats = [e for e in profile.events() if e.name == "mkldnn::_linear_pointwise"]
    assert len(floats) == 2 * len(GEMM_SITES) - len(events)
    plain = {"aten::linear", "aten::addmm", "aten::mm", "aten::dequantize"}
    assert not plain & {e.name for e in profile.events()}


RUN_ONCE = """
import json, sys
from pathlib import Path
from bert import batch_of
from samp_core.encoder_files import load_session
for folder in sys.argv[1:]:
    session = load_session(Path(folder), 2)
    print("BEGIN", flush=True)
    session.run(batch_of(), output="tokens")
    print("END", json.dumps(session.executed()), flush=True)
"""


def test_onednn_logs_int8_kernels(checkpoint: Checkpoint, scaled: Plan, tmp_path: Path) -> None:
    """Each quantized site is one u8 x s8 primitive, once a pass; every other one is f32."""
    from safetensors.numpy import save_file

    needs("onednn", "int8")
    plans = [mode(scaled, "onednn", kind, k) for kind, k in MODES]
    folders = [tmp_path / str(i) for i in range(len(plans))]
    for folder, plan in zip(folders, plans, strict=True):
        folder.mkdir()
        save_encoder(folder, checkpoint.config, plan.with_provenance(backend="onednn"))
        save_file(export_weights(checkpoint.tensors, plan), folder / "weights.safetensors")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUN_ONCE, *map(str, folders)],
        env={**os.environ, "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": path},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    passes = done.stdout.split("BEGIN\n")[1:]
    assert len(passes) == len(plans)
    for text, plan in zip(passes, plans, strict=True):
        log, _, end = text.partition("END ")
        executed = json.loads(end.splitlines()[0])
        assert executed == {site: plan.precision(site) for site in plan.sites}
        gemms = list(products(log))
        assert all(not g.kernel.startswith("ref") for g in gemms)
        assert sorted(g.shape for g in gemms if g.types == ("u8", "s8")) == quantized_shapes(plan)
        floats = [g for g in gemms if g.types == ("f32", "f32")]
        assert len(floats) == 2 * len(GEMM_SITES) - len(quantized_shapes(plan))


@dataclass(frozen=True)
class Product:
    """One matrix product as oneDNN logged it; types of source and weight, weight [out, in]."""

    kernel: str
    types: tuple[str, str]
    shape: tuple[int, int]


def products(log: str) -> Iterator[Product]:
    for line in log.splitlines():
        if not re.search(r",exec,cpu,(matmul|inner_product),", line):
            continue
        source, weight = (re.search(rf"\b{key}:(\w+):", line) for key in ("src", "wei"))
        shape = re.search(r",(?:\d+x(\d+):\d+x(\d+)|mb\d+ic(\d+)oc(\d+)),", line)
        assert source
        assert weight
        assert shape, line
        inputs, outputs = (int(number) for number in shape.groups() if number)
        kernel = line.split(",exec,cpu,")[1].split(",")[1]
        yield Product(kernel, (source[1], weight[1]), (outputs, inputs))


def test_what_an_op_ran_is_told_to_its_own_thread() -> None:
    """Calibration and sensitivities run batches side by side over the ops of one backend."""
    made = pytest.importorskip("samp_kernels.cpu.backend", exc_type=ImportError).CpuBackend()
    made.ran = ("fp32", "fp32")
    seen = []

    def other() -> None:
        seen.append(made.ran)
        made.ran = ("int8",)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [()]
    assert made.ran == ("fp32", "fp32")
