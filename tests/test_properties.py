"""Properties that must hold for every shape, type and memory layout, by random search."""

import itertools

import pytest
import torch
from checks import swirl
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    SCHEDULERS,
    GaussianPath,
    euler_maruyama,
    flow_matching_loss,
    heun,
    make_generator,
    score_matching_loss,
    time_grid,
)

LAYOUTS = ("contiguous", "transposed", "every second", "expanded", "channels_last")


def lay_out(x, layout):
    """The same values in another memory layout."""
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "every second":
        return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2] if x.ndim else x
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


@st.composite
def arguments(draw):
    """A schedule, three tensors (B, *D) in some layout, and t (B,) inside (0, 1).

    B = 1, B equal to the last axis, and axes of size 1 are among the shapes.
    """
    batch = draw(st.integers(1, 5))
    rest = draw(st.lists(st.sampled_from([1, 2, 3, batch]), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = make_generator(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(LAYOUTS))
    wants_gradient = draw(st.booleans())
    tensors = []
    for _ in range(3):
        x = torch.randn(batch, *rest, generator=generator, dtype=dtype)
        tensors.append(lay_out(x, layout).requires_grad_(wants_gradient))
    t = 0.05 + 0.9 * torch.rand(batch, generator=generator, dtype=dtype)
    scheduler = SCHEDULERS[draw(st.sampled_from(sorted(SCHEDULERS)))]
    return GaussianPath(scheduler), *tensors, t


METHODS = (
    lambda path, a, b, c, t: path.sample(a, t, b),
    lambda path, a, b, c, t: path.velocity_target(a, t, b),
    lambda path, a, b, c, t: path.conditional_velocity(a, b, t),
    lambda path, a, b, c, t: path.conditional_score(a, b, t),
    lambda path, a, b, c, t: path.velocity_to_score(a, b, t),
    lambda path, a, b, c, t: path.score_to_velocity(a, b, t),
    lambda path, a, b, c, t: path.noise_to_score(a, t),
    lambda path, a, b, c, t: path.velocity_to_data(a, b, t),
)


@pytest.mark.parametrize("number", range(len(METHODS)))
@given(arguments())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_path_treats_every_entry_alone(number, case):
    """Like each entry computed as a scalar process with its own t: no broadcast goes astray."""
    path, *tensors, t = case
    out = METHODS[number](path, *tensors, t)
    assert out.shape == tensors[0].shape
    assert out.dtype == tensors[0].dtype
    assert out.requires_grad == tensors[0].requires_grad
    flat = [x.detach().reshape(len(t), -1) for x in tensors]
    alone = torch.stack(
        [METHODS[number](path, *(x[:, i] for x in flat), t) for i in range(flat[0].shape[1])], 1
    )
    torch.testing.assert_close(out.detach().reshape(alone.shape), alone)


def em(x, ts):
    return euler_maruyama(
        swirl, lambda t: 1 + t, x, ts, generator=make_generator(0), trajectory=True
    )


@pytest.mark.parametrize("solve", [em, lambda x, ts: heun(swirl, x, ts, trajectory=True)])
@given(arguments(), st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_solvers_keep_shape_type_and_input(solve, case, steps):
    """Layout and gradients of the input change nothing, and the input is not changed."""
    x = case[1]
    before = x.detach().clone()
    xs = solve(x, time_grid(steps))
    assert xs.shape == (steps + 1, *x.shape)
    assert xs.dtype == x.dtype
    assert not xs.requires_grad
    assert torch.equal(x.detach(), before)
    assert torch.equal(xs[0], before)
    torch.testing.assert_close(xs, solve(before.contiguous(), time_grid(steps)))


@given(arguments())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_losses_are_finite_numbers_for_every_shape(case):
    path, z, *_ = case
    for loss, weighted in itertools.product((flow_matching_loss, score_matching_loss), (1, 0)):
        options = {} if loss is flow_matching_loss else {"weighted": bool(weighted)}
        value = loss(lambda x, t: 0 * x, z, path, generator=make_generator(0), **options)
        assert value.shape == ()
        assert value.isfinite()
        assert value >= 0
