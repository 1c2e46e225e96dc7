"""Editing: what is known stays, what is made anew fits, and files that do not
fit are refused.
"""

import json

import gaussian
import jax
import jax.numpy as jnp
import jitted
import numpy as np
import pytest
import tiny
from PIL import Image

from configs import base
from ddpm_jax import build
from ddpm_jax import edits
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import pretrained
from ddpm_jax import recipe
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings
from ddpm_jax.jobs import edit

T = 100
S = schedules.linear(T, 1e-3, 0.2)


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def step(name='ancestral', **fields):
  return jitted.reading(getattr(samplers, name), clip=False, **fields)


def test_q_between_is_q_from_0_and_one_step_from_t_minus_1():
  x, eps = process.normal(keys(2), (5,))
  at = jnp.array
  for t in (1, 2, 50, T):
    np.testing.assert_allclose(
      process.q_between(S, x, at(0), at(t), eps),
      process.q_sample(S, x, at(t), eps),
      atol=1e-5,  # √ of 1 - ᾱ_1, which is 1e-3, in float32
    )
    np.testing.assert_allclose(
      process.q_between(S, x, at(t - 1), at(t), eps),
      process.q_step(S, x, at(t), eps),
      atol=1e-5,
    )
    np.testing.assert_array_equal(process.q_between(S, x, at(t), at(t), eps), x)


def test_jumps_are_in_the_order_of_RePaint():
  """Its figure 9: the first descent once, no jump from the clean image."""
  assert editing.jumps(5, 2, 2) == [5, 4, 5, 4, 3, 2, 3, 2, 1]
  assert editing.jumps(5, 2, 1) == [5, 4, 3, 2, 1]
  times = editing.jumps(250, 10, 10)
  assert len(times) == 2410
  assert times[:20] == [*range(250, 231, -1), 241]
  counts = [times.count(t) for t in (250, 242, 241, 232, 11, 2, 1)]
  assert counts == [1, 1, 10, 10, 10, 10, 1]


def test_a_jump_of_all_steps_or_more_is_no_jump():
  assert editing.jumps(5, 5, 9) == [5, 4, 3, 2, 1]
  with pytest.raises(ValueError, match='at least 1'):
    editing.jumps(5, 0, 1)


@pytest.mark.parametrize('name', ['ancestral', 'ddim', 'dpm_solver_pp_2m'])
def test_what_is_known_comes_back_exactly(name):
  grays = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16, 1)
  mask = jnp.arange(16)[:, None] % 3 == 0
  net = gaussian.network(S, 0.4, 0.3)
  x_T = process.normal(keys(2, 1), (16, 16, 1))
  inpaint = editing.inpaint(step(name), pixels.to_float(grays), mask[..., None])
  times = tuple(editing.jumps(T, 20, 2))
  x_0 = jitted.sample(inpaint, S, net, keys(2), x_T, times=times).x_0
  known = np.broadcast_to(~mask[..., None], grays.shape)
  for image in np.asarray(pixels.to_uint8(x_0)):
    np.testing.assert_array_equal(image[known], np.asarray(grays)[known])
    assert np.mean(image[~known] != np.asarray(grays)[~known]) > 0.9


def test_with_nothing_known_and_no_jumps_it_is_the_sampler():
  net = gaussian.network(S, 0.4, 0.3)
  x_T = process.normal(keys(3, 1), (4,))
  all_anew = editing.inpaint(step('ddim'), jnp.zeros(4), jnp.ones(4, bool))
  one, other = (
    jitted.sample(way, S, net, keys(3), x_T).x_0
    for way in (all_anew, step('ddim'))
  )
  np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_way_up_and_down_again_leaves_the_data_as_they_are():
  """With the exact ε: jumps neither add to the noise nor take from it."""
  N = 1000
  net = gaussian.network(S, 0.0, 1.0)
  x_T = process.normal(keys(N, 1), (1,))
  all_anew = editing.inpaint(step(), jnp.zeros(1), jnp.ones(1, bool))
  times = tuple(t for t in editing.jumps(T, 25, 3) if t > 1)
  x = jitted.sample(all_anew, S, net, keys(N), x_T, times=times).x_0
  # All x_t are N(0, 1), by σ² = β; five standard errors.
  assert abs(float(x.mean())) < 5 / np.sqrt(N)
  assert abs(float(x.var()) - 1) < 5 * np.sqrt(2 / N)
  # Of another visit there is other noise: a part done twice is not undone.
  times = range(T, 1, -1)
  once = jitted.sample(all_anew, S, net, keys(N), x_T, times=times).x_0
  assert np.mean(np.asarray(x) != np.asarray(once)) > 0.99


def pair(rho):
  """E[ε | x_t] of two pixels with correlation ρ, N(0, 1) each."""

  def eps_hat(x_t, t):
    a, n = S.alpha_bar[t][:, None], S.one_minus_alpha_bar[t][:, None]
    # x_t has the covariance [[1, q], [q, 1]].
    q = a * rho
    return jnp.sqrt(n) * (x_t - q * x_t[:, ::-1]) / (1 - q**2)

  return eps_hat


def test_resampling_makes_the_new_fit_the_known():
  """x_2 given x_1 = 1.5 has the mean 1.5 ρ: more nearly with more visits."""
  N, rho = 200, 0.9
  known, mask = jnp.array([1.5, 0.0]), jnp.array([False, True])
  x_T = process.normal(keys(N, 1), (2,))
  inpaint = editing.inpaint(step(), known, mask)
  off = {}
  for resample in (1, 5):
    times = tuple(editing.jumps(T, 10, resample))
    net = pair(rho)
    x_0 = jitted.sample(inpaint, S, net, keys(N), x_T, times=times).x_0
    np.testing.assert_array_equal(x_0[:, 0], 1.5)
    off[resample] = abs(float(x_0[:, 1].mean()) - 1.5 * rho)
  assert off[5] < off[1] / 2
  assert off[5] < 0.15


@pytest.fixture
def files(tmp_path):
  """A digit, another, and a mask of its right half: paths and arrays."""
  from sklearn import datasets

  digits = datasets.load_digits().images[[3, 8]] * 15.9
  mask = np.zeros((8, 8))
  mask[:, 4:] = 255
  found = {}
  for name, x in zip(('image', 'to', 'mask'), [*digits, mask], strict=True):
    found[name] = tmp_path / f'{name}.png', x.astype(np.uint8)
    Image.fromarray(found[name][1]).save(found[name][0])
  return found


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of a network that compiles at once."""
  c = tiny.config()
  folder = tmp_path_factory.mktemp('edit') / 'run'
  pretrained.save(c, build.mesh(c), tiny.weights_of(c), folder)
  return folder


@pytest.fixture
def edited(workdir, tmp_path):
  def edited(*args):
    output = tmp_path / 'out.npz'
    flags = ['--mode=edit', f'--workdir={workdir}', f'--output={output}']
    main.run([*flags, '--num_samples=5', *map(str, args)])
    with np.load(output) as file:
      return file['images'][..., 0].astype(int)

  return edited


def test_a_part_is_made_anew_and_the_rest_is_kept(files, edited, capsys):
  (image, x0), (mask, anew) = files['image'], files['mask']
  small = '--config.edit.jump=5', '--config.edit.resample=2'
  drawn = edited(f'--image={image}', f'--mask={mask}', *small)
  np.testing.assert_array_equal(
    drawn[:, anew == 0], np.broadcast_to(x0[anew == 0], (5, 32))
  )
  assert len({x.tobytes() for x in drawn}) == 5
  # It takes 10 steps, of which 6, 5, 4, 3, 2 are taken again.
  assert 'drawing 32 of 64 pixels, in 15 steps' in capsys.readouterr().err


def test_a_variation_is_nearer_to_the_image_the_less_noisy_it_was(
  files, edited
):
  image, x0 = files['image']

  def off(strength):
    drawn = edited(f'--image={image}', f'--strength={strength}')
    return np.abs(drawn - x0).mean()

  low, high = off(0.1), off(1.0)
  assert low < high / 2


def test_one_image_turns_into_another(files, edited):
  (image, x0), (to, other) = files['image'], files['to']
  steps = '--config.sampler.steps=50'
  drawn = edited(f'--image={image}', f'--to={to}', '--strength=0.02', steps)
  first, *_, last = drawn
  assert np.abs(first - x0).mean() < np.abs(first - other).mean() / 2
  assert np.abs(last - other).mean() < np.abs(last - x0).mean() / 2
  # Half-way it is as far from both.
  far = [np.abs(x - x0).mean() for x in drawn]
  assert far == sorted(far)


def test_an_inverted_image_comes_back(files, edited, tmp_path, capsys):
  """To order 1 in the step: with a network that changes little over one."""
  c, calm = tiny.config(), tmp_path / 'calm'
  weights = jax.tree.map(lambda x: 0.1 * x, tiny.weights_of(c))
  pretrained.save(c, build.mesh(c), weights, calm)
  (image, x0), (to, other) = files['image'], files['to']
  flags = '--invert', '--config.sampler.steps=50', f'--workdir={calm}'
  drawn = edited(f'--image={image}', *flags)
  assert np.abs(drawn - x0).mean() < 6
  assert np.ptp(drawn, axis=0).max() == 0  # the seed does not matter
  assert 'inverting the image to x_T' in capsys.readouterr().err
  first, *_, last = edited(f'--image={image}', f'--to={to}', *flags)
  assert np.abs(first - x0).mean() < 6
  assert np.abs(last - other).mean() < 6


def test_a_point_between_two_x_T_is_as_long_as_they_are():
  a, b = process.normal(keys(2), (500,))
  for weight, want in ((0.0, a), (1.0, b)):
    found = editing.slerp(a, b, jnp.array(weight))
    np.testing.assert_allclose(found, want, atol=1e-5)
  middle = jnp.linalg.norm(editing.slerp(a, b, jnp.array(0.5)))
  # Two normal vectors of 500 dimensions are as long to some percent.
  np.testing.assert_allclose(middle, jnp.linalg.norm(a), rtol=0.1)
  mean = jnp.linalg.norm((a + b) / 2)  # what the straight line gives
  assert mean < 0.8 * middle


def test_other_sizes_are_resized_and_said(files, edited, capsys, tmp_path):
  image, mask = files['image'][0], files['mask'][0]
  for path in (image, mask):
    with Image.open(path) as file:
      file.resize((40, 24), Image.Resampling.NEAREST).convert('RGB').save(path)
  drawn = edited(f'--image={image}', f'--mask={mask}')
  assert '40x24: resized (shorter side, bicubic) and cut to 8x8' in (
    capsys.readouterr().err
  )
  known = drawn[:, :, :2]  # well away from the mask's resized edge
  np.testing.assert_array_equal(known, np.broadcast_to(known[0], known.shape))


def test_edits_are_told_apart(tiny_run, tmp_path):
  """By the names of their folders, and by what stands beside the images."""
  config = recipe.resolve(None, tiny_run[0], {})
  names, told = set(), []
  for flags in (
    ['--image=a.png'],
    ['--image=a.png', '--strength=0.3'],
    ['--image=b.png'],
    ['--image=a.png', '--to=b.png'],
    ['--image=a.png', '--mask=b.png'],
    ['--image=a.png', '--invert'],
    ['--image=a.png', '--to=b.png', '--invert'],
  ):
    args = command.parse(
      ['--mode=edit', f'--workdir={tiny_run[0]}', '--num_samples=3', *flags]
    )
    asked = edit.request(args)
    names.add(asked.name)
    told.append(asked.about(config, args.num_samples))
  assert len(names) == len({json.dumps(x) for x in told}) == 7
  assert told[0]['strength'] == 0.5
  assert told[3]['order'] == 'image i has λ = i / 2'
  assert told[4]['edit'] == {'jump': 10, 'resample': 10}


@pytest.mark.parametrize(
  'spacing', [getattr(spacings, name) for name in spacings.__all__]
)
def test_levels_are_shares_of_T_whatever_the_spacing(spacing):
  config = base.get_config()
  short = schedules.stride(schedules.linear(1000), 100, spacing)
  times = np.asarray(short.time)
  for strength in (0.01, 0.3, 0.75, 1.0):
    t, told = edits.level(config, short, strength)
    assert times[t] == told >= min(1000 * strength, times[-1])
    assert times[t - 1] < 1000 * strength


def test_mistakes_are_a_line(files, tiny_run, tmp_path):
  image, mask = files['image'][0], files['mask'][0]
  white, odd = tmp_path / 'white.png', tmp_path / 'odd.png'
  Image.new('L', (8, 8), 255).save(white)
  Image.new('L', (9, 8), 255).save(odd)
  text = tmp_path / 'text.png'
  text.write_text('no image')
  given = f'--image={image}'
  for args, message in (
    ([], 'name an --image'),
    ([f'--image={text}'], '--image=.*cannot be read'),
    ([f'--image={tmp_path / "none.png"}'], 'No such file'),
    ([given, f'--to={text}'], '--to=.*cannot be read'),
    ([given, f'--mask={mask}', f'--to={image}'], 'one of them'),
    ([given, f'--mask={mask}', '--strength=0.5'], 'not for --mask'),
    ([given, f'--mask={odd}'], 'is 9x8, and .* 8x8: they must be of one size'),
    ([given, f'--mask={white}'], 'all white'),
    ([given, '--strength=0'], 'above 0 and at most 1'),
    ([given, '--strength=1.5'], 'above 0 and at most 1'),
    ([given, f'--to={image}', '--num_samples=1'], '2 or more'),
    ([given, f'--to={image}', '--num_samples=1', '--invert'], '2 or more'),
    ([given, f'--mask={mask}', '--invert'], '--invert and --mask'),
    ([given, '--strength=0.5', '--invert'], '--invert and --strength'),
    ([given, '--invert', '--config.sampler.name=heun'], 'is for DDIM'),
    (
      [given, f'--mask={mask}', '--config.edit.resample=0'],
      'resample=0 must be at least 1',
    ),
  ):
    with pytest.raises(errors.UserError, match=message) as caught:
      main.run(['--mode=edit', f'--workdir={tiny_run[0]}', *args])
    assert '\n' not in str(caught.value)
  for flag in (given, f'--mask={mask}', f'--to={image}', '--strength=0.5'):
    with pytest.raises(errors.UserError, match='is for --mode=edit'):
      main.run(['--mode=sample', f'--workdir={tiny_run[0]}', flag])
