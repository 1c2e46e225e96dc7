"""A small convolutional classifier of one data set, for its features."""

import functools
import os
import pathlib
import secrets
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ddpm_jax import errors
from ddpm_jax import npz

BATCH = 500  # images per call of the network


class Net(nn.Module):
  """conv, norm, relu and pooling until no side is over 4; features; logits."""

  classes: int
  width: int = 32
  features: int = 64

  @nn.compact
  def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 (B, H, W, C) -> features (B, d) and logits (B, classes)."""
    h = images.astype(jnp.float32) / 127.5 - 1
    width = self.width
    while True:
      h = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(h)))
      if max(h.shape[1:3]) <= 4:
        break
      h = nn.max_pool(h, (2, 2), (2, 2), 'SAME')
      width = min(2 * width, 128)
    h = nn.relu(nn.Dense(self.features)(h.reshape(len(h), -1)))
    return h, nn.Dense(self.classes)(h)


def _outputs(net: Net, params: Any, images: jax.Array) -> Any:
  return net.apply({'params': params}, images)


class Classifier(NamedTuple):
  params: Any
  accuracy: float  # on the held-out part
  scale: float  # root mean square of the net's features in training
  shape: tuple[int, int, int]  # of an image, (H, W, C)
  classes: int


def split(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Splits n labelled images into indices for `train` and a held-out fifth."""
  order = np.random.default_rng(seed).permutation(n)
  return np.sort(order[n // 5 :]), np.sort(order[: n // 5])


def train(
  images: np.ndarray,
  labels: np.ndarray,
  classes: int,
  *,
  seed: int = 0,
  steps: int = 500,
  batch: int = 128,
) -> Classifier:
  """Trains a classifier of real images.

  Args:
    images: uint8 (n, H, W, C), best with 8 to 64 pixels per side.
    labels: Integers (n,) in 0..classes - 1; -1 leaves an image out.
    classes: Number of classes.
    seed: Seed of the parameters, the batches and the held-out fifth (`split` of
      the labelled images). On a CPU the same seed gives the same classifier.
    steps: Steps of Adam, with a learning rate that decays to 0.
    batch: Images per step.

  Raises:
    UserError: If there are fewer than two classes or ten labelled images, or an
      array has a wrong shape.
  """
  _check_images(images)
  labels = np.asarray(labels)
  if labels.shape != images.shape[:1]:
    raise errors.UserError(
      f'{len(images)} images have labels of shape {labels.shape}; the '
      'small-data score needs one label per image'
    )
  if labels.size and not -1 <= labels.min() <= labels.max() < classes:
    raise errors.UserError(
      f'labels range from {labels.min()} to {labels.max()}, but there are '
      f'{classes} classes'
    )
  images, labels = images[labels >= 0], labels[labels >= 0]
  if len(labels) == 0:
    raise errors.UserError(
      'no image has a label; the small-data score trains a classifier, so it '
      'needs a labelled data set'
    )
  if len(np.unique(labels)) < 2 or len(labels) < 10:
    raise errors.UserError(
      f'{len(labels)} labelled images of {len(np.unique(labels))} classes are '
      'too few to train a classifier, which needs 10 images and 2 classes'
    )
  learn, held_out = split(len(labels), seed)
  net, optimizer = Net(classes), _optimizer(steps)
  k_init, k_batch = jax.random.split(jax.random.key(seed))
  x = jnp.asarray(images[learn])
  y = jnp.asarray(labels[learn], jnp.int32)
  params = jax.jit(net.init)(k_init, x[:1])['params']
  state = optimizer.init(params)
  # Not a scan: on a CPU, XLA makes convolutions in a loop ten times slower.
  for i in range(steps):
    params, state = _step(
      net, steps, batch, k_batch, jnp.int32(i), params, state, x, y
    )
  H, W, C = images.shape[1:]
  unscaled = Classifier(params, float('nan'), 1.0, (H, W, C), classes)
  features, probabilities = features_and_probabilities(unscaled, images)
  right = (probabilities.argmax(axis=1) == labels)[held_out]
  scale = np.sqrt(np.mean(np.square(features[learn], dtype=np.float64)))
  return unscaled._replace(accuracy=float(right.mean()), scale=float(scale))


def _optimizer(steps: int) -> optax.GradientTransformation:
  return optax.adamw(
    optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2
  )


@functools.partial(
  jax.jit, static_argnums=(0, 1, 2), donate_argnames=('params', 'state')
)
def _step(
  net: Net,
  steps: int,
  batch: int,
  key: jax.Array,
  i: jax.Array,
  params: Any,
  state: Any,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[Any, Any]:
  """Step i of `steps`, on a random batch."""
  at = jax.random.randint(jax.random.fold_in(key, i), (batch,), 0, len(images))

  def loss(params: Any) -> jax.Array:
    _, logits = _outputs(net, params, images[at])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels[at]
    ).mean()

  updates, state = _optimizer(steps).update(
    jax.grad(loss)(params), state, params
  )
  return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnames='net')
def _apply(net: Net, params: Any, images: jax.Array) -> Any:
  features, logits = _outputs(net, params, images)
  return features, jax.nn.softmax(logits)


def features_and_probabilities(
  classifier: Classifier, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Features (n, d) and probabilities (n, classes) of uint8 images.

  Over the training images, features have a mean square of 1.

  Raises:
    UserError: If the images do not have the classifier's shape.
  """
  _check_images(images)
  if images.shape[1:] != tuple(classifier.shape):
    raise errors.UserError(
      f'images of shape {images.shape[1:]} do not fit the classifier, which '
      f'was trained on {tuple(classifier.shape)}'
    )
  net = Net(int(classifier.classes))
  outputs = []
  for start in range(0, len(images), BATCH):
    part = images[start : start + BATCH]
    # The last batch is padded, to compile only one program.
    full = np.zeros((BATCH, *part.shape[1:]), np.uint8)
    full[: len(part)] = part
    features, probabilities = _apply(net, classifier.params, full)
    outputs.append(
      (
        np.asarray(features)[: len(part)] / np.float32(classifier.scale),
        np.asarray(probabilities)[: len(part)],
      )
    )
  features, probabilities = zip(*outputs, strict=True)
  return np.concatenate(features), np.concatenate(probabilities)


def save(path: str | os.PathLike, classifier: Classifier) -> None:
  """Writes a .npz atomically."""
  path = pathlib.Path(path)
  flat = traverse_util.flatten_dict({'params': classifier.params}, sep='/')
  # Other processes may be writing the same file.
  part = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.part')
  arrays: dict[str, Any] = {
    name: np.asarray(value) for name, value in flat.items()
  }
  for name in ('accuracy', 'scale', 'shape', 'classes'):
    arrays[name] = np.asarray(getattr(classifier, name))
  with open(part, 'wb') as file:
    np.savez(file, **arrays)
  os.replace(part, path)


def load(path: str | os.PathLike) -> Classifier:
  """Loads what `save` wrote.

  Raises:
    UserError: If the file is missing, damaged, or from another network.
  """
  try:
    flat: dict[str, Any] = dict(npz.load(path))
    accuracy = float(flat.pop('accuracy'))
    scale = float(flat.pop('scale'))
    H, W, C = (int(side) for side in flat.pop('shape'))
    classes = int(flat.pop('classes'))
    params = traverse_util.unflatten_dict(flat, sep='/')['params']
    image = jax.ShapeDtypeStruct((1, H, W, C), jnp.uint8)
    wanted = jax.eval_shape(Net(classes).init, jax.random.key(0), image)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), wanted['params'])
    if shapes != jax.tree.map(lambda x: (x.shape, x.dtype), params):
      raise ValueError('its parameters are those of another network')
  except FileNotFoundError:
    raise errors.UserError(f'{path} is not a file') from None
  except Exception as error:  # from zipfile, zlib or NumPy
    raise errors.UserError(
      f'{path} is not a classifier that can be read '
      f'({" ".join(str(error).split())}); delete it, and it is trained again'
    ) from error
  return Classifier(
    jax.tree.map(jnp.asarray, params), accuracy, scale, (H, W, C), classes
  )


def _check_images(images: np.ndarray) -> None:
  if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
    raise errors.UserError(
      f'images are {images.dtype} of shape {images.shape}; the small-data '
      'score needs uint8 of (number, height, width, channels)'
    )
