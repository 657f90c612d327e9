"""Awaited calls over gRPC."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

from samp_client import errors
from samp_client.grpc_transport import arrays, channel_args, credentials, failure, tensors
from tritonclient.grpc import aio as triton
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from samp_client.security import Tls
    from samp_client.transport import Columns, Tensors


class GrpcAioTransport:
    """One channel of the running event loop: all calls share its connection."""

    def __init__(
        self, address: str, *, headers: Mapping[str, str] | None = None, tls: Tls | None = None
    ) -> None:
        self._address = address
        self._headers = dict(headers or {})
        self._client: Any = triton.InferenceServerClient(
            address, creds=credentials(tls), channel_args=channel_args(address, tls)
        )

    async def infer(self, model: str, columns: Columns, timeout_s: float) -> Tensors:
        call = self._client.infer(
            model, tensors(columns), client_timeout=timeout_s, headers=self._headers
        )
        return arrays(await self._answer(model, timeout_s, call))

    async def index(self, timeout_s: float) -> list[dict[str, Any]]:
        call = self._client.get_model_repository_index(
            as_json=True, client_timeout=timeout_s, headers=self._headers
        )
        answer = await self._answer("the repository index", timeout_s, call)
        models: list[dict[str, Any]] = answer.get("models", [])
        return models

    async def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        call = self._client.get_model_config(
            model, as_json=True, client_timeout=timeout_s, headers=self._headers
        )
        config: dict[str, Any] = (await self._answer(model, timeout_s, call))["config"]
        return config

    async def statistics(self, timeout_s: float) -> list[dict[str, Any]]:
        call = self._client.get_inference_statistics(
            as_json=True, client_timeout=timeout_s, headers=self._headers
        )
        answer = await self._answer("the statistics", timeout_s, call)
        models: list[dict[str, Any]] = answer.get("model_stats", [])
        return models

    async def close(self) -> None:
        await self._client.close()

    async def _answer(self, what: str, timeout_s: float, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except InferenceServerException as error:
            what = f"{what} on {self._address} over gRPC"
            raise failure(error, what, timeout_s) from None
        except RuntimeError as error:  # gRPC's words for a channel that was closed meanwhile
            what = f"{what} on {self._address} over gRPC"
            raise errors.unreachable(what, str(error), unsent=False) from None
