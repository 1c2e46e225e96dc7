"""`--mode=figures`: pictures of what they say they are of."""

import shutil

import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import functions
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax.data import store
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.jobs import figures
from ddpm_jax.jobs import sample
from ddpm_jax.jobs.evaluate import bound as bound_job
from ddpm_jax.jobs.figures import common
from ddpm_jax.jobs.figures import curves
from ddpm_jax.jobs.figures import pictures
from ddpm_jax.runtime import images

NAMES = (
  'codec',
  'forward',
  'generation',
  'gradients',
  'interpolation',
  'nearest',
  'progressive',
  'quality',
  'rate_distortion',
  'schedules',
  'shared',
  'two_term',
)
MOVING = ('forward', 'progressive')
T = 100
S = schedules.linear(T, 1e-3, 0.2)


@pytest.fixture
def trained(tiny_run):
  """The small run, as a figure gets it, with changes to its recipe."""

  def trained(seed=0, **changes):
    changes = {k.replace('__', '.'): v for k, v in changes.items()}
    config = recipe.resolve(None, tiny_run[0], changes)
    mesh = build.mesh(config)
    *_, params = sample.restore(config, mesh, tiny_run[0])
    return common.Trained(config, mesh, params, seed, tiny_run[0])

  return trained


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize('name', NAMES)
def test_every_figure_is_a_picture(name, tiny_run, tmp_path):
  workdir = shutil.copytree(tiny_run[0], tmp_path / 'run')  # some add to it
  args = ['--mode=figures', f'--figure={name}', f'--workdir={workdir}']
  count = {'schedules': [], 'interpolation': ['--num_samples=2']}
  count['codec'] = ['--num_samples=3', '--config.codec.steps=5']
  count['codec'] += ['--config.codec.log2_candidates=8']
  args += count.get(name, ['--num_samples=3'])
  main.run([*args, f'--output={tmp_path / "new" / "a.png"}'])
  with Image.open(tmp_path / 'new' / 'a.png') as file:
    assert file.format == 'PNG'
    assert 400 < file.width < 1800
    assert 100 < file.height < 1800
    assert len(np.unique(np.asarray(file))) > 10
  made = sorted(p.name for p in (tmp_path / 'new').iterdir())
  assert made == (['a.gif', 'a.png'] if name in MOVING else ['a.png'])
  if name in MOVING:
    with Image.open(tmp_path / 'new' / 'a.gif') as file:
      assert file.n_frames >= 10


def test_these_are_all_figures():
  assert set(figures.every()) == set(NAMES)


def test_a_figure_is_put_into_the_workdir(tiny_run, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(tiny_run[0], workdir)
  main.run(['--mode=figures', '--figure=schedules', f'--workdir={workdir}'])
  assert (workdir / 'figure_schedules.png').is_file()


def test_at_t_1_an_image_is_nearly_itself_and_at_T_it_is_gone(trained):
  x0 = common.real(trained().config, 0, 5)
  table = schedules.linear()
  eps = process.normal(keys(5), x0.shape[1:])
  x_t = common.noised(table, x0, jnp.array([0, 1, 1000]), eps)
  np.testing.assert_array_equal(x_t[:, 0], x0)
  # √β_1 = 0.01 of noise is a little more than 1 gray of 255.
  gap = np.abs(x_t[:, 1].astype(int) - x0)
  assert 0 < gap.max() < 8
  noise = common.noised(table, np.zeros_like(x0) + 128, jnp.array([1000]), eps)
  gap = np.abs(x_t[:, 2].astype(int) - noise[:, 0])
  assert gap.max() <= 2  # √ᾱ_T = 0.006 of the image is left


def test_images_are_the_same_for_a_seed_and_others_for_another(trained):
  config = trained().config
  first = common.real(config, 0, 20)
  np.testing.assert_array_equal(common.real(config, 0, 20), first)
  assert np.any(common.real(config, 1, 20) != first)


def test_mixtures_begin_and_end_with_the_noised_images_exactly():
  x0, other, eps = process.normal(keys(3), (4, 4, 1))
  for t in (1, 50, T):
    ends = [
      editing.interpolate(S, x0, other, t, weight, eps) for weight in (0.0, 1.0)
    ]
    np.testing.assert_array_equal(ends[0], process.q_sample(S, x0, t, eps))
    np.testing.assert_array_equal(ends[1], process.q_sample(S, other, t, eps))


def test_a_mixture_is_as_noisy_as_x_t():
  """q_sample of the mixed images: what one noise for both is good for."""
  x0, other, eps = process.normal(keys(3), (4, 4, 1))
  mixed = editing.interpolate(S, x0, other, 30, 0.3, eps)
  expected = process.q_sample(S, 0.7 * x0 + 0.3 * other, 30, eps)
  np.testing.assert_allclose(mixed, expected, atol=1e-6)


def test_interpolation_starts_there_and_shows_the_originals(trained):
  run = trained(seed=3)
  tiles = pictures.interpolation(run, count=2).tiles
  a, b = pictures.unlike(common.real(run.config, 3, 32), 2)
  assert tiles.shape == (10, 13, 8, 8, 1)
  for pair in range(2):
    rows = tiles[5 * pair : 5 * pair + 5]
    np.testing.assert_array_equal(rows[:, 0], np.stack([a[pair]] * 5))
    np.testing.assert_array_equal(rows[:, -1], np.stack([b[pair]] * 5))
  # λ = 0, of the second pair, at its first t, by `samplers.sample` alone.
  p = functions.reverse_process(run.config)
  k, eps = functions.noise(run.config, 3, jnp.array([1]))
  first = 2  # ⌈10/8⌉ of 10 steps
  x_t = process.q_sample(p.schedule, a[1] / 127.5 - 1, first, eps[0])
  x_0, *_ = jax.jit(
    lambda params: samplers.sample(
      *(p.step, p.schedule, p.model_fn(params), k, x_t[None]),
      times=range(first, 0, -1),
    )
  )(run.params)
  expected = np.clip(np.asarray(x_0[0]) * 127.5 + 127.5, 0, 255)
  np.testing.assert_allclose(tiles[5, 1], expected, atol=0.51)


def test_pairs_are_of_images_that_differ_most():
  x0 = np.array([0, 10, 90, 5, 7, 8], np.uint8).reshape(6, 1, 1, 1)
  a, b = pictures.unlike(x0, 2)
  assert a.ravel().tolist() == [0, 5]
  assert b.ravel().tolist() == [90, 8]
  with pytest.raises(errors.UserError, match='4 pairs'):
    pictures.unlike(x0, 4)


def test_rows_of_their_own_parts_are_the_parts_of_samples():
  net = gaussian.model_fn(S, 0.4, 0.3)
  x = process.normal(keys(3, 1), (4,))
  k = keys(3)
  first, last = np.array([100, 60, 0]), np.array([1, 21, 1])
  step = editing.between(samplers.ancestral, jnp.array(first), jnp.array(last))
  x_0, *_ = samplers.sample(step, S, net, k, x)
  for i in (0, 1):
    alone, *_ = samplers.sample(
      *(samplers.ancestral, S, net, k[i : i + 1], x[i : i + 1]),
      times=range(first[i], last[i] - 1, -1),
    )
    np.testing.assert_allclose(x_0[i], alone[0], atol=1e-5)
  np.testing.assert_array_equal(x_0[2], x[2])


def test_samples_that_share_all_are_equal_and_that_share_nothing_differ(
  trained,
):
  drawn = pictures.shared(trained(), count=3)
  assert drawn.labels[0] == 't = 1000'
  assert drawn.labels[-1] == 't = 0'
  first, *_, last = drawn.tiles
  for k in range(1, 4):
    np.testing.assert_array_equal(last[k], last[0])
    assert all(np.any(first[k] != other) for other in first[:k])
  # Of the same chain as sample 0 of --mode=sample.
  draw = sample.sampler(trained().config, trained().mesh, 1, 0)
  alone, _ = sample.gather(draw(trained().params))
  np.testing.assert_allclose(last[0], alone[0], atol=1)


def test_a_figure_is_the_same_on_one_device_eight_and_pmap(trained):
  one, *others = (
    pictures.shared(trained(**how), count=2).tiles.astype(int)
    for how in (
      {'parallel__data': '1'},
      {'parallel__data': '8'},
      {'parallel__engine': 'pmap'},
    )
  )
  for other in others:
    # A rounding may lie on either side of a gray's edge.
    assert np.abs(other - one).max() <= 1


def test_greedy_is_the_mean_and_adds_no_noise():
  x_T = process.normal(keys(5, 1), (4,))
  net = gaussian.model_fn(S, 0.4, 0.3)

  def draw(step, seed):
    return samplers.sample(step, S, net, keys(5, seed), x_T)[0]

  one, two = (draw(samplers.greedy, seed) for seed in (0, 1))
  np.testing.assert_array_equal(one, two)
  assert np.all(draw(samplers.ancestral, 0) != draw(samplers.ancestral, 1))
  x_prev, x0_hat = samplers.greedy(S, net, keys(5), x_T, 7)
  mean, _, x0 = process.p_mean_variance(
    S, net(x_T, jnp.full(5, 7)), x_T, jnp.array(7)
  )
  np.testing.assert_array_equal(x_prev, mean)
  np.testing.assert_array_equal(x0_hat, x0)


def test_greedy_and_random_begin_with_the_same_noise(trained):
  run = trained()
  drawn = pictures.generation(run, count=3)
  x_T, greedy, *random = drawn.tiles
  assert drawn.tiles.shape == (5, 3, 8, 8, 1)
  draws = [greedy, *random, x_T]
  for i, row in enumerate(draws):
    assert all(np.any(row != other) for other in draws[:i])
  changed = trained(sampler__name='greedy')
  draw = sample.sampler(changed.config, changed.mesh, 3, 0)
  alone, _ = sample.gather(draw(changed.params))
  np.testing.assert_allclose(greedy, alone, atol=1)


def test_the_last_prediction_is_the_sample(trained):
  run = trained()
  drawn = pictures.progressive(run, count=2)
  assert drawn.titles == [f't = {t}' for t in range(1000, 0, -100)]
  alone, _ = sample.gather(
    sample.sampler(run.config, run.mesh, 2, 0)(run.params)
  )
  np.testing.assert_array_equal(drawn.tiles[:, -1], alone)


def test_rate_grows_and_ends_where_evaluate_says(trained, monkeypatch, capsys):
  bounds, progress = [], curves.progress
  monkeypatch.setattr(
    curves, 'progress', lambda bound: bounds.append(bound) or progress(bound)
  )
  curves.rate_distortion(trained(evaluate__draws='3'), count=11)
  (bound,) = bounds
  assert bound.t.shape == (11, 1000)  # exact, whatever evaluate would do
  rate, rmse = progress(bound)
  result = bound_job.summary(bound, 1000)
  assert np.all(np.diff(rate) >= 0)
  assert rate[-1] == pytest.approx(result['rate'], rel=1e-9)
  assert rmse[-1] == pytest.approx(result['rmse'], rel=1e-9)
  assert rate[0] == pytest.approx(result['L_T'], rel=1e-9)
  _, *lines, last = capsys.readouterr().out.splitlines()
  rows = np.array([line.split() for line in lines], float)
  assert rows[:, 0].tolist() == list(range(1000, 0, -100))
  expected = np.stack([rate, rmse], axis=1)[999::-100]
  np.testing.assert_allclose(rows[:, 1:], expected, atol=1e-5)  # 5 places
  assert '11 images' in last


def test_rate_is_what_has_been_told_before():
  """T = 3: x_3 costs L_T; x_2 its L_2 more, of slot 2; x_1 L_1, of slot 1."""
  terms = np.array([[100.0, 2.0, 1.0]])
  bound = likelihood.Bound(
    np.array([0.5]), np.array([[1, 2, 3]]), terms, np.array([[1.0, 4.0, 9.0]])
  )
  rate, rmse = curves.progress(bound)
  np.testing.assert_allclose(rate, np.array([0.5, 1.5, 3.5]) / np.log(2))
  np.testing.assert_allclose(rmse, 127.5 * np.array([3, 2, 1]))


@pytest.mark.parametrize('flip', [False, True])
def test_the_nearest_of_all_are_found_over_chunks(flip):
  rng = np.random.default_rng(0)
  data = rng.integers(0, 256, (2100, 4, 4, 3), dtype=np.uint8)
  source = store.from_arrays(data, np.zeros(2100, np.int32))
  drawn = data[[3, 2050]][:, :, ::-1]  # mirrored
  near, squares = pictures.neighbours(drawn, source, 3, flip)
  every = np.concatenate([data, data[:, :, ::-1]]) if flip else data
  gaps = (every.astype(int) - drawn[:, None].astype(int)) ** 2
  expected = np.sort(gaps.sum((2, 3, 4)), axis=1)[:, :3]
  np.testing.assert_array_equal(squares, expected)
  gaps = (near.astype(int) - drawn[:, None].astype(int)) ** 2
  np.testing.assert_array_equal(gaps.sum((2, 3, 4)), expected)
  assert (expected[:, 0] == 0).all() == flip


def test_the_schedule_of_the_run_is_marked_and_equal_ones_are_one(trained):
  drawn = pictures.schedules(trained())
  marked = [label for label in drawn.labels if '▸' in label]
  assert marked == ['▸ linear, sqrt_linear']
  assert sum('quad' in label for label in drawn.labels) == 1
  assert len(drawn.tiles) == len(drawn.labels)
  first = drawn.tiles[:, 0]
  np.testing.assert_array_equal(first, np.stack([first[0]] * len(first)))


@pytest.mark.parametrize('channels', [1, 3])
def test_words_leave_every_pixel_as_it_is(channels):
  rng = np.random.default_rng(0)
  tiles = rng.integers(0, 256, (2, 3, 64, 48, channels), dtype=np.uint8)
  plain = images.grid(tiles.reshape(6, 64, 48, channels), 3, width=450)
  worded = images.labelled(tiles, ['a', 'b', 'c'], ['one', 'two'], 'head')
  height, width = plain.shape[:2]
  left, bottom = worded.shape[1] - width - 12, worded.shape[0] - 12
  np.testing.assert_array_equal(
    worded[bottom - height : bottom, left : left + width],
    np.broadcast_to(plain, (height, width, 3)),
  )
  assert worded[: bottom - height].min() < 128  # the words
  assert worded[:, :left].min() < 128


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ([], 'forward, generation, gradients'),
    (['--figure=foward'], "did you mean 'forward'"),
    (['--figure=named'], 'unknown figure'),
    (['--figure=forward', '--num_samples=0'], 'at least 1'),
    (['--figure=schedules', '--num_samples=3'], '--num_samples'),
    (['--figure=forward', '--output=here'], r'\.png'),
    (['--figure=forward', '--mode=sample'], '--mode=figures'),
    (['--figure=interpolation', '--num_samples=1000'], '1000 pairs'),
    (['--figure=gradients', '--num_samples=1'], '2 or more'),
    (['--figure=quality', '--num_samples=1'], '2 or more'),
  ],
)
def test_mistakes_are_one_line(args, message, tiny_run):
  args = ['--mode=figures', f'--workdir={tiny_run[0]}', *args]
  with pytest.raises(errors.UserError, match=message) as e:
    main.run(args)
  assert '\n' not in str(e.value)


def test_points_have_no_figures(tiny_run):
  config = recipe.resolve('configs/swiss_roll.py', None, {})
  args = main.parser().parse_args(
    ['--figure=forward', f'--workdir={tiny_run[0]}']
  )
  with pytest.raises(errors.UserError, match='points'):
    figures.run(config, args)
