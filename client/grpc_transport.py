"""Calls over gRPC."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import grpc  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from samp_client import errors
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from samp_client.security import Tls
    from samp_client.transport import Columns, Tensors

_Result = TypeVar("_Result")

# gRPC's own words for no connection, and for a peer that is no gRPC server; with the same statuses
# Triton speaks of a model or a queue.
_NO_SERVER = ("UNAVAILABLE", "UNIMPLEMENTED", "UNKNOWN")
_NO_CONNECTION = re.compile("connect|resolv|http2 header", re.IGNORECASE)


class GrpcTransport:
    """One channel, with a connection of its own. Safe to use from several threads."""

    def __init__(
        self, address: str, *, headers: Mapping[str, str] | None = None, tls: Tls | None = None
    ) -> None:
        self._address = address
        self._headers = dict(headers or {})
        self._client: Any = triton.InferenceServerClient(
            address, creds=credentials(tls), channel_args=channel_args(address, tls)
        )

    def infer(self, model: str, columns: Columns, timeout_s: float) -> Tensors:
        result = self._call(
            model,
            timeout_s,
            lambda: self._client.infer(
                model, tensors(columns), client_timeout=timeout_s, headers=self._headers
            ),
        )
        return arrays(result)

    def index(self, timeout_s: float) -> list[dict[str, Any]]:
        answer = self._call(
            "the repository index",
            timeout_s,
            lambda: self._client.get_model_repository_index(
                as_json=True, client_timeout=timeout_s, headers=self._headers
            ),
        )
        models: list[dict[str, Any]] = answer.get("models", [])
        return models

    def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        answer = self._call(
            model,
            timeout_s,
            lambda: self._client.get_model_config(
                model, as_json=True, client_timeout=timeout_s, headers=self._headers
            ),
        )
        config: dict[str, Any] = answer["config"]
        return config

    def statistics(self, timeout_s: float) -> list[dict[str, Any]]:
        answer = self._call(
            "the statistics",
            timeout_s,
            lambda: self._client.get_inference_statistics(
                as_json=True, client_timeout=timeout_s, headers=self._headers
            ),
        )
        models: list[dict[str, Any]] = answer.get("model_stats", [])
        return models

    def close(self) -> None:
        self._client.close()
        # tritonclient closes once more when it is collected; under gevent that hangs if it happens
        # as late as the interpreter's end.
        self._client = None

    def _call(self, what: str, timeout_s: float, call: Callable[[], _Result]) -> _Result:
        what = f"{what} on {self._address} over gRPC"
        try:
            return call()
        except InferenceServerException as error:
            raise failure(error, what, timeout_s) from None


def tensors(columns: Columns) -> list[triton.InferInput]:
    """BYTES inputs [rows, 1]."""
    made = []
    for name, texts in columns.items():
        made.append(triton.InferInput(name, [len(texts), 1], "BYTES"))
        made[-1].set_data_from_numpy(np.array(texts, dtype=np.object_).reshape(-1, 1))
    return made


def arrays(result: Any) -> Tensors:
    """All outputs of an answer, by name."""
    return {out.name: result.as_numpy(out.name) for out in result.get_response().outputs}


def failure(error: InferenceServerException, what: str, timeout_s: float) -> errors.ClientError:
    """The typed error of a failed call."""
    status = (error.status() or "").removeprefix("StatusCode.")
    message = error.message() or ""
    if status == "DEADLINE_EXCEEDED":
        return errors.deadline(what, timeout_s)
    if status in _NO_SERVER and _NO_CONNECTION.search(message):
        return errors.unreachable(what, message)
    return errors.from_status(status, message, what)


def credentials(tls: Tls | None) -> grpc.ChannelCredentials | None:
    """BadRequest for files that cannot be read."""
    if tls is None:
        return None
    ca, key, cert = tls.read()
    return grpc.ssl_channel_credentials(ca, key, cert)


def channel_args(address: str, tls: Tls | None = None) -> list[tuple[str, int | str]]:
    args: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
        ("grpc.max_receive_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
        # Otherwise all clients of a process share one TCP connection, and close() keeps it.
        ("grpc.use_local_subchannel_pool", 1),
        # A server that comes back is found within a second, not within two minutes.
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if tls is not None and tls.server_name:
        args.append(("grpc.ssl_target_name_override", tls.server_name))
        args.append(("grpc.default_authority", tls.server_name))
    if _is_loopback(address):
        # gRPC sends even 127.0.0.1 through the proxy that http_proxy names.
        args.append(("grpc.enable_http_proxy", 0))
    return args


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
