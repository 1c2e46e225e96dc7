"""The classifier of a data set, and the small-data score in its features."""

import json

import chex
import jax
import numpy as np
import pytest
from sklearn import datasets

from ddpm_jax import errors
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import classifier_score


@pytest.fixture(scope='module')
def digits():
  images, labels = datasets.load_digits(return_X_y=True)
  images = np.round(images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
  return images, labels


@pytest.fixture(scope='module')
def classifier(digits):
  """Of the first 1198 digits; the other 599 are held out."""
  return classifiers.train(digits[0][:1198], digits[1][:1198], 10, steps=120)


@pytest.fixture(scope='module')
def scores(digits, classifier):
  """Of other real digits, and of what is not."""
  real, labels, held_out = digits[0][:1198], digits[1][:1198], digits[0][1198:]
  padded = np.pad(held_out.astype(float), [(0, 0), (1, 1), (1, 1), (0, 0)])
  blurred = np.mean(
    [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)],
    axis=0,
  )
  noise = np.random.default_rng(0).integers(0, 256, held_out.shape)
  return {
    name: classifier_score.score(
      real, labels, fake.astype(np.uint8), classifier
    )
    for name, fake in {
      'real': held_out,
      'copies': real[:599],
      'zeros': held_out[digits[1][1198:] == 0],
      'blurred': blurred,
      'noise': noise,
    }.items()
  }


def test_digits_are_told_apart_with_97_percent_right(digits, classifier):
  assert classifier.accuracy >= 0.97
  _, probabilities = classifiers.features_and_probabilities(
    classifier, digits[0][1198:]
  )
  right = probabilities.argmax(axis=1) == digits[1][1198:]
  # The last third is by other writers, and harder.
  assert right.mean() >= 0.93


def test_accuracy_is_that_of_the_held_out_fifth(digits, classifier):
  learn, held_out = classifiers.split(1198)
  assert len(held_out) == 239
  np.testing.assert_array_equal(
    np.sort(np.append(learn, held_out)), np.arange(1198)
  )
  _, probabilities = classifiers.features_and_probabilities(
    classifier, digits[0][held_out]
  )
  right = probabilities.argmax(axis=1) == digits[1][held_out]
  assert classifier.accuracy == right.mean()


def test_the_same_seed_gives_the_same_classifier_and_another_does_not(digits):
  images, labels = digits

  def train(seed):
    return classifiers.train(
      images[1:100:2], labels[1:100:2], 10, seed=seed, steps=3
    )

  first = train(0)
  chex.assert_trees_all_equal(first, train(0))
  with pytest.raises(AssertionError, match='Mismatched elements'):
    chex.assert_trees_all_equal(first.params, train(1).params)


def test_images_without_a_label_are_left_out(digits):
  images, labels = digits[0][:100], digits[1][:100].copy()
  labels[::2] = -1
  chex.assert_trees_all_equal(
    classifiers.train(images, labels, 10, steps=3),
    classifiers.train(images[1::2], labels[1::2], 10, steps=3),
  )


@pytest.mark.parametrize('n', [1, classifiers.BATCH, classifiers.BATCH + 1])
def test_every_image_is_counted_once_whatever_the_batch(digits, classifier, n):
  features, probabilities = classifiers.features_and_probabilities(
    classifier, digits[0][:n]
  )
  assert features.shape == (n, 64)
  assert probabilities.shape == (n, 10)
  np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
  alone, _ = classifiers.features_and_probabilities(
    classifier, digits[0][n - 1 : n]
  )
  np.testing.assert_allclose(features[-1:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(28, 20, 1), (64, 64, 3), (3, 1, 4)])
def test_images_of_any_small_size_and_channels_are_taken(shape):
  (features, logits), params = jax.eval_shape(
    classifiers.Net(2).init_with_output,
    jax.random.key(0),
    np.zeros((5, *shape), np.uint8),
  )
  assert (features.shape, logits.shape) == ((5, 64), (5, 2))
  assert sum(x.size for x in jax.tree.leaves(params)) < 600_000


def test_colours_and_odd_sizes_are_learnt():
  """Red or blue, 6 x 5."""
  images = np.random.default_rng(0).integers(0, 100, (60, 6, 5, 3))
  labels = np.arange(60) % 2
  images[np.arange(60), ..., 2 * labels] += 100
  classifier = classifiers.train(
    images.astype(np.uint8), labels, 2, steps=30, batch=16
  )
  assert classifier.accuracy == 1


def test_features_have_a_mean_square_of_1_in_training(digits, classifier):
  learn, _ = classifiers.split(1198)
  features, _ = classifiers.features_and_probabilities(
    classifier, digits[0][learn]
  )
  np.testing.assert_allclose(np.mean(features**2), 1, rtol=1e-4)


def test_a_saved_classifier_is_loaded_bit_for_bit(tmp_path, classifier):
  classifiers.save(tmp_path / 'classifier.npz', classifier)
  assert [file.name for file in tmp_path.iterdir()] == ['classifier.npz']
  loaded = classifiers.load(tmp_path / 'classifier.npz')
  chex.assert_trees_all_equal(loaded, classifier)


def cut(path):
  path.write_bytes(path.read_bytes()[:-100])


def strip(path):
  with np.load(path) as file:
    kept = {name: file[name] for name in file if 'Dense_1' not in name}
  np.savez(path, **kept)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 255
  path.write_bytes(data)


@pytest.mark.parametrize(
  'damage',
  [cut, strip, flip, lambda path: path.write_bytes(b''), lambda p: p.unlink()],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, classifier, damage):
  path = tmp_path / 'classifier.npz'
  classifiers.save(path, classifier)
  damage(path)
  with pytest.raises(errors.UserError, match=r'classifier\.npz is not a') as e:
    classifiers.load(path)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('labels', 'words'),
  [
    (np.full(20, -1), 'no image has a label'),
    (np.full(20, 3), '1 classes are too few'),
    (np.arange(20), 'there are 10 classes'),
    (np.arange(5), 'one label per image'),
    (np.where(np.arange(20) < 4, np.arange(20) % 2, -1), '4 labelled images'),
  ],
)
def test_labels_that_cannot_be_learnt_are_one_line(digits, labels, words):
  with pytest.raises(errors.UserError, match=words) as e:
    classifiers.train(digits[0][:20], labels, 10)
  assert '\n' not in str(e.value)


def test_images_that_do_not_fit_are_one_line(digits, classifier):
  images = digits[0]
  with pytest.raises(errors.UserError, match='do not fit the classifier'):
    classifiers.features_and_probabilities(classifier, images[:, :4])
  for wrong in (images[..., 0], images.astype(float), images[:0]):
    with pytest.raises(errors.UserError, match='needs uint8'):
      classifiers.train(wrong, digits[1][: len(wrong)], 10)
  with pytest.raises(errors.UserError, match='9 fake images are too few'):
    classifier_score.score(images, digits[1], images[:9], classifier)


def test_real_digits_score_far_better_than_noise_and_blur(scores):
  real = scores['real']
  for other in (scores['blurred'], scores['noise']):
    assert other['frechet_distance'] > 3 * real['frechet_distance']
    assert other['kernel_distance'] > 3 * real['kernel_distance']
    assert other['coverage'] < 0.5 * real['coverage']
    assert other['precision'] < real['precision'] - 0.2
    assert other['nearest_rmse'] > real['nearest_rmse']


def test_copies_are_given_away_by_their_distance(scores):
  assert scores['copies']['nearest_rmse'] == 0
  assert scores['real']['nearest_rmse'] > 10
  assert scores['real']['real_nearest_rmse'] > 10


def test_a_lost_class_shows_in_shares_and_recall(scores):
  zeros = scores['zeros']
  assert zeros['class_share'][0] > 0.9
  assert zeros['recall'] < 0.3 < scores['real']['recall']
  np.testing.assert_allclose(sum(zeros['class_share']), 1)
  np.testing.assert_allclose(zeros['real_class_share'], 0.1, atol=0.01)


def test_a_score_is_json_and_its_table_is_aligned(digits, classifier, scores):
  for score in scores.values():
    assert json.loads(json.dumps(score, allow_nan=False)) == score
  images, labels = digits
  score = classifier_score.score(
    images[:1198], labels[:1198], images[1300:], classifier, images[1198:1300]
  )
  assert json.loads(json.dumps(score, allow_nan=False)) == score
  assert 'real_nearest_rmse' not in score
  for s in (score, scores['noise']):
    title, *lines = classifier_score.table(s).splitlines()
    assert title == classifier_score.NAME
    assert len(lines) == 11 + 10
    end = lines[0].index('held-out real') + len('held-out real')
    assert all(line[end - 1] not in ' ' for line in lines)
    assert all(line[end : end + 2].strip() == '' for line in lines)


def test_nothing_is_called_fid(scores):
  text = json.dumps(scores) + classifier_score.table(scores['real'])
  assert 'fid' not in text.lower()
