"Chapter 08: pairs, times, losses, solvers and guidance."
import math

import pytest
import torch

from fantasy_nb.flow import (as_velocity, euler, flow_loss, flow_pair, guide, guided, heun, like, logit_normal_times, loss_per_bin, multistep,
                             sample, shift_time, time_grid, to_velocity, uniform_times)

MEAN, SPREAD = 3.0, 0.5


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def known_velocity(x, t):
    "Exact velocity when the data are N(MEAN, SPREAD^2); the walk from z ends at MEAN + SPREAD z."
    t = like(t, x)
    return -MEAN + (t - (1 - t) * SPREAD**2) / ((1 - t) ** 2 * SPREAD**2 + t**2) * (x - (1 - t) * MEAN)


def test_pair_ends_and_slope():
    x0, noise = torch.randn(3, 2, 4, generator=seeded()), torch.randn(3, 2, 4, generator=seeded(1))
    assert torch.equal(flow_pair(x0, torch.zeros(3), noise).x_t, x0)
    assert torch.equal(flow_pair(x0, torch.ones(3), noise).x_t, noise)
    a, b = (flow_pair(x0, torch.full((3,), t), noise) for t in (0.25, 0.75))
    torch.testing.assert_close((b.x_t - a.x_t) / 0.5, a.velocity)


def test_shift_keeps_ends_and_order():
    t = torch.linspace(0, 1, 11)
    s = shift_time(t, 5.0)
    assert s[0] == 0 and s[-1] == 1 and (s.diff() > 0).all() and (s[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_time(t, 1.0), t)
    with pytest.raises(ValueError, match="above 0"): shift_time(t, 0)


def test_times_have_their_distributions():
    assert uniform_times(20_000, generator=seeded()).mean().item() == pytest.approx(0.5, abs=0.01)
    logit = torch.logit(logit_normal_times(20_000, mean=0.3, std=2.0, generator=seeded()))
    assert logit.mean().item() == pytest.approx(0.3, abs=0.05) and logit.std().item() == pytest.approx(2.0, abs=0.05)
    assert uniform_times(20_000, shift=5.0, generator=seeded()).median().item() == pytest.approx(5 * 0.5 / 3, abs=0.01)


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_the_perfect_answer_costs_nothing(prediction):
    x0, noise, t = torch.randn(4, 3, generator=seeded()), torch.randn(4, 3, generator=seeded(1)), uniform_times(4, generator=seeded(2))
    perfect = {"velocity": noise - x0, "clean": x0}[prediction]
    out = flow_loss(lambda x, t: perfect, x0, t, noise, prediction)
    assert out.loss == 0 and torch.equal(out.t, t)
    velocity = as_velocity(lambda x, t: perfect, prediction)
    torch.testing.assert_close(velocity(flow_pair(x0, t, noise).x_t, t), noise - x0, atol=1e-4, rtol=1e-4)


def test_weight_counts_only_where_it_is():
    x0, weight = torch.zeros(2, 1, 4), torch.tensor([0.0, 0, 1, 1])
    answer = torch.tensor([9.0, 9, 1, 3]).expand(2, 1, 4)
    out = flow_loss(lambda x, t: answer, x0, prediction="clean", weight=weight, generator=seeded())
    torch.testing.assert_close(out.per_sample, torch.tensor([5.0, 5.0]))
    with pytest.raises(ValueError, match="velocity"): flow_loss(lambda x, t: x, x0, prediction="noise")


def test_loss_reaches_the_model_in_float32():
    scale = torch.ones((), requires_grad=True)
    x0 = torch.randn(4, 3, generator=seeded()).bfloat16()
    out = flow_loss(lambda x, t: x * scale, x0, generator=seeded())  # a number in float32 leaves the answer in bfloat16
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and scale.grad.abs() > 0 and not out.per_sample.requires_grad


def test_bins():
    centres, means = loss_per_bin(torch.tensor([0.0, 0.1, 1.0]), torch.tensor([1.0, 3.0, 5.0]), bins=4)
    assert centres.tolist() == [0.125, 0.375, 0.625, 0.875] and means[0] == 2 and means[3] == 5 and means[1].isnan()


def test_to_velocity_is_finite_at_zero():
    x = torch.randn(2, 3, generator=seeded())
    assert to_velocity(x, torch.zeros(2), x + 1e-3, "clean").isfinite().all()
    with pytest.raises(ValueError, match="clean"): to_velocity(x, torch.zeros(2), x, "x0")


@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2), (multistep, 2)])
def test_order_of_convergence(solver, order):
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = [(solver(known_velocity, z, time_grid(n, 1.0).double()) - (MEAN + SPREAD * z)).abs().max().item() for n in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def ends_off(solver, n, shift=1.0):
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    return (solver(known_velocity, z, time_grid(n, shift).double()) - (MEAN + SPREAD * z)).abs().max().item()


def test_multistep_is_second_order_on_uneven_grids():
    z, errors = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], []
    for n in (64, 128, 256):
        even = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        bent = even + 0.1 * (2 * math.pi * even).sin()  # steps between 0.37 and 1.63 of the even one
        errors.append((multistep(known_velocity, z, bent) - (MEAN + SPREAD * z)).abs().max().item())
    assert min(math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])) >= 1.8, errors


def test_multistep_integrates_a_line_but_for_its_first_step():
    grid, x = torch.tensor([1.0, 0.9, 0.5, 0.0], dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    end = multistep(lambda x, t: 6 * like(t, x) + 0 * x, x, grid)
    torch.testing.assert_close(end, x - 3.03)  # exact: -3; Euler's first step: 0.03 too far


def test_multistep_runs_the_network_once_a_step():
    calls, seen = [], []
    multistep(lambda x, t: calls.append(t) or x, torch.ones(2, 1), time_grid(7), lambda i, n, x: seen.append((i, n, x.shape)))
    assert len(calls) == 7 and all(t.shape == (2,) for t in calls) and seen == [(i, 7, (2, 1)) for i in range(1, 8)]
    z = torch.randn(3, 2, generator=seeded())
    assert torch.equal(multistep(known_velocity, z, time_grid(1)), euler(known_velocity, z, time_grid(1)))


def test_multistep_beats_euler_and_at_thirty_steps_unipc():
    from diffusers import UniPCMultistepScheduler

    def unipc(velocity, x, grid):
        scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        scheduler.set_timesteps(sigmas=grid[:-1].numpy().copy())
        for i, t in enumerate(scheduler.timesteps): x = scheduler.step(velocity(x, grid[i].expand(len(x))), t, x).prev_sample
        return x

    for shift in (1.0, 5.0):
        assert ends_off(multistep, 30, shift) < min(ends_off(euler, 30, shift) / 10, ends_off(unipc, 30, shift))


def test_euler_equals_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 31)[:-1].tolist())
    theirs = torch.randn(16, 4, 2, 3, generator=seeded())
    ours = euler(known_velocity, theirs, time_grid(30, 5.0))
    for t in scheduler.timesteps: theirs = scheduler.step(known_velocity(theirs, t / 1000), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_clean_prediction_ends_at_the_answer():
    goal, seen = torch.randn(2, 5, generator=seeded()), []
    end = sample(lambda x, t: goal, (2, 5), steps=7, prediction="clean", generator=seeded(1), progress=lambda i, n, x: seen.append((i, n)))
    torch.testing.assert_close(end, goal, atol=1e-5, rtol=1e-5)
    assert seen == [(i, 7) for i in range(1, 8)]


def test_sample_is_seeded_and_asks_for_a_shape():
    draw = lambda seed: sample(known_velocity, (3, 1), steps=4, generator=seeded(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    with pytest.raises(ValueError, match="shape"): sample(known_velocity)
    with pytest.raises(ValueError, match="at least 1"): time_grid(0)


def test_guidance():
    un, no, ex = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([1.5])
    assert torch.equal(guide(no, ex, 1.0), ex) and torch.equal(guide(no, ex, 0.0), no)
    assert guide(no, ex, 4.0).item() == 3.0 and guide(no, ex, 4.0, un, 5.0).item() == 7.0
    with pytest.raises(ValueError, match="both"): guide(no, ex, 4.0, un)


def counting(value):
    "A constant velocity field and the list of times at which it was run."
    times = []
    return lambda x, t: times.append(t[0].item()) or x * value, times


@pytest.mark.parametrize("interval", [None, (0.0, 1.0)])
def test_guided_everywhere_is_guide(interval):
    no, ex = known_velocity, lambda x, t: known_velocity(x, t) + 0.1 * x
    x, grid = torch.randn(4, 3, generator=seeded()), time_grid(10)
    plain = euler(lambda x, t: guide(no(x, t), ex(x, t), 4.0), x, grid)
    assert torch.equal(euler(guided(no, ex, 4.0, interval), x, grid), plain)
    assert not torch.equal(euler(guided(no, ex, 4.0, (0.3, 0.8)), x, grid), plain)


def test_guided_runs_the_second_network_only_inside():
    (no, no_times), (ex, ex_times), grid = counting(1.0), counting(1.5), time_grid(30)
    euler(guided(no, ex, 4.0, (0.3, 0.8)), torch.ones(2, 1), grid)
    inside = [t for t in grid[:-1].tolist() if 0.3 <= t <= 0.8]
    assert ex_times == grid[:-1].tolist() and no_times == inside and 0 < len(inside) < 30
    assert guided(no, ex, 4.0, (0.3, 0.8))(torch.ones(1), torch.tensor([0.9])).item() == 1.5
    no_times.clear()
    assert guided(no, ex, 1.0)(torch.ones(1), torch.tensor([0.5])).item() == 1.5 and not no_times


def test_guided_with_text_and_with_mixed_times():
    (un, un_times), (no, _), (ex, _) = counting(0.0), counting(1.0), counting(1.5)
    v = guided(no, ex, 4.0, (0.3, 0.8), v_uncond=un, g_text=5.0)
    assert v(torch.ones(3, 1), torch.tensor([0.9, 0.5, 0.1])).flatten().tolist() == [1.5, 7.0, 1.5]
    assert v(torch.ones(3, 1), torch.full((3,), 0.1)).flatten().tolist() == [1.5] * 3 and len(un_times) == 1
    assert guided(no, ex, 4.0, (0.3, 0.8))(torch.ones(1, 2, 3), torch.tensor([0.5])).unique().item() == 3.0


def test_guided_refuses_what_it_cannot_mean():
    for interval in ((0.8, 0.3), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="interval"): guided(known_velocity, known_velocity, interval=interval)
    with pytest.raises(ValueError, match="both"): guided(known_velocity, known_velocity, g_text=5.0)
