"""Defines locust's user: one per process, whose one task is that process's part of the open loop."""

from __future__ import annotations

from locust import LoadTestShape, User, constant, task
from locust.env import Environment

from loadtest.conductor import Conductor

_ATTRIBUTE = "loadtest_conductor"


def attach(environment: Environment, conductor: Conductor) -> None:
    """Gives the environment the conductor that its users and its shape will ask."""
    setattr(environment, _ATTRIBUTE, conductor)


def _conductor_of(environment: Environment) -> Conductor:
    conductor = getattr(environment, _ATTRIBUTE)
    assert isinstance(conductor, Conductor)
    return conductor


class OpenLoopUser(User):
    """The source of all requests of its process, not a person. More of them change nothing."""

    wait_time = constant(1)

    @task
    def perform(self) -> None:
        _conductor_of(self.environment).performer.perform()


class PlannedShape(LoadTestShape):
    """Keeps one user for each process until the plan has been carried out."""

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        conductor = _conductor_of(self.runner.environment)
        if conductor.is_over:
            return None
        return conductor.num_processes, float(conductor.num_processes)
