"""From measured times to the rows of the encoder benchmark, their targets, and the tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import encoder_models
import limits
import machine
import numpy as np
from interleave import Contender
from rich.console import Console
from rich.table import Table
from samp_kernels.interface import F32

FLOAT_PEERS = ("openvino_fp32", "ort_fp32", "torch_fp32")
INT8_PEERS = ("openvino_int8", "ort_int8")
ALL_PEERS = (*INT8_PEERS, "torch_fp32", "openvino_fp32", "ort_fp32")
PEERS = (*ALL_PEERS, "openvino_bf16")
OURS = "ours"
# Below these mean cosines to torch's fp32 an arm does not compute the same thing.
LEAST_COSINE = {"float": 0.9999, "int8": 0.8}

_INT8 = ("int8", "int8+attention")


def targets(model: str, row: str, precision: str) -> dict[str, float]:
    """What issue 5 wants of a row: against whom -> the peer's time over ours, at least."""
    if precision == "fp32":
        return {"best_fp32": 1.0}
    if model == "minilm-l6":
        return {"best_peer": 1.5} if row in ("1x16", "1x64", "mixed") else {}
    whole = {
        "1x16": (1.5, 1.9, 5.0),
        "1x32": (1.5, 1.9, 5.0),
        "1x128": (1.5, 2.4, 5.0),
        "8x128": (1.4 if precision == "int8+attention" else 1.25, 2.2, 4.0),
        "mixed": (1.5, 2.5, 5.0),
    }
    return dict(zip((*INT8_PEERS, "torch_fp32"), whole.get(row, ()), strict=False))


def agreement(reference: F32, hidden: F32) -> dict[str, float]:
    """Of hidden states [T, H]: largest difference, mean and least cosine of a token."""
    products = (reference * hidden).sum(axis=1)
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(hidden, axis=1)
    cosines = products / np.maximum(norms, 1e-30)
    return {
        "max_abs": round(float(np.abs(reference - hidden).max()), 6),
        "cosine": round(float(cosines.mean()), 6),
        "cosine_min": round(float(cosines.min()), 6),
    }


def agrees(column: str, found: Mapping[str, float]) -> bool:
    kind = "int8" if "int8" in column or column == "openvino_bf16" else "float"
    return found["cosine"] >= LEAST_COSINE[kind]


def encoder_rows(
    model: encoder_models.Model,
    inputs: encoder_models.Inputs,
    measured: Sequence[Contender],
    left_out: Sequence[Contender],
    agreements: Mapping[tuple[str, str], Mapping[str, float]],
    found: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row for each precision of ours, with every peer's best arm beside it."""
    best: dict[str, Contender] = {}
    for one in measured:
        if one.column not in best or _median(one) < _median(best[one.column]):
            best[one.column] = one
    common: dict[str, Any] = {
        "model": model.name,
        "what": "encoder",
        "row": inputs.name,
        "batch": len(inputs.ids),
        "tokens": round(statistics.fmean(inputs.lengths), 1),
        "total_tokens": sum(inputs.lengths),
    }
    if inputs.mixed:
        common["lengths"] = inputs.lengths
    peers = [name for name in PEERS if name in best]
    for name in peers:
        figures = machine.quantiles(best[name].times_ms)
        others = {one.arm: round(_median(one), 3) for one in measured if one.column == name}
        slower = {one.arm: round(one.pilot_ms, 3) for one in left_out if one.column == name}
        common[f"{name}_ms"] = {**figures, "arm": best[name].arm, "arms": others}
        if slower:
            common[f"{name}_ms"]["slower_in_pilot"] = slower
    rows = []
    for precision in encoder_models.PRECISIONS:
        ours = best.get(f"{OURS} {precision}")
        if ours is None:
            continue
        median = _median(ours)
        ratios = {name: _median(best[name]) / median for name in peers}
        groups = (("best_fp32", FLOAT_PEERS, FLOAT_PEERS), ("best_peer", ALL_PEERS, PEERS))
        for group, needed, names in groups:
            if all(name in peers for name in needed):
                ratios[group] = min(ratios[name] for name in names if name in peers)
        row = {**common, "precision": precision, "ours_ms": machine.quantiles(ours.times_ms)}
        row.update({f"ratio_{name}": round(value, 3) for name, value in ratios.items()})
        size, peak = (4, "f32_gflops") if precision == "fp32" else (1, "int8_gops")
        floor = limits.floor_ms(found, model.gop(inputs.lengths), size * model.gemm_weights, peak)
        if floor:
            row["floor_ms"] = round(floor, 3)
            row["share_of_limit"] = round(floor / median, 4)
        row["agreement"] = {
            f"{column}: {arm}": values for (column, arm), values in agreements.items()
        }
        row["targets"] = verdicts(targets(model.name, inputs.name, precision), ratios)
        rows.append(row)
    return rows


def verdicts(wanted: Mapping[str, float], ratios: Mapping[str, float]) -> dict[str, Any]:
    """against -> {wanted, found, met}; nothing is claimed where the peer did not run."""
    return {
        name: {"wanted": value, "found": round(ratios[name], 3), "met": ratios[name] >= value}
        for name, value in wanted.items()
        if name in ratios
    }


def footprint_row(model: str, precision: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Resident memory and the time until a fresh process has answered."""
    wanted = {"rss_mb": 150.0, "ready_s": 1.0}
    return {
        "model": model,
        "what": "footprint",
        "batch": 1,
        "precision": precision,
        **figures,
        "targets": {
            name: {"wanted": most, "found": figures[name], "met": figures[name] <= most}
            for name, most in wanted.items()
        },
    }


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The tables on the terminal; every target of the issue stands beside its ratio."""
    encoders = [row for row in rows if row["what"] == "encoder"]
    if encoders:
        console.print(_encoder_table(encoders))
    gemms = [row for row in rows if row["what"] == "gemm"]
    if gemms:
        console.print(_gemm_table(gemms))
    for row in rows:
        if row["what"] == "footprint":
            torch = "torch was loaded" if row["torch"] else "no torch"
            console.print(
                f"{row['model']} {row['precision']} in a fresh process: "
                f"{row['rss_mb']:.0f} MB resident ({_mark(row, 'rss_mb', '<= {:.0f}')}), "
                f"peak {row['peak_mb']:.0f} MB, ready in {row['ready_s']:.2f} s "
                f"({_mark(row, 'ready_s', '<= {:.0f}')}), {torch}"
            )


def _encoder_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="hidden states out; ms are medians; ratio = peer's time / ours")
    for column in ("model", "batch x tokens", "ours"):
        table.add_column(column)
    heads = ("ms", "p10-p90", "of limit", "OV int8", "ORT int8", "torch", "OV int8 ratio",
             "ORT int8 ratio", "torch ratio", "best fp32", "best peer")  # fmt: skip
    for column in heads:
        table.add_column(column, justify="right")
    for row in rows:
        ours = row["ours_ms"]
        shown = ("openvino_int8", "ort_int8", "torch_fp32")
        times = [f"{row[f'{n}_ms']['median']:.2f}" if f"{n}_ms" in row else "" for n in shown]
        ratios = []
        for name in (*shown, "best_fp32", "best_peer"):
            value = row.get(f"ratio_{name}")
            mark = _mark(row, name, "{:g}")
            ratios.append("" if value is None else f"{value:.2f}" + (f" ({mark})" if mark else ""))
        table.add_row(
            row["model"], row["row"], row["precision"], f"{ours['median']:.2f}",
            f"{ours['p10']:.2f}-{ours['p90']:.2f}",
            f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else "", *times, *ratios,
        )  # fmt: skip
    return table


def _gemm_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="our int8 GEMM with its epilogue: share of the limit")
    for column in ("model", "tokens", "site", "limit"):
        table.add_column(column)
    for column in ("alone ms", "cores", "share", "in encoder ms", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        shares = [
            f"{row[key]:.0%} ({_mark(row, key, '{:.0%}')})"
            + (f", tiles {row[f'{key}_tiles']:.0%}" if f"{key}_tiles" in row else "")
            if key in row
            else ""
            for key in ("share_of_limit", "share_in_encoder")
        ]
        limit = "int8" if row["limit"] == "vnni_gops" else f"memory, {row['weights']}"
        table.add_row(
            row["model"], str(row["tokens"]), row["site"], limit,
            f"{row['ours_ms']['median']:.4f}", str(row["cores"]), shares[0],
            f"{row['in_encoder_ms']:.4f}", shares[1],
        )  # fmt: skip
    return table


def _mark(row: Mapping[str, Any], name: str, pattern: str) -> str:
    verdict = row["targets"].get(name)
    if verdict is None:
        return ""
    return pattern.format(verdict["wanted"]) + (" met" if verdict["met"] else " NOT met")


def _median(contender: Contender) -> float:
    return statistics.median(contender.times_ms)
