"""Averages the rates of many workers of one model; a worker's news costs the change of a row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from services.rates import Rates, mean_of_rows


class KnownRates:
    """The rates of some workers, by a name."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._latest: dict[str, Rates] = {}
        self._values = np.zeros((4, len(Rates().to_row())))
        self._mean: Rates | None = None

    def put(self, name: str, rates: Rates) -> None:
        """A worker has these rates from now on."""
        if self._latest.get(name) == rates:
            return
        self._latest[name] = rates
        row = self._rows.setdefault(name, len(self._rows))
        if row == len(self._values):
            self._values = np.concatenate((self._values, np.zeros_like(self._values)))
        self._values[row] = rates.to_row()
        self._mean = None

    def mean(self) -> Rates:
        """As `mean_rates` of all."""
        if self._mean is None:
            self._mean = mean_of_rows(self._values[: len(self._rows)])
        return self._mean


class ModelRates:
    """The rates of one model's workers. What prompts cost, those know who compute prompts; where workers are elastic,
    what streams cost know those who decode: a worker that has never done a thing has only guessed at its cost."""

    def __init__(self) -> None:
        self.prompts = KnownRates()
        self.streams: KnownRates | None = None
        """None: of an elastic worker nothing is known."""
        self._joined: tuple[Rates, Rates, Rates] | None = None

    def put_streams(self, name: str, rates: Rates) -> None:
        """An elastic worker that decodes has these rates from now on."""
        if self.streams is None:
            self.streams = KnownRates()
        self.streams.put(name, rates)

    def mean(self) -> Rates:
        """Of a prompt as those who compute prompts know it, of a step with streams as those who decode."""
        prompts = self.prompts.mean()
        if self.streams is None:
            return prompts
        streams = self.streams.mean()
        if not streams.num_steps or not prompts.num_steps:
            return prompts if prompts.num_steps else streams
        if self._joined is None or self._joined[0] is not prompts or self._joined[1] is not streams:
            joined = replace(
                prompts,
                base_s=streams.base_s,
                running_s=streams.running_s,
                context_token_s=streams.context_token_s,
                spread=max(prompts.spread, streams.spread),
            )
            self._joined = (prompts, streams, joined)
        return self._joined[2]
