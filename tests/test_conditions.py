"""Classes and texts: where they come from, what is made of them."""

import functools
import json
import pathlib

import conftest
import gaussian
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets
import tiny
from PIL import Image

from configs import digits
from configs import digits_text
from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import plots
from ddpm_jax import pretrained
from ddpm_jax import previews
from ddpm_jax import recipe
from ddpm_jax import samples
from ddpm_jax import sampling
from ddpm_jax import validate
from ddpm_jax.data import captions
from ddpm_jax.data import sources
from ddpm_jax.data import store
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import guidance
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.models import condition
from ddpm_jax.models import networks
from ddpm_jax.storage import images

TEXT = str(pathlib.Path(digits_text.__file__))


def config(module=digits_text, **changes):
  c = module.get_config()
  c.model.update(channels=8, multipliers=(1,), groups=4, attention=())
  c.batch_size, c.sampler.steps = 32, 4
  if c.condition.name:
    c.condition.update(width=8, depth=1)
  recipe.override(c, {k.replace('__', '.'): str(v) for k, v in changes.items()})
  return c


def text(row):
  return bytes(row[row > 0]).decode()


def test_tokens_are_the_bytes_of_a_text():
  rows = captions.tokens(['a seven', ' naïve ☂ ', ''], 16)
  assert rows.dtype == np.uint8
  assert [text(row) for row in rows] == ['a seven', 'naïve ☂', '']


@pytest.mark.parametrize('bad', ['x' * 17, 'é' * 9, 'a\0b'])
def test_a_text_that_does_not_fit_is_refused(bad):
  with pytest.raises(errors.UserError, match='length=16'):
    captions.tokens(['fine', bad], 16)


def test_classes_have_the_captions_of_all_templates():
  got = captions.of_classes(['two', 'eight'], ['{}', 'a {}', 'draw a {} now'])
  assert got == [
    ('two', 'a two', 'draw a two now'),
    ('eight', 'an eight', 'draw an eight now'),
  ]


@pytest.mark.parametrize(
  ('names', 'templates'), [(['a'], ['no place']), ([], ['{}']), (['a'], [])]
)
def test_templates_that_do_not_do_are_refused(names, templates):
  with pytest.raises(errors.UserError, match='templates'):
    captions.of_classes(names, templates)


def folder(path, n=5, broken=()):
  """n images, image i all of gray i."""
  for i in range(n):
    file = path / f'{i}.png'
    Image.fromarray(np.full((4, 4), i, np.uint8)).save(file)
    if i in broken:
      file.write_bytes(b'not an image')
  return path


def jsonl(path, *lines):
  (path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))


def test_captions_of_a_folder_are_in_metadata_or_a_csv(tmp_path):
  folder(tmp_path)
  jsonl(
    tmp_path,
    {'file_name': '0.png', 'text': 'none'},
    {'file_name': '3.png', 'caption': ['three', 'a trio']},
  )
  (tmp_path / 'captions.csv').write_text(
    'file_name,text\n1.png,"one, alone"\n3.png,drei\n'
  )
  got = captions.of_folder(tmp_path, [f'{i}.png' for i in range(5)])
  assert got == [
    ('none',),
    ('one, alone',),
    (),
    ('three', 'a trio', 'drei'),
    (),
  ]


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ({'file_name': '9.png', 'text': 'x'}, r'jsonl:1: no image'),
    ({'file_name': '0.png', 'text': 7}, r'jsonl:1: caption 7'),
    ({'file_name': '0.png', 'text': ['a', 7]}, r'jsonl:1: caption'),
    ({'file_name': '0.png'}, 'no captions'),
  ],
)
def test_bad_captions_are_named_with_their_line(tmp_path, line, message):
  folder(tmp_path)
  jsonl(tmp_path, line)
  with pytest.raises(errors.UserError, match=message):
    captions.of_folder(tmp_path, ['0.png'])


@pytest.mark.parametrize('late', [False, True])
def test_an_image_that_is_left_out_shifts_no_captions(
  tmp_path, monkeypatch, late
):
  if late:
    monkeypatch.setattr(store, 'MEMORY', 0)
  folder(tmp_path, 6, broken=(2,))
  jsonl(
    tmp_path,
    *({'file_name': f'{i}.png', 'text': f'gray {i}'} for i in range(6)),
  )
  source = sources.folder(
    path=str(tmp_path),
    image_size=(4, 4),
    channels=1,
    max_unreadable=1,
    captions='file',
  )
  encode = functools.partial(captions.tokens, length=8)
  source = captions.attach(source, source.captions, 'id', encode)
  batch = source.gather(np.arange(len(source)))
  grays = batch['image'][:, 0, 0, 0]
  assert set(grays) == {0, 1, 3, 4, 5}
  assert [text(x[0]) for x in batch['text']] == [f'gray {i}' for i in grays]


def test_captions_may_be_a_feature_of_a_TFDS_set():
  def tfds(captions, name='oxford_flowers102'):
    with tensorflow_datasets.testing.mock_data(num_examples=3):
      return sources.tfds(
        path='',
        tfds=name,
        split='train',
        image_size=(4, 4),
        channels=3,
        max_unreadable=0,
        captions=captions,
      )

  source = tfds('file_name')
  assert len(source.captions) == 3
  for texts in source.captions:
    assert len(texts) == 1
    assert isinstance(texts[0], str)
    assert texts[0]
  assert tfds('classes').captions == ()
  for wrong in ('nowhere', 'image', 'label', 'file_name/text'):
    with pytest.raises(errors.UserError, match=f'feature {wrong!r}'):
      tfds(wrong)


def test_an_image_without_a_label_has_no_text():
  images = np.zeros((3, 2, 2, 1), np.uint8)
  source = store.from_arrays(images, np.array([1, -1, 0], np.int32))
  encode = functools.partial(captions.tokens, length=8)
  texts = [('zero',), ('one', 'a one')]
  source = captions.attach(source, texts, 'label', encode)
  got = source.gather(np.arange(3))['text']
  assert [[text(x) for x in row] for row in got] == [
    ['one', 'a one'],
    ['', ''],
    ['zero', 'zero'],
  ]


def test_digits_are_told_in_words():
  source = dataset.source(config())
  batch = source.gather(np.arange(50))
  names = config().data.names
  for row, label in zip(batch['text'], batch['label'], strict=True):
    assert text(row[0]) == names[label]
    assert all(names[label] in text(x) for x in row)


def test_some_examples_are_told_nothing_and_the_rest_any_caption():
  c = config(condition__drop=0.2)
  n = 4000
  batch = {'text': np.tile(captions.tokens(['a', 'b', 'c'], 48), (n, 1, 1))}
  keys = jax.random.split(jax.random.key(0), n)
  chosen = jax.jit(functools.partial(build.condition, c))(batch, keys)
  first = np.asarray(chosen)[:, 0]
  counts = [np.sum(first == x) for x in (0, *b'abc')]
  for count, share in zip(
    counts, (0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3), strict=True
  ):
    # Five standard deviations of a binomial count.
    assert abs(count - share * n) < 5 * np.sqrt(n * share * (1 - share))


def test_states_that_are_not_there_are_not_seen():
  net = networks.unet(
    (8, 8),
    1,
    channels=8,
    multipliers=(1,),
    blocks=1,
    attention=(8,),
    groups=4,
    dropout=0.0,
    dtype='float32',
    remat=False,
    patch=1,
  )
  k = jax.random.split(jax.random.key(0), 5)
  x, t = jax.random.normal(k[0], (2, 8, 8, 1)), jnp.array([3, 700])
  states = jax.random.normal(k[1], (2, 5, 12))
  mask = jnp.arange(5)[None] < jnp.array([[2], [4]])
  context = condition.Context(jax.random.normal(k[2], (2, 12)), states, mask)
  params = tiny.drawn(jax.eval_shape(net.init, k[3], x, t, context))
  answer = jax.jit(net.apply)
  want = answer(params, x, t, context)
  noise = jax.random.normal(k[4], states.shape)
  hidden = jnp.where(mask[..., None], states, noise)
  got = answer(params, x, t, context._replace(states=hidden))
  np.testing.assert_allclose(got, want, atol=1e-6)
  seen = jnp.where(mask[..., None], noise, states)
  other = answer(params, x, t, context._replace(states=seen))
  assert jnp.abs(other - want).max() > 1e-3


def test_a_text_is_read_to_its_end_and_no_further():
  encoder, lengths = condition.Text(20, 8, 2), (3, 20, 0)
  tokens = captions.tokens(['x' * n for n in lengths], 20)
  params = jax.jit(encoder.init)(jax.random.key(0), tokens)['params']

  @jax.jit
  def read(places):
    embedded = {'params': {**params, 'Embed_1': {'embedding': places}}}
    context = encoder.apply(embedded, tokens)
    # The sum of a state is 0 after the last norm.
    return context.pooled @ jnp.arange(8.0), context

  places = params['Embed_1']['embedding']
  _, context = read(places)
  assert context.states.shape == (3, 21, 8)
  assert context.mask.sum(1).tolist() == [n + 1 for n in lengths]
  slopes, _ = jax.jit(jax.jacrev(read, has_aux=True))(places)
  for n, slope in zip(lengths, slopes, strict=True):
    assert np.all(slope[n + 1 :] == 0)
    assert np.all(np.abs(slope[: n + 1]).max(1) > 1e-5)


def test_what_a_frozen_encoder_said_is_read_where_there_is_any():
  encoder = condition.Frozen(5, 12, 8)
  k = jax.random.split(jax.random.key(0), 3)
  mask = jnp.arange(5)[None] < jnp.array([[2], [5], [0]])
  states = jax.random.normal(k[0], (3, 5, 12)).astype(jnp.float16)
  given = {'states': states, 'mask': mask}
  params = jax.jit(encoder.init)(k[1], given)
  read = jax.jit(encoder.apply)
  want = read(params, given)
  assert want.mask.sum(1).tolist() == [3, 6, 1]
  noise = jax.random.normal(k[2], states.shape).astype(jnp.float16)
  hidden = jnp.where(mask[..., None], states, noise)
  got = read(params, {'states': hidden, 'mask': mask})
  np.testing.assert_allclose(got.pooled, want.pooled, atol=1e-6)
  nothing = read(params, encoder.nothing(3))
  np.testing.assert_allclose(nothing.pooled[0], want.pooled[2], atol=1e-6)
  assert jnp.abs(want.pooled[0] - want.pooled[2]).max() > 1e-2


def linear(x_t, t, context):
  """A network whose answer depends on everything; its variance too."""
  y = 0.3 * x_t + context[:, None] + 0.01 * t[:, None]
  return jnp.concatenate([y, jnp.cos(y)], axis=-1)


@functools.partial(jax.jit, static_argnames='interval')
def answers(scale, interval=(0.0, 1.0)):
  x = jax.random.normal(jax.random.key(5), (4, 6))
  t = jnp.array([1, 200, 600, 1000])
  given, nothing = jnp.arange(4.0), jnp.zeros(4)
  denoiser = guidance.guided(
    denoisers.Denoiser(schedules.linear(1000), linear),
    *(given, nothing),
    scale=scale,
    interval=interval,
  )
  return denoiser.network(x, t), linear(x, t, given), linear(x, t, nothing)


@pytest.mark.parametrize('w', [0.0, 0.4, 1.0, 3.0])
def test_guidance_goes_from_nothing_through_the_condition_and_on(w):
  got, with_c, without = answers(scale=w)
  want = without + w * (with_c - without)
  np.testing.assert_allclose(got[:, :6], want[:, :6], atol=1e-5)
  # The variance: cos of what may be rounded otherwise in a batch of two halves.
  np.testing.assert_allclose(got[:, 6:], with_c[:, 6:], atol=1e-6)


def test_guidance_outside_its_interval_is_the_condition_alone():
  got, with_c, without = answers(scale=3.0, interval=(0.2, 0.6))
  inside = [1, 2]  # t = 200 and 600 of 1000, both ends included
  want = np.array(with_c[:, :6])
  want[inside] = (without + 3 * (with_c - without))[inside, :6]
  np.testing.assert_allclose(got[:, :6], want, atol=1e-5)


def test_rescaled_guidance_has_the_spread_of_none():
  spread = lambda x: x[:, :6].std(1)  # noqa: E731
  x, t = jax.random.normal(jax.random.key(5), (4, 6)), jnp.full(4, 3)
  net = lambda x, t, c: x * (1 + c[:, None])  # noqa: E731
  denoiser = denoisers.Denoiser(schedules.linear(9), net)
  made = functools.partial(
    guidance.guided, denoiser, jnp.ones(4), jnp.zeros(4), scale=3.0
  )
  want = spread(np.asarray(net(x, t, jnp.ones(4))))
  assert np.all(spread(np.asarray(made().network(x, t))) > 1.5 * want)
  got = spread(np.asarray(made(rescale=1.0).network(x, t)))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('name', ['eps', 'x0', 'v', 'mu'])
def test_guiding_any_prediction_guides_x0_alike(name):
  """x̂_0 is affine in the answer, with the same slope for both halves."""
  s, w, t = schedules.linear(), 2.5, jnp.array([400, 401])
  x_t, x0_c, x0_0 = jax.random.normal(jax.random.key(1), (3, 2, 7))
  predict = getattr(predictions, name)

  def net(x_t, t, x0):
    """The answer that means x0, whatever x_t is."""
    rest = x_t - jnp.sqrt(s.alpha_bar[t])[:, None] * x0
    eps = rest / jnp.sqrt(s.one_minus_alpha_bar[t])[:, None]
    return jax.vmap(predict.target, (None, 0, 0, 0))(s, x0, eps, t)

  @jax.jit
  def guided():
    denoiser = denoisers.Denoiser(s, net, predict, clip=False)
    made = guidance.guided(denoiser, x0_c, x0_0, scale=w)
    return denoisers.x0_hat(made, x_t, t)

  got = guided()
  want = x0_0 + w * (x0_c - x0_0)
  # μ̃ holds 0.005 of x_0 at this t, so that two digits are lost.
  np.testing.assert_allclose(got, want, atol=1e-3 if name == 'mu' else 1e-5)


def test_without_guidance_an_image_is_drawn_as_told():
  """The shortcut for w = 1 is the guided network at w = 1."""
  c, *others = (
    config(model__name='two_convolutions.network', sampler__guidance=w)
    for w in (1, 1 + 1e-6, 0)
  )
  denoiser, *guided = (build.sampler(each).denoiser for each in (c, *others))
  x = jax.random.normal(jax.random.key(3), (2, 8, 8, 1))
  t, told = jnp.array([5, 900]), captions.tokens(['a two', 'zero'], 48)

  @jax.jit
  def answers(params):
    return (
      build.network(c).apply({'params': params}, x, t, told),
      denoiser(params).network(x, t),
      *(f(params, told).network(x, t) for f in (denoiser, *guided)),
    )

  want, nothing, one, near, none = answers(tiny.weights_of(c))
  np.testing.assert_allclose(one, want, atol=1e-5)
  np.testing.assert_allclose(near, want, atol=1e-4)
  np.testing.assert_allclose(none, nothing, atol=1e-5)
  assert jnp.abs(want - nothing).max() > 1e-3


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(condition__name='txt'), "did you mean 'text'"),
    (dict(condition__name='label'), 'condition.classes'),
    (dict(condition__name='label', condition__classes=7), '10 classes'),
    (dict(condition__drop=1), 'drop'),
    (dict(condition__width=6), 'multiple of 4'),
    (dict(condition__length=0), 'length'),
    (dict(condition__name='minilm', condition__length=600), r'in 3\.\.512'),
    (dict(model__channels=6, model__groups=2), 'multiple of 4, the heads'),
    (dict(condition__length=8), 'length=8'),
    (dict(sampler__guidance=-1), 'guidance'),
    (dict(condition__drop=0.0, sampler__guidance=2.0), 'drop=0.1'),
    (dict(sampler__guidance_interval=(0.9, 0.1)), 'interval'),
    (dict(sampler__guidance_rescale=2), 'rescale'),
    (dict(condition__name=''), 'needs a network with a condition'),
    (dict(data__captions='file'), 'needs captions'),
    (dict(data__names=('a', 'b')), '2 names for the 10'),
    (dict(data__templates=('a digit',)), 'needs {} once'),
  ],
)
def test_a_condition_that_cannot_be_is_a_line_for_the_user(changes, message):
  def begin():
    c = config(**changes)
    validate.check(c)
    build.network(c)
    dataset.source(c)

  with pytest.raises(errors.UserError, match=message):
    begin()


def run(*args):
  main.run([*args])


@pytest.fixture(scope='module')
def of_words(tmp_path_factory):
  """A run of texts, with weights that were drawn: words make a difference."""
  c = config()
  workdir = tmp_path_factory.mktemp('runs') / 'words'
  pretrained.save(c, build.mesh(c), tiny.weights_of(c), workdir)
  return workdir


def test_pictures_in_training_are_of_captions_of_the_data(of_words, tmp_path):
  c = recipe.resolve(None, of_words, {})
  source = dataset.source(c)
  told = dataset.of_data(c, source, 4)
  assert [text(row) for row in told] == [
    c.data.names[label] for label in source.gather(np.arange(4))['label']
  ]
  draw = previews.drawer(c, build.engine(c), tmp_path, 4, source)
  draw(tiny.weights_of(c), '')
  drawn = sampling.sampler(c)
  rows = sampling.rows(c.seed, np.arange(4), told)
  tiles = jax.jit(drawn)(tiny.weights_of(c), rows).images
  with Image.open(tmp_path / 'samples.png') as image:
    shown = np.asarray(image)[..., None].astype(int)
  # A rounding may lie on either side of a gray's edge.
  np.testing.assert_allclose(shown, images.grid(np.asarray(tiles)), atol=1)


def test_each_prompt_is_asked_so_many_times_in_turn(tmp_path):
  (tmp_path / 'prompts.txt').write_text('a nine\n\n  zero \n')
  args = command.parse(
    [
      '--mode=sample',
      *('--prompt=seven', f'--prompts={tmp_path / "prompts.txt"}'),
      '--num_samples=2',
    ]
  )
  wanted, rows = samples.asked(config(), args)
  assert wanted == ['seven', 'a nine', 'zero']
  assert [text(row) for row in rows] == [x for x in wanted for _ in range(2)]


def test_a_picture_has_a_row_for_each_prompt(of_words, tmp_path):
  common = ['--mode=sample', f'--workdir={of_words}', '--num_samples=3']
  asked = ['--prompt=seven', '--prompt=a nine', '--guidance=3']
  run(*common, *asked, f'--output={tmp_path / "a.npz"}')
  run(*common, *asked, f'--output={tmp_path / "a.png"}')
  with np.load(tmp_path / 'a.npz') as file:
    tiles = file['images'].reshape(2, 3, 8, 8, 1)
  with Image.open(tmp_path / 'a.png') as image:
    np.testing.assert_array_equal(
      image, plots.labelled(tiles, labels=['seven', 'a nine'])
    )


@pytest.mark.parametrize('w', ['0', '9'])
def test_an_image_is_edited_as_told_unless_guidance_is_0(of_words, tmp_path, w):
  gray = np.full((8, 8), 120, np.uint8)
  Image.fromarray(gray).save(tmp_path / 'gray.png')
  made = []
  for prompt in ('zero', 'a four'):
    output = tmp_path / f'{prompt}.npz'
    common = [f'--workdir={of_words}', f'--image={tmp_path / "gray.png"}']
    common += ['--strength=1', '--num_samples=2', f'--guidance={w}']
    run('--mode=edit', *common, f'--prompt={prompt}', f'--output={output}')
    with np.load(output) as file:
      made.append(file['images'])
  assert np.any(made[0] != made[1]) == (w == '9')
  with pytest.raises(errors.UserError, match='takes one --prompt'):
    run('--mode=edit', *common, '--prompt=a', '--prompt=b')


@pytest.mark.parametrize('name', samplers.__all__)
def test_every_sampler_can_be_guided(name):
  """ε of data N(m, 0.3) is affine in m: w of m = c and 0 is that of m = w c."""
  s, w = schedules.linear(50, 1e-3, 0.3), 3.0
  c = jnp.array([[0.3], [0.0], [-0.2]])
  keys = jax.random.split(jax.random.key(2), 3)
  x_T = jax.random.normal(jax.random.key(3), (3, 6))
  step = getattr(samplers, name)

  def net(x_t, t, mean):
    return gaussian.network(s, mean, 0.3)(x_t, t)

  @jax.jit
  def drawn():
    denoiser = denoisers.Denoiser(s, net, clip=False)
    plain = [guidance.conditioned(denoiser, mean) for mean in (w * c, c)]
    ways = guidance.guided(denoiser, c, 0 * c, scale=w), *plain
    return [samplers.sample(step, way, keys, x_T).x_0 for way in ways]

  got, of_wc, of_c = drawn()
  # Roundings of 6e-8 are divided by √ᾱ_T = 0.01.
  np.testing.assert_allclose(got, of_wc, atol=1e-4)
  assert np.abs(got - of_c)[[0, 2]].min() > 0.1


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--label=3'], '--label is for'),
    (['--prompt=' + 'x' * 99], 'condition.length=48'),
    (['--prompts=nowhere.txt'], 'nowhere.txt'),
    (['--prompt=a', '--guidance=much'], 'guidance'),
    (['--prompt=a', '--guidance=-2'], 'guidance'),
  ],
)
def test_bad_prompts_are_a_line_for_the_user(of_words, args, message):
  with pytest.raises(errors.UserError, match=message):
    run('--mode=sample', f'--workdir={of_words}', *args)


@pytest.mark.parametrize('wrong', ['--prompt=a seven', '--label=7'])
def test_prompts_are_for_models_of_texts(wrong):
  args = command.parse(['--mode=sample', wrong, '--num_samples=1'])
  with pytest.raises(errors.UserError, match='is for models of'):
    samples.asked(digits.get_config('paper'), args)


def test_prompts_are_for_sampling():
  with pytest.raises(errors.UserError, match='is for --mode=edit or sample'):
    run(*conftest.TINY, '--prompt=a seven')


@pytest.mark.parametrize('label', ['10', '-1', 'seven'])
def test_a_class_that_is_not_there(label):
  c = config(digits, condition__name='label', condition__classes=10)
  with pytest.raises(errors.UserError, match='0 to 9'):
    dataset.class_number(c, label)
  assert dataset.class_number(c, '7') == 7
  c.data.names = ('zero', 'seven')
  assert dataset.class_number(c, 'seven') == 1


def test_classes_take_turns_if_none_is_asked_for():
  c = config(digits, condition__name='label', condition__classes=10)
  c.model.name = 'two_convolutions.network'
  params, draw = tiny.weights_of(c), sampling.sampler(c)
  index = jnp.array([3, 12, 25])

  @jax.jit
  def drawn(shift):
    rows = {'seed': jnp.zeros(3, jnp.uint32), 'index': index}
    asked = rows | {'condition': (index + shift) % 10}
    return draw(params, asked).images, draw(params, rows).images

  told, free = drawn(0)
  np.testing.assert_array_equal(free, told)
  assert np.any(free != drawn(1)[0])
