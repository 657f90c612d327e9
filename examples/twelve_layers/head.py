"""Heads on frozen features, in torch: the family's own dense-tanh-linear, and logistic regression.

logits = classifier(tanh(pooler(x))), x the encoder's first token state, [texts, H]: exactly the
head of BertForSequenceClassification and of MPNetForSequenceClassification.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

F32 = NDArray[np.float32]
Labels = NDArray[np.int64]
SEED = 7
EPOCHS = 40
BATCH = 64
RATE = 5e-4
HELD_BACK = 10
"""Every tenth training row chooses the epoch; the test rows choose nothing."""


def train(features: F32, labels: Labels) -> dict[str, F32]:
    """pooler.weight, .bias, classifier.weight, .bias: of the epoch best on the rows held back."""
    torch.manual_seed(SEED)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    apart = torch.arange(len(x)) % HELD_BACK == 0
    inputs, classes = x.shape[1], int(y.max()) + 1
    # Features of unlike size: the layer learns on standardized ones, and is then folded back.
    mean, deviation = x[~apart].mean(0), x[~apart].std(0) + 1e-6
    z = (x - mean) / deviation
    pooler, classifier = torch.nn.Linear(inputs, inputs), torch.nn.Linear(inputs, classes)
    with torch.no_grad():
        pooler.weight.mul_(0.3)
    parameters = [*pooler.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05)
    rows = torch.nonzero(~apart).ravel()
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best, kept = -1.0, [p.detach().clone() for p in parameters]

    def forward(part: torch.Tensor, drop: float) -> torch.Tensor:
        inner = torch.tanh(pooler(functional.dropout(part, drop)))
        result: torch.Tensor = classifier(functional.dropout(inner, drop))
        return result

    for _ in range(EPOCHS):
        for some in rows[torch.randperm(len(rows))].split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(forward(z[some], 0.3), y[some]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = float((forward(z[apart], 0.0).argmax(1) == y[apart]).float().mean())
        if right > best:
            best, kept = right, [p.detach().clone() for p in parameters]
    weight, bias, last, last_bias = kept
    weight = weight / deviation
    return {
        "pooler.weight": weight.numpy(),
        "pooler.bias": (bias - weight @ mean).numpy(),
        "classifier.weight": last.numpy(),
        "classifier.bias": last_bias.numpy(),
    }


def logits(weights: Mapping[str, F32], features: F32) -> F32:
    """[texts, classes]"""
    inner = np.tanh(features @ weights["pooler.weight"].T + weights["pooler.bias"])
    return np.asarray(inner @ weights["classifier.weight"].T + weights["classifier.bias"])


def logistic(features: F32, labels: Labels, others: F32) -> Labels:
    """Classes of `others` by logistic regression on features of length 1: the usual yardstick."""

    def unit(x: F32) -> torch.Tensor:
        return functional.normalize(torch.from_numpy(x), dim=1)

    x, y = unit(features), torch.from_numpy(labels)
    weight = torch.zeros(int(y.max()) + 1, x.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(functional.linear(x, weight, bias), y)
        loss = loss + 0.5 / len(x) * (weight**2).sum()  # scikit-learn's C = 1
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        found: Labels = functional.linear(unit(others), weight, bias).argmax(1).numpy()
    return found
