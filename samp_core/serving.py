"""What the served models do with a list of requests: tokenize, encode, answer.

Written without Triton: each role maps inputs to outputs, request by request, and a request that
is wrong gets a RequestError in its place. `execute` is the only part that speaks to Triton.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from samp_kernels.interface import F32, Array, EncoderConfig, OutputKind, Session, pack_batch

from samp_core import admission
from samp_core.admission import Gates
from samp_core.manifest import check_folder
from samp_core.model_config import OF_TIER
from samp_core.windows import Windows

if TYPE_CHECKING:
    from samp_core.admission import Progress
    from samp_core.heads import Head
    from samp_core.meters import Meters
    from samp_core.rows import Text
    from samp_core.text import Encoding, TextEncoder

Inputs = tuple[Array, ...]
Outputs = dict[str, Array]
BY_DLPACK = int(np.__version__.split(".")[0]) >= 2
# (rows, tokens a row) run at load, so that the first requests do not pay for set-up.
WARM_UP = ((1, 16), (8, 64))


class RequestError(Exception):
    """One request is wrong: what came and what is allowed. The others of its batch go on.

    reason: the word that refused requests are counted under.
    """

    def __init__(self, given: str, allowed: str, reason: str = "shape") -> None:
        super().__init__(f"{given}; allowed: {allowed}")
        self.labels: tuple[tuple[str, str], ...] = (("reason", reason),)


class Overloaded(RequestError):
    """The request may be right: there is too much work before it."""

    def __init__(self, tier: str, waits_s: float, limit_s: float) -> None:
        super().__init__(
            f"overloaded: {waits_s:.2g} s of work wait in the queue of tier {tier}",
            f"{limit_s:g} s; send again later, or less at once",
            "overloaded",
        )
        self.labels = (("reason", "overloaded"), ("tier", tier))


@dataclass(frozen=True)
class Tokenizer:
    """TEXT (and TEXT_PAIR) bytes [b, 1] -> IDS, TYPES int32 [b, longest row], LENGTHS, TRUNCATED
    [b, 1]; with `places` also OFFSETS [b, longest row, 2] and WORD_IDS, -1 where no text is.
    """

    text: TextEncoder
    inputs: tuple[str, ...] = ("TEXT",)
    places: bool = False
    meters: Meters | None = None
    gates: Gates = field(default_factory=lambda: Gates({}))

    @classmethod
    def load(cls, folder: Path, args: Mapping[str, str], meters: Meters | None = None) -> Tokenizer:
        """`args` are Triton's: which tensors go in and out stands in the model's config."""
        from samp_core.text import TextEncoder

        check_folder(folder)
        outputs = tensor_names(args, "output")
        inputs = tensor_names(args, "input")
        gates = admission.gates(args, outputs)
        return cls(TextEncoder.load(folder), inputs, "OFFSETS" in outputs, meters, gates)

    def admit(self, backend: Any, requests: Sequence[Any]) -> list[Overloaded | str | None]:
        """For each request the name that its tier has for LENGTHS; None: not called by a tier.

        What would wait too long for that tier's encoder is refused, before its text is looked at.
        """
        asked = [self._asked(backend, request) for request in requests]
        admitted: list[Overloaded | str | None] = []
        for one, waits_s in zip(asked, self.gates.admit(asked), strict=True):
            name: Overloaded | str | None = one and one[0]
            if isinstance(name, str) and waits_s is not None:
                limit_s = self.gates.limit_s(name)
                name = Overloaded(name.removeprefix(OF_TIER), waits_s, limit_s)
            admitted.append(name)
        return admitted

    def _asked(self, backend: Any, request: Any) -> tuple[str, int] | None:
        """The output by which a tier asked, and its rows."""
        names = request.requested_output_names()
        name = None if "LENGTHS" in names else next((n for n in names if n in self.gates), None)
        if name is None:
            return None
        return str(name), backend.get_input_tensor_by_name(request, self.inputs[0]).shape()[0]

    def run(self, requests: Sequence[Inputs]) -> list[Outputs | RequestError]:
        """All texts of all requests in one call of the tokenizer."""
        decoded = [_attempt(self._texts, *inputs) for inputs in requests]
        texts = [text for rows in decoded if not isinstance(rows, RequestError) for text in rows]
        encodings = iter(self.text.encode(texts, offsets=self.places))
        results: list[Outputs | RequestError] = []
        for rows in decoded:
            if isinstance(rows, RequestError):
                results.append(rows)
                continue
            mine = [next(encodings) for _ in rows]
            lengths = np.array([len(row.ids) for row in mine], dtype=np.int32)
            ids = np.zeros((len(mine), int(lengths.max())), dtype=np.int32)
            types = np.zeros_like(ids)
            for index, row in enumerate(mine):
                ids[index, : lengths[index]] = row.ids
                types[index, : lengths[index]] = row.types
            truncated = np.array([[row.truncated] for row in mine], dtype=np.bool_)
            if self.meters is not None and truncated.any():
                self.meters.add("samp_truncated_total", int(truncated.sum()))
            result = {"IDS": ids, "TYPES": types, "LENGTHS": lengths[:, None]}
            results.append({**result, "TRUNCATED": truncated, **self._places(mine, ids)})
        return results

    def _texts(self, *columns: Array) -> list[Text]:
        decoded = [_decode(c, name) for c, name in zip(columns, self.inputs, strict=True)]
        return decoded[0] if len(decoded) == 1 else list(zip(*decoded, strict=True))

    def _places(self, encodings: Sequence[Encoding], ids: Array) -> Outputs:
        if not self.places:
            return {}
        offsets = np.full((*ids.shape, 2), -1, dtype=np.int32)
        words = np.full_like(ids, -1)
        for index, row in enumerate(encodings):
            offsets[index, : len(row.ids)], words[index, : len(row.ids)] = row.offsets, row.words
        return {"OFFSETS": offsets, "WORD_IDS": words}


@dataclass(frozen=True)
class Encoder:
    """IDS, TYPES int32 [b, w], LENGTHS int32 [b, 1] -> FEATURE fp32 [b, hidden].

    With output "tokens" TOKEN_LOGITS fp32 [b, w, C], 0 behind a row's end; rows longer than a
    window are run as windows.
    """

    session: Session
    config: EncoderConfig
    output: OutputKind
    log: Callable[[str], None] | None = None
    windows: Windows | None = None
    meters: Meters | None = None
    progress: Progress | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        parameters: Mapping[str, str],
        log: Callable[[str], None] | None = None,
        meters: Meters | None = None,
        progress: Progress | None = None,
        gpu: int = 0,
    ) -> Encoder:
        """Check the files, prepare the plan's backend (on that GPU), run the warm-up.

        SAMP_THREADS overrides the parameter `threads`; `log` is used under SAMP_LOG_BATCHES.
        """
        from samp_core.encoder_files import load_session

        check_folder(folder)
        config = EncoderConfig(**json.loads((folder / "encoder.json").read_text(encoding="utf-8")))
        threads = int(os.environ.get("SAMP_THREADS") or parameters["threads"])
        output: Any = parameters["output"]
        session = load_session(folder, threads=threads, gpu=gpu)
        log = log if os.environ.get("SAMP_LOG_BATCHES") else None
        windows = Windows(**json.loads(parameters["windows"])) if "windows" in parameters else None
        model = cls(session, config, output, log, windows, meters, progress)
        for rows, tokens in WARM_UP:
            ids = np.zeros((rows, min(tokens, model.longest)), dtype=np.int32)
            lengths = np.full((rows, 1), ids.shape[1], dtype=np.int32)
            model._encode([(ids, ids, lengths)])
        if meters is not None:
            build = ("build", parameters.get("build", ""))
            for precision, count in Counter(session.executed().values()).items():
                meters.gauge("samp_sites", count, (("precision", precision), build))
        return model

    @property
    def longest(self) -> int:
        """The most tokens of one row."""
        if self.windows is not None:
            return self.windows.tokens
        return self.config.positions - self.config.position_offset

    def run(self, requests: Sequence[Inputs]) -> list[Outputs | RequestError]:
        """All rows of all good requests as one packed batch."""
        if self.progress is None:
            return self._run(requests)
        rows = sum(inputs[0].shape[0] for inputs in requests)
        self.progress.begin(rows)
        try:
            return self._run(requests)
        finally:
            self.progress.end(rows)

    def _run(self, requests: Sequence[Inputs]) -> list[Outputs | RequestError]:
        checked = [_attempt(self._check, *inputs) for inputs in requests]
        good = [
            inputs
            for inputs, error in zip(requests, checked, strict=True)
            if not isinstance(error, RequestError)
        ]
        features = iter(self._encode(good) if good else [])
        if self.meters is not None and good:
            lengths = [n for inputs in good for n in inputs[2][:, 0].tolist()]
            windows = self.windows
            ran = lengths if windows is None else [w for n in lengths for w in windows.lengths(n)]
            self.meters.batch(len(lengths), sum(ran), len(ran) * max(ran))
        return [
            error if isinstance(error, RequestError) else {self._name: next(features)}
            for error in checked
        ]

    @property
    def _name(self) -> str:
        return "TOKEN_LOGITS" if self.output == "tokens" else "FEATURE"

    def _encode(self, requests: Sequence[Inputs]) -> list[F32]:
        """The output of each request; padding is dropped here."""
        ids: list[Array] = []
        types: list[Array] = []
        for request_ids, request_types, lengths in requests:
            for row, length in enumerate(lengths[:, 0]):
                ids.append(request_ids[row, :length])
                types.append(request_types[row, :length])
        if self.output == "tokens":
            return self._token_logits(requests, ids, types)
        batch = pack_batch(ids, types, position_offset=self.config.position_offset)
        features = self.session.run(batch, output=self.output)
        if self.log is not None:
            lengths_text = " ".join(str(lengths[:, 0].tolist()) for *_, lengths in requests)
            self.log(
                f"samp batch: {len(requests)} requests, {batch.sequences} rows, "
                f"{batch.tokens} tokens, lengths {lengths_text}"
            )
        return split_rows(features, [len(lengths) for *_, lengths in requests])

    def _token_logits(
        self, requests: Sequence[Inputs], ids: Sequence[Array], types: Sequence[Array]
    ) -> list[F32]:
        """[b, w, C] of each request."""
        from samp_core.pipeline import run_tokens
        from samp_core.text import Encoding

        rows = [Encoding(i, t, False, None) for i, t in zip(ids, types, strict=True)]
        queue = iter(run_tokens(self.session, rows, self.windows))
        results = []
        for request_ids, _, lengths in requests:
            mine = [next(queue) for _ in lengths]
            whole = np.zeros((*request_ids.shape, mine[0].shape[1]), dtype=np.float32)
            for row, part in zip(whole, mine, strict=True):
                row[: len(part)] = part
            results.append(whole)
        return results

    def _check(self, ids: Array, types: Array, lengths: Array) -> None:
        """Raise RequestError unless every row can be run: clients may call the encoder directly."""
        rows, width = ids.shape
        if types.shape != ids.shape:
            raise RequestError(f"TYPES {list(types.shape)}", f"the shape of IDS, {[rows, width]}")
        longest = min(width, self.longest)
        for row, length in enumerate(lengths[:, 0].tolist()):
            if not 1 <= length <= longest:
                what = "the width of IDS" if longest == width else "the model's positions"
                given = f"LENGTHS row {row}: {length}"
                raise RequestError(given, f"1 to {longest}, {what}", "length")
        real = np.arange(width) < lengths
        for name, values, limit in (
            ("IDS", ids, self.config.vocab),
            ("TYPES", types, self.config.types),
        ):
            wrong = real & ((values < 0) | (values >= limit))
            if wrong.any():
                row, column = np.argwhere(wrong)[0].tolist()
                given = f"{name} row {row}, token {column}: {values[row, column]}"
                raise RequestError(given, f"0 to {limit - 1}", "range")

    def close(self) -> None:
        self.session.close()


@dataclass(frozen=True)
class TaskHead:
    """FEATURE fp32 [b, hidden] -> the head's outputs, [b, ...] each.

    A token head reads TOKEN_LOGITS, LENGTHS, OFFSETS and WORD_IDS, and a request's rows are filled
    up to its longest answer.
    """

    head: Head
    weights: Mapping[str, F32]
    labels: tuple[str, ...]
    inputs: tuple[str, ...] = ("FEATURE",)

    @classmethod
    def load(cls, folder: Path, args: Mapping[str, str]) -> TaskHead:
        from safetensors.numpy import load_file

        from samp_core import heads

        check_folder(folder)
        weights = load_file(folder / "weights.safetensors")
        labels = tuple(json.loads(parameters(args)["labels"]))
        head = heads.load_file(folder / "head.py")
        return cls(head, weights, labels, tensor_names(args, "input"))

    def run(self, requests: Sequence[Inputs]) -> list[Outputs | RequestError]:
        """The rows of all requests in one call of the head."""
        if self.head.rows is not None:
            return [_attempt(self._answer, *inputs) for inputs in requests]
        assert self.head.run is not None
        features = [feature for (feature,) in requests]
        outputs = self.head.run(self.weights, np.concatenate(features), self.labels)
        counts = [len(feature) for feature in features]
        results: list[Outputs | RequestError] = [{} for _ in counts]
        for name, rows in outputs.items():
            for result, part in zip(results, split_rows(rows, counts), strict=True):
                assert isinstance(result, dict)
                result[name] = part
        return results

    def _answer(self, logits: Array, lengths: Array, offsets: Array, words: Array) -> Outputs:
        """One request of a token head. Clients can call it directly, so that shapes are checked."""
        from samp_core.heads import TokenRow, padded

        assert self.head.rows is not None
        shape = logits.shape[:2]
        if offsets.shape[:2] != shape or words.shape != shape or len(lengths) != shape[0]:
            given = f"OFFSETS {list(offsets.shape)}, WORD_IDS {list(words.shape)}"
            raise RequestError(given, f"the rows and tokens of TOKEN_LOGITS, {list(shape)}")
        if not ((lengths >= 1) & (lengths <= shape[1])).all():
            given = f"LENGTHS {lengths[:, 0].tolist()[:8]}"
            raise RequestError(given, f"1 to {shape[1]}", "length")
        rows = [
            TokenRow(logits[i, :n], offsets[i, :n], words[i, :n])
            for i, n in enumerate(lengths[:, 0].tolist())
        ]
        return padded(self.head, self.head.rows(rows, self.labels))


def split_rows(rows: Array, counts: Sequence[int]) -> list[Array]:
    """[sum of counts, ...] -> one array for each count."""
    return np.split(rows, np.cumsum(counts)[:-1])


def tensor_names(args: Mapping[str, str], side: Literal["input", "output"]) -> tuple[str, ...]:
    """The names of a model's inputs or outputs, in its config's order."""
    return tuple(tensor["name"] for tensor in json.loads(args["model_config"])[side])


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The `parameters` of config.pbtxt, from what Triton hands to `initialize`."""
    config = json.loads(args["model_config"])
    return {key: entry["string_value"] for key, entry in config.get("parameters", {}).items()}


def execute(
    backend: Any,
    requests: Sequence[Any],
    inputs: Sequence[str],
    run: Callable[[Sequence[Inputs]], list[Outputs | RequestError]],
    meters: Meters | None = None,
    admit: Callable[[Any, Sequence[Any]], list[Overloaded | str | None]] | None = None,
) -> list[Any]:
    """One response for each request, in order. `backend` is triton_python_backend_utils.

    What `run` raises fails the requests of this batch, never the process. `admit` may refuse
    requests, which are then not read, and says what LENGTHS is to be called in each response.
    """
    results: Sequence[Outputs | Exception]
    admitted: list[Overloaded | str | None] = [None] * len(requests)
    try:
        if admit is not None:
            admitted = admit(backend, requests)
        wrong: list[RequestError | None] = []
        good: list[Inputs] = []
        for request, entry in zip(requests, admitted, strict=True):
            if isinstance(entry, Overloaded):
                wrong.append(entry)
                continue
            tensors = ((n, backend.get_input_tensor_by_name(request, n)) for n in inputs)
            arrays = tuple(_array(n, tensor) for n, tensor in tensors)
            wrong.append(_without_rows(inputs, arrays))
            if wrong[-1] is None:
                good.append(arrays)
        answers = iter(run(good) if good else [])
        results = [error or next(answers) for error in wrong]
    except Exception as error:
        backend.Logger.log_error(f"{type(error).__name__}: {error}")
        results = [error] * len(requests)
    if meters is not None:
        for result in results:
            if isinstance(result, Exception):
                labels: tuple[tuple[str, str], ...] = (("reason", "internal"),)
                if isinstance(result, RequestError):
                    labels = result.labels
                meters.add("samp_refused_total", 1, labels)
    return [_response(backend, *pair) for pair in zip(results, admitted, strict=True)]


def _without_rows(names: Sequence[str], arrays: Inputs) -> RequestError | None:
    """A batch of 0, which Triton lets pass and hands over without its first dimension."""
    for name, array in zip(names, arrays, strict=True):
        if array.ndim < 2:
            return RequestError(
                f"{name} {list(array.shape)}", "1 to 64 rows in the first dimension"
            )
    return None


def _response(backend: Any, result: Outputs | Exception, lengths: Overloaded | str | None) -> Any:
    if isinstance(result, Exception):
        if isinstance(result, Overloaded):
            error = backend.TritonError(str(result), backend.TritonError.UNAVAILABLE)
        elif isinstance(result, RequestError):
            error = backend.TritonError(str(result), backend.TritonError.INVALID_ARG)
        else:
            error = backend.TritonError(f"internal error: {result!r}")
        return backend.InferenceResponse(error=error)
    if isinstance(lengths, str):
        result = {lengths if name == "LENGTHS" else name: rows for name, rows in result.items()}
    tensors = [_tensor(backend, name, np.ascontiguousarray(rows)) for name, rows in result.items()]
    return backend.InferenceResponse(output_tensors=tensors)


def _array(name: str, tensor: Any) -> Array:
    """An input. The stub of 24.10 hands arrays of wrong content to NumPy 2, but by DLPack."""
    if BY_DLPACK and not name.startswith("TEXT"):
        return np.from_dlpack(tensor)
    array: Array = tensor.as_numpy()
    return array


def _tensor(backend: Any, name: str, rows: Array) -> Any:
    """An output; numbers of NumPy 2 by DLPack, too: that stub takes its arrays for empty ones."""
    if BY_DLPACK and rows.dtype.kind in "fi":
        return backend.Tensor.from_dlpack(name, rows)
    return backend.Tensor(name, rows)


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The result, or the RequestError raised, as a value."""
    try:
        return function(*args)
    except RequestError as error:
        return error


def _decode(text: Array, name: str) -> list[Any]:
    texts = []
    for row, raw in enumerate(text[:, 0]):
        try:
            texts.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise RequestError(
                f"{name} row {row}: byte 0x{byte:02x} at {error.start} is not UTF-8",
                "UTF-8 text",
                "not_utf8",
            ) from None
    return texts
