"""Texts longer than the model: overlapping windows, and one answer a token out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from samp_kernels.interface import F32, Array

from samp_core.errors import SampError


@dataclass(frozen=True)
class Windows:
    """length: tokens of a window, its first and last special token included; stride: tokens that
    neighbours share, as in transformers' tokenizers; most: windows read of one text.
    """

    length: int
    stride: int
    most: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.stride < self.length - 2:
            raise SampError(
                "stride", f"stride {self.stride} of windows of {self.length} tokens",
                f"0 to {self.length - 3}", "choose a smaller stride or a larger max_length",
            )  # fmt: skip

    @property
    def step(self) -> int:
        """Tokens of the text from one window's start to the next one's."""
        return self.length - 2 - self.stride

    @property
    def tokens(self) -> int:
        """The longest row: the tokens of `most` windows with both specials."""
        return self.length + (self.most - 1) * self.step

    def places(self, tokens: int) -> list[tuple[int, int]]:
        """Where in a row of so many tokens each window's part of the text lies, end exclusive."""
        if tokens <= self.length:
            return [(1, tokens - 1)]
        last = tokens - 1
        places = [(1, 1 + self.length - 2)]
        while places[-1][1] < last:
            start = places[-1][0] + self.step
            places.append((start, min(start + self.length - 2, last)))
        return places

    def lengths(self, tokens: int) -> list[int]:
        """Tokens of each window of a row of so many, its specials included."""
        return [end - start + 2 for start, end in self.places(tokens)]

    def cut(self, row: Array) -> list[Array]:
        """A row [L] as windows: the specials at its ends stand around each part."""
        if len(row) <= self.length:
            return [row]
        return [
            np.concatenate([row[:1], row[start:end], row[-1:]])
            for start, end in self.places(len(row))
        ]

    def join(self, parts: Sequence[F32], tokens: int) -> F32:
        """[L, C] from the windows' [l, C]: each token from the window where it has most context.

        Context is the fewer of the tokens before and after it in the window; of equals the first
        window counts. The specials come from the first and the last window.
        """
        if len(parts) == 1:
            return parts[0]
        whole = np.empty((tokens, parts[0].shape[1]), dtype=np.float32)
        context = np.full(tokens, -1)
        for part, (start, end) in zip(parts, self.places(tokens), strict=True):
            place = np.arange(end - start)
            here = np.minimum(place, place[::-1])
            better = here > context[start:end]
            context[start:end][better] = here[better]
            whole[start:end][better] = part[1:-1][better]
        whole[0], whole[-1] = parts[0][0], parts[-1][-1]
        return whole
