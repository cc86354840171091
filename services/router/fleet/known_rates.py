"""Averages the rates of many workers of one model; a worker's news costs the change of a row."""

from __future__ import annotations

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
