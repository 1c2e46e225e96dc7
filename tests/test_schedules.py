"""Schedules against the paper's numbers and against arithmetic in float64."""

import numpy as np
import pytest

from ddpm_jax.diffusion import schedules

pytestmark = pytest.mark.usefixtures('no_nans')

NAMES = ['linear', 'cosine', 'sqrt_linear', 'scaled_linear']
NAMES += ['quad', 'sqrt', 'const', 'su', 'jsd', 'warmup10', 'warmup50']
ALL = [getattr(schedules, name) for name in NAMES]


def float64_linear() -> np.ndarray:
  return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


@pytest.mark.parametrize('make', ALL)
def test_slot_0_is_the_clean_image(make):
  s = make(T=50)
  assert s.T == 50
  assert s.beta[0] == 0
  assert s.alpha_bar[0] == 1
  assert s.one_minus_alpha_bar[0] == 0


@pytest.mark.parametrize('make', ALL)
def test_alpha_bar_falls_and_beta_tilde_is_between_0_and_beta(make):
  s = make()
  assert np.all(np.diff(s.alpha_bar) < 0)
  assert s.beta_tilde[1] == 0
  assert np.all((s.beta_tilde[2:] > 0) & (s.beta_tilde[2:] <= s.beta[2:]))


def test_alpha_bar_T_of_the_paper():
  # Section 4: L_T ≈ 1e-5 bits/dim, since ᾱ_T = Π (1 - β_t) = 4.04e-5.
  assert schedules.linear().alpha_bar[1000] == pytest.approx(4.0358e-5, 1e-4)


def test_tables_are_those_of_float64_to_float32_rounding():
  s, exact = schedules.linear(), float64_linear()
  rounding = 2**-23  # of float32, and a little for the order of the sums
  np.testing.assert_allclose(s.alpha_bar[1:], exact, rtol=rounding)
  np.testing.assert_allclose(s.one_minus_alpha_bar[1:], 1 - exact, rtol=2e-7)
  # What a float32 `1 - alpha_bar` would have given for t = 1.
  assert abs((1 - s.alpha_bar[1]) / 1e-4 - 1) > 1e-4


def test_cosine_follows_its_formula_until_beta_is_cut():
  s, t = schedules.cosine(), np.arange(900)
  f = np.cos((t / 1000 + 8e-3) / 1.008 * np.pi / 2) ** 2
  np.testing.assert_allclose(s.alpha_bar[:900], f / f[0], rtol=1e-6)
  assert s.beta[1000] == np.float32(0.999)


def test_each_schedule_is_its_formula():
  beta = {name: getattr(schedules, name)().beta[1:] for name in NAMES}
  line = np.linspace(1e-4, 0.02, 1000)
  roots = np.linspace(0.01, 0.02**0.5, 1000)
  t = np.arange(1, 1001)
  np.testing.assert_allclose(beta['sqrt_linear'], line, rtol=1e-6)
  np.testing.assert_allclose(beta['scaled_linear'], roots**2, rtol=1e-6)
  np.testing.assert_array_equal(beta['quad'], beta['scaled_linear'])
  np.testing.assert_allclose(beta['sqrt'] ** 2, line, rtol=1e-6)
  np.testing.assert_allclose(beta['const'], 0.02, rtol=1e-6)
  np.testing.assert_allclose(beta['su'], 2e-5 * t, rtol=1e-6)
  np.testing.assert_allclose(beta['jsd'], 1 / (1001.0 - t), rtol=1e-6)
  for name, rise in (('warmup10', 100), ('warmup50', 500)):
    line = np.append(np.linspace(1e-4, 0.02, rise), np.full(1000 - rise, 0.02))
    np.testing.assert_allclose(beta[name], line, rtol=1e-6)


def test_jsd_leaves_one_part_in_T_less_at_every_step():
  """ᾱ_t = 1 - t/T: x_T is noise alone."""
  s = schedules.jsd()
  np.testing.assert_allclose(s.alpha_bar, 1 - np.arange(1001) / 1000, atol=1e-7)
  assert schedules.ends_in_noise(s)
  assert not schedules.ends_in_noise(schedules.sqrt(10_000))


@pytest.mark.parametrize('name', ['linear', 'scaled_linear', 'sqrt'])
def test_the_only_step_of_one_has_the_last_beta(name):
  s = getattr(schedules, name)(T=1, beta_1=1e-4, beta_T=0.3)
  last = 0.3**0.5 if name == 'sqrt' else 0.3
  assert s.beta[1] == pytest.approx(last, rel=1e-6)


def test_log_alpha_bar_T_of_su_is_about_minus_5():
  """In its own notation, where ᾱ_T is our √ᾱ_T."""
  assert 0.5 * np.log(schedules.su().alpha_bar[1000]) == pytest.approx(
    -5, abs=0.1
  )


@pytest.mark.parametrize('beta', [[0.1, 0.0], [1.0, 0.1], [1.1], [-0.1], []])
def test_beta_outside_0_to_1_is_refused(beta):
  with pytest.raises(ValueError, match='between 0 and 1'):
    schedules.from_beta(beta)


@pytest.mark.parametrize('steps', [1, 7, 10, 250, 999])
def test_stride_visits_the_same_noise_levels(steps):
  s = schedules.linear()
  short = schedules.stride(s, steps)
  assert steps == short.T
  assert short.time[0] == 0
  assert short.time[-1] == 1000
  gaps = np.diff(short.time)
  assert gaps.max() - gaps.min() <= 1  # an even stride
  np.testing.assert_allclose(
    short.alpha_bar, s.alpha_bar[short.time], rtol=1e-6
  )
  np.testing.assert_allclose(
    short.one_minus_alpha_bar, s.one_minus_alpha_bar[short.time], rtol=1e-6
  )


def test_stride_of_T_is_the_schedule_itself():
  s = schedules.linear(T=30)
  assert schedules.stride(s, 30) is s


@pytest.mark.parametrize('steps', [0, -1, 31])
def test_stride_refuses_more_steps_than_there_are(steps):
  with pytest.raises(ValueError, match=r'1\.\.30'):
    schedules.stride(schedules.linear(T=30), steps)
