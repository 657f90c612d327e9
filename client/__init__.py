"""Typed calls to a served SAMP model over gRPC and HTTP; needs tritonclient and NumPy only.

with samp_client.connect("127.0.0.1:8001") as client:
    for prediction in client.predict(["a fine film", "a dull one"], tier="fast"):
        print(prediction.label, prediction.score)
"""

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
from samp_client.server_times import Counters, StepTime, TierTimes
from samp_client.sticky import sticky_arm

__all__ = [
    "DEFAULT_TIER",
    "ABRecord",
    "Answer",
    "BadRequest",
    "BatchTooLarge",
    "Client",
    "ClientError",
    "Counters",
    "DeadlineExceeded",
    "EmbeddingPrediction",
    "Entity",
    "EntityPrediction",
    "LabelsPrediction",
    "Outcome",
    "Prediction",
    "ScorePrediction",
    "ServerError",
    "ServerFault",
    "StepTime",
    "TierInfo",
    "TierTimes",
    "Unavailable",
    "UnknownModel",
    "UnknownTier",
    "UserError",
    "connect",
    "sticky_arm",
]
