"""Calls over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import gevent
import numpy as np
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from samp_client import errors
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from samp_client.transport import Columns, Tensors

_Result = TypeVar("_Result")

# gevent.Timeout bounds each call; the sockets' own limits only have to be longer.
_SOCKET_TIMEOUT_S = 3600.0


class HttpTransport:
    """One kept-alive connection. For one thread: tritonclient's HTTP client is not thread-safe."""

    def __init__(self, address: str, *, headers: Mapping[str, str] | None = None) -> None:
        self._address = address
        self._headers = dict(headers or {})
        self._client: Any = self._connect()

    def infer(self, model: str, columns: Columns, timeout_s: float) -> Tensors:
        # tritonclient adds to the headers that it is given.
        headers = dict(self._headers)
        result = self._call(
            model,
            timeout_s,
            lambda: self._client.infer(model, tensors(columns), headers=headers),
        )
        return arrays(result)

    def index(self, timeout_s: float) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = self._call(
            "the repository index",
            timeout_s,
            lambda: self._client.get_model_repository_index(headers=dict(self._headers)),
        )
        return models

    def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        config: dict[str, Any] = self._call(
            model,
            timeout_s,
            lambda: self._client.get_model_config(model, headers=dict(self._headers)),
        )
        return config

    def statistics(self, timeout_s: float) -> list[dict[str, Any]]:
        answer = self._call(
            "the statistics",
            timeout_s,
            lambda: self._client.get_inference_statistics(headers=dict(self._headers)),
        )
        models: list[dict[str, Any]] = answer.get("model_stats", [])
        return models

    def close(self) -> None:
        self._client.close()

    def _connect(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(
            self._address, connection_timeout=_SOCKET_TIMEOUT_S, network_timeout=_SOCKET_TIMEOUT_S
        )

    def _call(self, what: str, timeout_s: float, call: Callable[[], _Result]) -> _Result:
        what = f"{what} on {self._address} over HTTP"
        limit = gevent.Timeout(timeout_s)
        try:
            with limit:
                return call()
        except InferenceServerException as error:
            raise failure(error, what) from None
        except gevent.Timeout as expired:
            self._drop_connection()
            if expired is not limit:  # a limit that the caller set around this call
                raise
            raise errors.deadline(what, timeout_s) from None
        except (OSError, HTTPConnectionClosed, HTTPParseError, RuntimeError) as error:
            self._drop_connection()
            unsent = isinstance(error, (ConnectionRefusedError, socket.gaierror))
            reason = str(error) or type(error).__name__
            raise errors.unreachable(what, reason, unsent=unsent) from None
        except (ValueError, KeyError) as error:
            self._drop_connection()
            raise errors.unreachable(what, f"not an answer of Triton ({error})") from None

    def _drop_connection(self) -> None:
        # An interrupted call leaves its socket half read and its place in the pool taken.
        self._client.close()
        self._client = self._connect()


def tensors(columns: Columns) -> list[triton.InferInput]:
    """BYTES inputs [rows, 1]."""
    made = []
    for name, texts in columns.items():
        made.append(triton.InferInput(name, [len(texts), 1], "BYTES"))
        made[-1].set_data_from_numpy(np.array(texts, dtype=np.object_).reshape(-1, 1))
    return made


def arrays(result: Any) -> Tensors:
    """All outputs of an answer, by name."""
    return {out["name"]: result.as_numpy(out["name"]) for out in result.get_response()["outputs"]}


def failure(error: InferenceServerException, what: str) -> errors.ClientError:
    """The typed error of an answer that is none."""
    status = error.status()
    message = error.message() or ""
    if status is None:
        return errors.ServerFault(f"{what}: {message}")
    # tritonclient's words for a body without Triton's JSON: a proxy, or another server.
    if "empty response" in message or "while decoding the response" in message:
        return errors.unreachable(what, f"not an answer of Triton (HTTP status {status})")
    return errors.from_status(status, message, what)
