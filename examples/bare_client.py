"""Ask any tier of any task with tritonclient and NumPy alone: no code of SAMP is needed.

    python examples/bare_client.py film-reviews_fast "a fine film" "a dull one"
    python examples/bare_client.py sick_exact "a man sleeps" --pair "nobody is awake"
    python examples/bare_client.py film-reviews_fast --http --url 127.0.0.1:8000 "a fine film"

What to send and what comes back is in the server's own metadata; one JSON object a row is printed.
"""

import argparse
import json

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ensemble", help="<model>_<tier>")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--pair", action="append", default=[], help="one for each text")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--http", action="store_true")
    asked = parser.parse_args()
    if asked.http:
        import tritonclient.http as triton
    else:
        import tritonclient.grpc as triton

    client = triton.InferenceServerClient(asked.url)
    as_json = {} if asked.http else {"as_json": True}
    metadata = client.get_model_metadata(asked.ensemble, **as_json)
    inputs = []
    columns = {"TEXT": asked.texts, "TEXT_PAIR": asked.pair}
    for tensor in metadata["inputs"]:
        rows = np.array([[row.encode()] for row in columns[tensor["name"]]], dtype=np.object_)
        inputs.append(triton.InferInput(tensor["name"], list(rows.shape), tensor["datatype"]))
        inputs[-1].set_data_from_numpy(rows)
    answer = client.infer(asked.ensemble, inputs)
    outputs = {one["name"]: answer.as_numpy(one["name"]) for one in metadata["outputs"]}
    for i in range(len(asked.texts)):
        row = {name: array[i] for name, array in outputs.items()}
        if "ENTITY_COUNT" in row:  # rows of one request are filled up to the longest
            count = int(row.pop("ENTITY_COUNT")[0])
            row = {k: v[:count] if k.startswith("ENTITY_") else v for k, v in row.items()}
        print(json.dumps({name: plain(array) for name, array in row.items()}, ensure_ascii=False))


def plain(array: np.ndarray) -> list:
    """Numbers, or strings out of BYTES."""
    return [one.decode() if isinstance(one, bytes) else one for one in array.tolist()]


if __name__ == "__main__":
    main()
