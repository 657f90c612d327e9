"""Typed calls to a served SAMP model over gRPC and HTTP; needs tritonclient and NumPy only.

with samp_client.connect("127.0.0.1:8001") as client:
    for prediction in client.predict(["a fine film", "a dull one"], tier="fast"):
        print(prediction.label, prediction.score)

async with samp_client.connect_async("127.0.0.1:8001") as client:
    predictions = await client.predict(texts, tier="fast")
    async for outcome in client.stream(more_texts, tier="fast"): ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from samp_client.api import DEFAULT_TIER, Client, connect
from samp_client.discovery import TierInfo
from samp_client.errors import (
    BadRequest,
    BatchTooLarge,
    ClientError,
    DeadlineExceeded,
    ServerError,
    ServerFault,
    Unavailable,
    UnknownModel,
    UnknownTier,
    UserError,
)
from samp_client.records import (
    ABRecord,
    Answer,
    EmbeddingPrediction,
    Entity,
    EntityPrediction,
    LabelsPrediction,
    Outcome,
    Prediction,
    ScorePrediction,
)
from samp_client.retry import Retry
from samp_client.security import Tls
from samp_client.server_times import Counters, StepTime, TierTimes
from samp_client.sticky import sticky_arm

if TYPE_CHECKING:
    from samp_client.aio import AsyncClient, connect_async
    from samp_client.arms import ABClient, Arm, AsyncABClient, JsonlSink

# asyncio alone takes as long to import as all of the rest: only who asks for these pays for it.
_LATER = {
    "ABClient": "arms",
    "Arm": "arms",
    "AsyncABClient": "arms",
    "AsyncClient": "aio",
    "JsonlSink": "arms",
    "connect_async": "aio",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


__all__ = [
    "DEFAULT_TIER",
    "ABClient",
    "ABRecord",
    "Answer",
    "Arm",
    "AsyncABClient",
    "AsyncClient",
    "BadRequest",
    "BatchTooLarge",
    "Client",
    "ClientError",
    "Counters",
    "DeadlineExceeded",
    "EmbeddingPrediction",
    "Entity",
    "EntityPrediction",
    "JsonlSink",
    "LabelsPrediction",
    "Outcome",
    "Prediction",
    "Retry",
    "ScorePrediction",
    "ServerError",
    "ServerFault",
    "StepTime",
    "TierInfo",
    "TierTimes",
    "Tls",
    "Unavailable",
    "UnknownModel",
    "UnknownTier",
    "UserError",
    "connect",
    "connect_async",
    "sticky_arm",
]
