"""Awaited calls over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

import aiohttp
from samp_client import errors
from samp_client.http_transport import arrays, failure, tensors
from tritonclient.http import aio as triton
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from samp_client.transport import Columns, Tensors

# Each call has its own limit; the session's has only to be longer.
_SESSION_TIMEOUT_S = 3600.0


class HttpAioTransport:
    """A pool of kept-alive connections of the running event loop, at most `connections`."""

    def __init__(
        self, address: str, *, headers: Mapping[str, str] | None = None, connections: int = 100
    ) -> None:
        self._address = address
        self._headers = dict(headers or {})
        self._client: Any = triton.InferenceServerClient(
            address, conn_limit=connections, conn_timeout=_SESSION_TIMEOUT_S
        )

    async def infer(self, model: str, columns: Columns, timeout_s: float) -> Tensors:
        # tritonclient adds to the headers that it is given.
        call = self._client.infer(model, tensors(columns), headers=dict(self._headers))
        return arrays(await self._answer(model, timeout_s, call))

    async def index(self, timeout_s: float) -> list[dict[str, Any]]:
        call = self._client.get_model_repository_index(headers=dict(self._headers))
        models: list[dict[str, Any]] = await self._answer("the repository index", timeout_s, call)
        return models

    async def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        call = self._client.get_model_config(model, headers=dict(self._headers))
        config: dict[str, Any] = await self._answer(model, timeout_s, call)
        return config

    async def statistics(self, timeout_s: float) -> list[dict[str, Any]]:
        call = self._client.get_inference_statistics(headers=dict(self._headers))
        answer = await self._answer("the statistics", timeout_s, call)
        models: list[dict[str, Any]] = answer.get("model_stats", [])
        return models

    async def close(self) -> None:
        await self._client.close()

    async def _answer(self, what: str, timeout_s: float, call: Awaitable[Any]) -> Any:
        what = f"{what} on {self._address} over HTTP"
        try:
            # aiohttp closes the connection of a call that is cancelled half way.
            return await asyncio.wait_for(call, timeout_s)
        except InferenceServerException as error:
            raise failure(error, what) from None
        except (asyncio.TimeoutError, TimeoutError):
            raise errors.deadline(what, timeout_s) from None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            unsent = isinstance(error, aiohttp.ClientConnectorError)
            # Of a connection, aiohttp's own text speaks of ssl where there is none.
            cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
            reason = str(cause) or type(error).__name__
            raise errors.unreachable(what, reason, unsent=unsent) from None
        except (ValueError, KeyError, TypeError) as error:
            raise errors.unreachable(what, f"not an answer of Triton ({error})") from None
