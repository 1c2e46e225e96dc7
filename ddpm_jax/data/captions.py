"""Captions of images: from files or class names, and encoded as bytes."""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax import errors
from ddpm_jax import regular
from ddpm_jax.data import image_folder
from ddpm_jax.data import store

KEYS = ('text', 'caption')  # names of captions in files
MOST = 2**30  # bytes of captions.csv, which is read at once

Captions = Sequence[tuple[str, ...]]  # one tuple per image or class


def tokens(texts: Sequence[str], length: int) -> np.ndarray:
  """Encodes texts as UTF-8 bytes, uint8 (n, length), padded with 0.

  Raises:
    UserError: If a text is longer than `length` bytes, or has a byte of 0.
  """
  rows = np.zeros((len(texts), length), np.uint8)
  for row, text in zip(rows, texts, strict=True):
    try:
      code = text.strip().encode()
    except UnicodeEncodeError:  # such as raw bytes of a file name
      raise errors.UserError(f'the text {text[:40]!r} is not Unicode') from None
    if len(code) > length or 0 in code:
      raise errors.UserError(
        f'the text {text[:40]!r} has {len(code)} bytes of UTF-8; at most '
        f'config.condition.length={length} are allowed, and none may be 0'
      )
    row[: len(code)] = np.frombuffer(code, np.uint8)
  return rows


def of_classes(
  names: Sequence[str], templates: Sequence[str]
) -> list[tuple[str, ...]]:
  """Returns the captions of each class: templates with its name in place of {}.

  'a {}' becomes 'an {}' before a vowel.

  Raises:
    UserError: If a template does not have one {}, or there are no classes.
  """
  for template in templates:
    if template.count('{}') != 1:
      raise errors.UserError(
        f'config.data.templates: {template!r} needs {{}} once, for the class'
      )
  if not names or not templates:
    raise errors.UserError(
      'captions of classes need a data set with classes, or '
      'config.data.names, and config.data.templates'
    )

  def fill(template: str, name: str) -> str:
    if name[:1].lower() in set('aeiou'):
      template = f' {template}'.replace(' a {}', ' an {}').strip()
    return template.replace('{}', name)

  return [tuple(fill(t, name) for t in templates) for name in names]


def of_folder(folder: str, names: Sequence[str]) -> list[tuple[str, ...]]:
  """Reads the captions of the images `names` of a folder, () for none.

  They are in `metadata.jsonl`, one line {"file_name": ..., "text": string or
  strings} per image, or in `captions.csv` with columns file_name and text;
  `caption` may replace `text`.

  Raises:
    UserError: If there are no captions, or an entry is not valid.
  """
  given: dict[str, list[str]] = {name: [] for name in names}
  match = image_folder.matcher(names)
  for where, entry in _entries(folder):
    name = match(entry.get('file_name'))
    if name is None:
      raise errors.UserError(
        f'{where}: no image {entry.get("file_name")!r:.300} in its folder; '
        'each entry needs the file_name of an image'
      )
    found: Any = next((entry[k] for k in KEYS if entry.get(k)), [])
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(
      isinstance(text, str) for text in texts
    ):
      raise errors.UserError(f'{where}: caption {found!r:.80} is not a string')
    given[name] += texts
  if not any(given.values()):
    raise errors.UserError(
      f'{folder} has no captions: add metadata.jsonl with lines '
      '{"file_name": "a.png", "text": "..."}, or captions.csv'
    )
  return [tuple(texts) for texts in given.values()]


def _entries(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (location, entry) for each line of the caption files."""
  path = os.path.join(folder, 'metadata.jsonl')
  if os.path.exists(path):
    yield from image_folder.lines(path)
  path = os.path.join(folder, 'captions.csv')
  if os.path.exists(path):
    yield from _rows(path)


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (location, row) of a CSV file with commas, semicolons or tabs.

  Raises:
    UserError: If it is not CSV, or lacks a column.
  """
  text = _text(path)
  start = 0
  if first := re.match(r'sep=(.)\r?\n', text):  # a line for Excel
    text, start = text[first.end() :], 1
  titles: dict[str, list[str]] = {}
  for delimiter in ',;\t':
    rows = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter)
    try:
      titles[delimiter] = [x.strip().lower() for x in next(rows, [])]
      if 'file_name' not in titles[delimiter]:
        continue
      if not {*KEYS} & {*titles[delimiter]}:
        continue
      for row in rows:
        if any(map(str.strip, row)):
          where = f'{image_folder.shown(path)}:{rows.line_num + start}'
          yield where, dict(zip(titles[delimiter], row, strict=False))
      return
    except csv.Error as error:
      raise errors.UserError(
        f'{image_folder.shown(path)}:{rows.line_num + start}: not CSV ({error})'
      ) from None
  there = max(titles.values(), key=len)
  raise errors.UserError(
    f'{image_folder.shown(path)}: its columns are '
    f'{", ".join(map(repr, there))}; captions need file_name, and '
    f'{" or ".join(KEYS)}'
  )


def _text(path: str) -> str:
  """Reads a text file in UTF-8, or in UTF-16 with a byte order mark."""
  with image_folder.opened(path) as file:
    size = regular.length(file)
    if size > MOST:
      raise errors.UserError(
        f'{image_folder.shown(path)} has {size} bytes, more than {MOST}: '
        'write the captions as metadata.jsonl'
      )
    data = file.read()
  utf_16 = data.startswith(image_folder.UTF_16)
  try:
    return data.decode('utf-16' if utf_16 else 'utf-8-sig')
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f'{image_folder.shown(path)}: not UTF-8 ({error.reason} at byte '
      f'{error.start}); save it as "CSV UTF-8"'
    ) from None


def attach(
  source: store.Source,
  captions: Captions,
  by: str,
  encode: Callable[[list[str]], Mapping[str, np.ndarray] | np.ndarray],
) -> store.Source:
  """Adds `text` to the batches of a source: K encoded captions per image.

  Args:
    source: The images.
    captions: Captions of each label or id. K is the largest number of captions;
      fewer are repeated up to K, and none becomes K times ''.
    by: What `captions` are indexed by: 'label' or 'id'.
    encode: texts -> arrays with one row per text.
  """
  K = max(len(texts) for texts in captions)
  # The last row is for images without a label, -1.
  sets = [texts or ('',) for texts in [*captions, ()]]
  every = [texts[k % len(texts)] for texts in sets for k in range(K)]
  known = {text: row for row, text in enumerate(dict.fromkeys(every))}
  table = encode(list(known))
  rows = np.array([known[text] for text in every]).reshape(-1, K)

  def gather(indices: np.ndarray) -> store.Batch:
    batch = source.gather(indices)
    at = rows[batch[by]]
    if isinstance(table, np.ndarray):
      return {**batch, 'text': table[at]}
    text: Any = {name: x[at] for name, x in table.items()}
    return {**batch, 'text': text}

  return dataclasses.replace(source, gather=gather)
