"""Section 4: schedules and their requirements."""

import math

import pytest
import torch

from helpers import (
    CosineScheduler,
    FunctionScheduler,
    LinearScheduler,
    PolynomialScheduler,
    check_scheduler,
)


class Schedule:
    """A linear schedule with some of its methods replaced."""

    def __init__(self, **methods):
        base = LinearScheduler()
        for name in ("alpha", "beta", "alpha_dot", "beta_dot"):
            setattr(self, name, methods.get(name, getattr(base, name)))


def test_the_schedules_of_the_notebooks_pass(scheduler):
    assert check_scheduler(scheduler) is scheduler


def test_ends_are_exact_in_float32(scheduler):
    ends = torch.tensor([0.0, 1.0])
    assert scheduler.alpha(ends).tolist() == [0, 1]
    assert scheduler.beta(ends).tolist() == [1, 0]


@pytest.mark.parametrize("power", [1, 1.5, 2, 5])
def test_polynomial_powers_pass(power):
    check_scheduler(PolynomialScheduler(power))


def test_power_one_is_linear():
    t = torch.linspace(0, 1, 11)
    for name in ("alpha", "beta", "alpha_dot", "beta_dot"):
        assert torch.equal(
            getattr(PolynomialScheduler(1), name)(t), getattr(LinearScheduler(), name)(t)
        )


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 1, 1, 1)])
def test_derivatives_by_autograd(scheduler, name, shape, generator):
    t = torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()
    value = getattr(scheduler, name)(t)
    (gradient,) = torch.autograd.grad(value.sum(), t)
    assert value.shape == shape
    torch.testing.assert_close(getattr(scheduler, f"{name}_dot")(t), gradient)


def test_function_scheduler_differentiates_its_functions(generator):
    cosine = CosineScheduler()
    made = check_scheduler(FunctionScheduler(cosine.alpha, cosine.beta))
    t = torch.rand(50, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(made.alpha_dot(t), cosine.alpha_dot(t))
        torch.testing.assert_close(made.beta_dot(t), cosine.beta_dot(t))


def test_function_scheduler_admits_constants_and_singular_ends():
    scheduler = FunctionScheduler(torch.ones_like, lambda t: torch.sqrt(1 - t))
    ends = torch.tensor([0.0, 1.0])
    assert scheduler.alpha_dot(ends).tolist() == [0, 0]
    assert scheduler.beta_dot(ends).tolist() == [-0.5, -math.inf]


FAILURES = {
    "endpoints: alpha": Schedule(alpha=lambda t: 0.9 * t),
    "endpoints: beta": Schedule(beta=lambda t: 1.0066 - t),
    "endpoints: beta is": Schedule(beta=lambda t: t / 0),
    "monotone: alpha must be in": Schedule(alpha=lambda t: t + 0.3 * torch.sin(2 * math.pi * t)),
    "monotone: beta must be de": Schedule(beta=lambda t: 1 - t + torch.sin(6 * math.pi * t)),
    "finite derivative: beta_dot is not finite at t = 1": Schedule(
        beta=lambda t: torch.sqrt(1 - t), beta_dot=lambda t: -0.5 / torch.sqrt(1 - t)
    ),
    "finite derivative: alpha_dot is not finite at t = 0": Schedule(
        alpha=torch.sqrt, alpha_dot=lambda t: 0.5 / torch.sqrt(t)
    ),
    "alpha_dot is not the derivative of alpha": Schedule(alpha=lambda t: t**2),
    "beta_dot is not the derivative of beta": Schedule(beta_dot=torch.ones_like),
}


@pytest.mark.parametrize("message", FAILURES)
def test_a_schedule_that_fails_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        check_scheduler(FAILURES[message])
