"""Data sets that TFDS prepared as ArrayRecord, read without TensorFlow."""

import difflib
import logging
import pathlib
from typing import Any

import tensorflow_datasets as tfds

from ddpm_jax import errors
from ddpm_jax.data import cifar


def load(name: str, path: str, split: str) -> tuple[Any, tuple[str, ...]]:
  """Returns the examples of a split, by index, and their class names.

  The names are () without labels. CIFAR-10 is prepared first, if needed.

  Raises:
    UserError: If the name or split is unknown, or the set is not prepared.
  """
  # TFDS's notices, such as that OpenCV would be faster, do not help our users.
  logging.getLogger('absl').addFilter(_is_no_tfds_notice)
  builder = _builder(name, path)
  try:
    data = builder.as_data_source(split=split, file_format='array_record')
  except Exception as error:
    # Checked only now: `tfds.testing.mock_data` serves sets that do not exist.
    if builder.name != 'cifar10' or _is_prepared(builder):
      raise _explain(builder, split, error) from error
    cifar.prepare(builder.data_dir_root)
    return load(name, path, split)
  return data, _class_names(name, builder.info.features)


def texts(
  name: str, path: str, split: str, feature: str
) -> list[tuple[str, ...]]:
  """Returns the texts of each example, from a feature with one or several.

  `a/b` is the feature b inside the feature a, such as `captions/text` in COCO.

  Raises:
    UserError: If there is no such feature, or it holds no texts.
  """
  features = _builder(name, path).info.features
  # This decodes the images too: TFDS can skip that only with TensorFlow.
  data = _builder(name, path).as_data_source(
    split=split, file_format='array_record'
  )

  def read(example: Any) -> tuple[str, ...]:
    for part in feature.split('/'):
      example = example[part]
    found = [example] if isinstance(example, bytes | str) else example
    return tuple(x.decode() if isinstance(x, bytes) else str(x) for x in found)

  try:
    first = data[0]
    for part in feature.split('/'):
      first = first[part]
    if not isinstance(first, bytes | str):
      first = next(iter(first))
    if not isinstance(first, bytes | str):
      raise TypeError
  except (KeyError, TypeError, IndexError, StopIteration):
    raise errors.UserError(
      f'{name} has no texts in a feature {feature!r}, which '
      f'config.data.captions names; its features: {", ".join(features)}'
    ) from None
  return [read(data[i]) for i in range(len(data))]


def full_name(name: str, path: str, split: str) -> str:
  """Returns the full name of a split, such as `cifar10/3.0.2[train]`."""
  return f'{_builder(name, path).info.full_name}[{split}]'


def _is_no_tfds_notice(record: logging.LogRecord) -> bool:
  ours = 'tensorflow_datasets' not in record.pathname
  return ours or record.levelno >= logging.ERROR


def _builder(name: str, path: str) -> Any:
  try:
    # Without `file_format`: a prepared data set knows its formats.
    return tfds.builder(name, data_dir=path or None)
  except Exception as error:
    known = tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if name.split('/')[0].split(':')[0] in known:
      reason = ' '.join(str(error).split())
      raise errors.UserError(f'TFDS cannot open {name!r}: {reason}') from error
    raise errors.UserError(
      f'TFDS has no data set {name!r}; '
      + (f'did you mean {" or ".join(close)}? ' if close else '')
      + 'set --config.data.tfds to a name of '
      'https://www.tensorflow.org/datasets/catalog'
    ) from error


def _is_prepared(builder: Any) -> bool:
  return (pathlib.Path(builder.data_dir) / 'dataset_info.json').exists()


def _explain(builder: Any, split: str, error: Exception) -> errors.UserError:
  """Explains why the examples cannot be read."""
  root, name = builder.data_dir_root, builder.name
  if not _is_prepared(builder):
    return errors.UserError(
      f'{name} is not prepared in {root}; on a machine with TensorFlow run '
      f'`tfds build {name} --file_format=array_record`, then set '
      '--config.data.path to the folder that it wrote to'
    )
  formats = {f.value for f in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    return errors.UserError(
      f'{name} in {root} is prepared as {", ".join(formats)}; on a machine '
      f'with TensorFlow run `tfds build {name} --file_format=array_record '
      '--data_dir=FOLDER`, then set --config.data.path=FOLDER'
    )
  return errors.UserError(
    f'no split {split!r} of {name}: set --config.data.split to one of '
    f'{", ".join(builder.info.splits)} or to a part, such as train[:90%] '
    f'({" ".join(str(error).split())})'
  )


def _class_names(name: str, features: Any) -> tuple[str, ...]:
  if 'image' not in features:
    raise errors.UserError(
      f'{name} has no feature `image`, only {", ".join(features)}; choose '
      'another data set'
    )
  label = dict(features.items()).get('label')
  if not isinstance(label, tfds.features.ClassLabel):
    return ()
  return tuple(label.names or ())
