"""`--mode=figures`: pictures of what they say they are of."""

import functools
import shutil

import gaussian
import jax
import jax.numpy as jnp
import jitted
import numpy as np
import pytest
import tiny
from PIL import Image

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import plots
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import sampling
from ddpm_jax.compression import transmission
from ddpm_jax.data import store
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.evaluation import bound as bound_job
from ddpm_jax.jobs import figures
from ddpm_jax.metrics import classifier
from ddpm_jax.metrics import classifier_score
from ddpm_jax.metrics import distances
from ddpm_jax.storage import images
from ddpm_jax.study import common
from ddpm_jax.study import compression
from ddpm_jax.study import curves
from ddpm_jax.study import pictures

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
T = 100
S = schedules.linear(T, 1e-3, 0.2)


@pytest.fixture
def trained(tmp_path):
  """A run, as a figure gets it, with changes to its recipe."""

  def trained(seed=0, **changes):
    config = tiny.config(**changes)
    engine, params = build.engine(config), tiny.weights()
    return runs.Run(tmp_path, config, engine, 'EMA', 0, params, seed)

  return trained


@pytest.fixture
def plotted(monkeypatch):
  """The panels of the plots that are made."""
  panels, plot = [], plots.plot
  monkeypatch.setattr(
    plots, 'plot', lambda x, *bold: panels.extend(x) or plot(x, *bold)
  )
  return panels


def samples(run, count):
  """Those of --mode=sample."""
  drawn, _ = drawing.gather(
    drawing.sampler(run.config, run.engine, count)(run.params, seed=run.seed)
  )
  return drawn


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def test_these_are_all_figures():
  assert set(figures.every()) == set(NAMES)


def of_run(workdir):
  """The run, as --mode=figures gets it."""
  config = recipe.resolve(None, workdir, {'parallel.data': '1'})
  return runs.load(config, workdir)


def test_a_figure_that_moves_is_written_as_it_was_drawn(tiny_run, tmp_path):
  args = ['--mode=figures', f'--workdir={tiny_run[0]}']
  args += ['--figure=progressive', '--num_samples=3']
  path = tmp_path / 'new' / 'a.png'
  main.run([*args, '--config.parallel.data=1', f'--output={path}'])
  drawn = pictures.progressive(of_run(tiny_run[0]), count=3)
  assert drawn.tiles.shape == (3, 10, 8, 8, 1)
  made = sorted(p.name for p in path.parent.iterdir())
  assert made == ['a.gif', 'a.png']
  with Image.open(path) as file:
    assert file.format == 'PNG'
    whole = plots.labelled(drawn.tiles, drawn.titles, drawn.labels)
    np.testing.assert_array_equal(file, whole)
  with Image.open(path.with_suffix('.gif')) as file:
    assert file.n_frames == len(drawn.frames) == 10
    for k in (0, 5, 9):
      file.seek(k)
      frame = plots.labelled(drawn.frames[k], head=drawn.heads[k])
      # All is gray, and a GIF has 256 colours.
      np.testing.assert_array_equal(file.convert('RGB'), frame)


def test_a_figure_with_a_plot_is_put_into_the_workdir(tiny_run, tmp_path):
  workdir = shutil.copytree(tiny_run[0], tmp_path / 'run')
  main.run(['--mode=figures', '--figure=schedules', f'--workdir={workdir}'])
  drawn = pictures.schedules(of_run(workdir))
  tiles = plots.labelled(drawn.tiles, drawn.titles, drawn.labels)
  with Image.open(workdir / 'figure_schedules.png') as file:
    np.testing.assert_array_equal(file, plots.stack([drawn.plot, tiles]))
  assert len(list(workdir.glob('figure_*'))) == 1


def test_the_forward_process_begins_with_the_image_and_stands_at_its_times(
  trained,
):
  run = trained()
  drawn = pictures.forward(run, count=3)
  x0 = common.real(run.config, 0, 3)
  assert drawn.heads == [f't = {t}' for t in range(51)]
  assert drawn.titles == drawn.heads[::5]
  np.testing.assert_array_equal(drawn.frames[0, 0], x0)
  np.testing.assert_array_equal(
    drawn.frames[::5, 0], drawn.tiles.swapaxes(0, 1)
  )
  # Less and less is left of the images.
  gap = [np.abs(x[0].astype(int) - x0).mean() for x in drawn.frames[::10]]
  assert gap == sorted(gap)


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
  p = build.sampler(run.config)
  k, eps = sampling.noise(run.config, 3, jnp.array([1]))
  first = 2  # ⌈10/8⌉ of 10 steps
  x_t = process.q_sample(p.schedule, a[1] / 127.5 - 1, first, eps[0])
  draw = functools.partial(samplers.sample, times=range(first, 0, -1))
  denoiser = p.denoiser(run.params)
  x_0, *_ = jax.jit(functools.partial(draw, p.step, denoiser))(k, x_t[None])
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
  net = gaussian.network(S, 0.4, 0.3)
  x = process.normal(keys(3, 1), (4,))
  k = keys(3)
  first, last = np.array([100, 60, 0]), np.array([1, 21, 1])
  step = editing.between(samplers.ancestral, jnp.array(first), jnp.array(last))
  x_0, *_ = jitted.sample(step, S, net, k, x)
  for i in (0, 1):
    alone, *_ = jitted.sample(
      *(samplers.ancestral, S, net, k[i : i + 1], x[i : i + 1]),
      times=range(first[i], last[i] - 1, -1),
    )
    np.testing.assert_allclose(x_0[i], alone[0], atol=1e-5)
  np.testing.assert_array_equal(x_0[2], x[2])


def test_samples_that_share_all_are_equal_and_that_share_nothing_differ(
  trained,
):
  drawn = pictures.shared(trained(), count=3)
  assert drawn.labels[0] == 't = 50'
  assert drawn.labels[-1] == 't = 0'
  first, *_, last = drawn.tiles
  for k in range(1, 4):
    np.testing.assert_array_equal(last[k], last[0])
    assert all(np.any(first[k] != other) for other in first[:k])
  # Of the same chain as sample 0 of --mode=sample.
  np.testing.assert_allclose(last[0], samples(trained(), 1)[0], atol=1)


def test_greedy_is_the_mean_and_adds_no_noise():
  x_T = process.normal(keys(5, 1), (4,))
  net = gaussian.network(S, 0.4, 0.3)

  def draw(step, seed):
    return jitted.sample(step, S, net, keys(5, seed), x_T)[0]

  one, two = (draw(samplers.greedy, seed) for seed in (0, 1))
  np.testing.assert_array_equal(one, two)
  assert np.all(draw(samplers.ancestral, 0) != draw(samplers.ancestral, 1))
  denoiser = denoisers.Denoiser(S, net)
  x_prev, x0_hat = samplers.greedy(denoiser, keys(5), x_T, 7)
  mean, _, x0 = denoisers.p_mean_variance(denoiser, x_T, 7)
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
  alone = samples(trained(sampler__name='greedy'), 3)
  np.testing.assert_allclose(greedy, alone, atol=1)


def test_the_last_prediction_is_the_sample(trained):
  run = trained()
  drawn = pictures.progressive(run, count=2)
  assert drawn.titles == [f't = {t}' for t in range(50, 0, -5)]
  np.testing.assert_array_equal(drawn.tiles[:, -1], samples(run, 2))


def test_the_nearest_stand_beside_a_sample_with_the_distance(trained):
  run = trained()
  drawn = pictures.nearest(run, count=3)
  alone = samples(run, 3)
  np.testing.assert_array_equal(drawn.tiles[:, 0], alone)
  data = dataset.source(run.config).gather(np.arange(1797))['image']
  data = np.concatenate([data, data[:, :, ::-1]]).astype(float)
  mse = [np.square(data - x).mean((1, 2, 3)).min() for x in alone]
  assert drawn.labels == [f'RMSE {x:.1f}' for x in np.sqrt(mse)]


def test_the_last_of_quality_is_that_of_the_samples(trained, plotted):
  run = trained()
  data = dataset.source(run.config).gather(np.arange(1797))
  judge = classifier.train(data['image'], data['label'], 10, steps=20)
  classifier.save(run.workdir / 'classifier.npz', judge)
  curves.quality(run, count=20)
  (step, frechet), (_, sure) = (panel.curves[''] for panel in plotted)
  assert step.tolist() == list(range(1, 51, 5))
  real, fake = (
    classifier.features_and_probabilities(judge, x)
    for x in (data['image'], samples(run, 20))
  )
  expected = distances.frechet(
    *distances.moments(real[0]), *distances.moments(fake[0])
  )
  assert frechet[-1] == pytest.approx(expected, rel=1e-6)
  assert sure[-1] == np.mean(fake[1].max(1) > classifier_score.SURE)


def test_one_noise_varies_less_than_two_but_at_t_1(trained, plotted, capsys):
  curves.gradients(trained(), count=64)
  times, ratio = plotted[1].curves['']
  assert times[[0, 1, -1]].tolist() == [1, 2, 50]
  # At t = 1 there is one noise in both: equal but for the 64 draws.
  assert 0.6 < ratio[0] < 1.7
  assert np.all(ratio[2:] > 1)
  last = capsys.readouterr().out.splitlines()[-1].split()
  assert [float(x) for x in last[::3]] == pytest.approx(
    [50, ratio[-1]], rel=1e-3
  )


def test_two_terms_have_the_mean_of_three_and_more_noise(
  trained, plotted, capsys
):
  curves.two_term(trained(), count=4)
  rows = [x.split() for x in capsys.readouterr().out.splitlines()[1:3]]
  mean, error = np.array([(row[2], row[4]) for row in rows], float).T
  assert abs(mean[0] - mean[1]) < 5 * np.hypot(*error)
  (t, three), (_, two) = plotted[0].curves.values()
  assert t.tolist() == list(range(1, 51))
  assert two.mean() > 1.5 * three.mean()


def test_the_codec_sends_the_very_images_that_it_shows(
  trained, plotted, capsys
):
  options = dict(codec__steps='5', codec__log2_candidates='8')
  run = trained(**options)
  compression.codec(run, count=3)
  assert 'to decode, equal to the sender' in capsys.readouterr().out
  bits, rmse = plotted[0].curves['codec, without header']
  assert len(plotted[1].curves['code'][0]) == len(rmse) == 6
  x0 = common.real(run.config, 0, 3)
  sent = transmission.send(run.config, run.params, x0, 0)
  error = np.square(sent.shown.astype(float) - x0).mean((1, 2, 3, 4))
  np.testing.assert_allclose(rmse, np.sqrt(error), rtol=1e-5)
  assert bits[-1] == pytest.approx(sent.bits.sum() / x0.size)


def test_higher_quality_takes_more_bits_and_is_nearer():
  x0 = common.real(tiny.config(), 0, 8)
  for form in ('JPEG', 'WEBP'):
    whole, inner, rmse = compression.by_quality(x0, form)
    assert np.all(whole > inner)
    assert inner[-1] > 2 * inner[0] > 0
    assert rmse[-1] < rmse[0] / 2


def test_rate_grows_and_ends_where_evaluate_says(trained, monkeypatch, capsys):
  bounds, progress = [], curves.progress
  monkeypatch.setattr(
    curves, 'progress', lambda bound: bounds.append(bound) or progress(bound)
  )
  curves.rate_distortion(trained(evaluate__draws='3'), count=11)
  (bound,) = bounds
  assert bound.t.shape == (11, 50)  # exact, whatever evaluate would do
  rate, rmse = progress(bound)
  result = bound_job.summary(bound, 50)
  assert np.all(np.diff(rate) >= 0)
  assert rate[-1] == pytest.approx(result['rate'], rel=1e-9)
  assert rmse[-1] == pytest.approx(result['rmse'], rel=1e-9)
  assert rate[0] == pytest.approx(result['L_T'], rel=1e-9)
  _, *lines, last = capsys.readouterr().out.splitlines()
  rows = np.array([line.split() for line in lines], float)
  assert rows[:, 0].tolist() == list(range(50, 0, -5))
  expected = np.stack([rate, rmse], axis=1)[49::-5]
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
  worded = plots.labelled(tiles, ['a', 'b', 'c'], ['one', 'two'], 'head')
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
  ],
)
def test_mistakes_are_one_line(args, message, tiny_run):
  args = ['--mode=figures', f'--workdir={tiny_run[0]}', *args]
  with pytest.raises(errors.UserError, match=message) as e:
    main.run(args)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('figure', [curves.gradients, curves.quality])
def test_figures_of_variances_need_two_images(trained, figure):
  with pytest.raises(errors.UserError, match='2 or more'):
    figure(trained(), count=1)


def test_points_have_no_figures(tiny_run):
  config = recipe.resolve('configs/swiss_roll.py', None, {})
  args = command.parse(
    ['--mode=figures', '--figure=forward', f'--workdir={tiny_run[0]}']
  )
  with pytest.raises(errors.UserError, match='points'):
    figures.run(config, args)
