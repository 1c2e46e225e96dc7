"""Writes images: a folder of PNG files, one grid (.png) or an array (.npz).

A JSON file beside them says how they were made: `samples.json` in a folder,
`a.json` beside `a.png` or `a.npz`. All images in a folder are made with the
same settings.
"""

import json
import pathlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddpm_jax import errors
from ddpm_jax import jsonfile
from ddpm_jax.parallel import processes
from ddpm_jax.storage import images
from ddpm_jax.storage import paths
from ddpm_jax.storage import workdir

ABOUT = 'samples.json'
# Suffixes of files that are not written here; other names are folders.
OTHER_FILES = (
  *('.apng', '.avif', '.bmp', '.csv', '.gif', '.gz', '.h5', '.heic', '.jp2'),
  *('.jpeg', '.jpg', '.json', '.jxl', '.mp4', '.npy', '.pdf', '.pgm', '.pkl'),
  *('.ppm', '.pt', '.svg', '.tar', '.tga', '.tif', '.tiff', '.txt', '.webp'),
  '.zip',
)
# Keys that may differ if images are made again.
FREE = ('images', 'complete')

About = dict[str, Any]


def kind(output: pathlib.Path) -> str:
  """Returns '.png', '.npz', or '' for a folder.

  Raises:
    UserError: If the suffix is that of another kind of file.
  """
  suffix = output.suffix.lower()
  if suffix in OTHER_FILES:
    raise errors.UserError(
      f'--output={output}: {suffix} files are not supported; choose a folder '
      '(one PNG per image), a .png (one grid) or an .npz'
    )
  return suffix if suffix in ('.png', '.npz') else ''


def prepare(output: pathlib.Path) -> None:
  """Makes the folders and checks that they can be written.

  Raises:
    UserError: If they cannot, or hold images of unknown origin.
  """
  ending = kind(output)
  workdir.create(output.parent if ending else output)
  if ending and output.is_dir():
    raise errors.UserError(f'{output} is a folder')
  found = _found(output)
  if found and not _about_path(output).exists():
    raise errors.UserError(
      f'{output} holds other images, such as {found[0]}, and no {ABOUT} that '
      'says how they were made: choose another --output'
    )


def check(output: pathlib.Path, count: int, about: About) -> None:
  """Prepares `output`, and refuses to mix `count` images with others there.

  Raises:
    UserError: If it cannot be written, or holds images that were made with
      other settings, or more than `count` images.
  """
  prepare(output)
  there, found = _read(_about_path(output)), _found(output)
  if not found or there is None:
    return
  here = json.loads(json.dumps(about))
  if output.resolve().is_relative_to(here['run']):
    here['run'] = there['run']  # The run may have been moved with its images.
  differ = [
    f'{key} ({there.get(key, "absent")!r} there, {here.get(key, "absent")!r} '
    'here)'
    for key in there | here
    if key not in FREE and there.get(key) != here.get(key)
  ]
  if differ:
    raise errors.UserError(
      f'{output} holds images made with other settings; these differ: '
      f'{", ".join(differ)}. Choose another --output'
    )
  others = set(found) - set(_names(count))
  if others:
    raise errors.UserError(
      f'{output} holds other images, such as {min(others)}, beyond the {count} '
      'requested: choose another --output'
    )


def save(
  output: pathlib.Path,
  batches: Iterator[np.ndarray],
  count: int,
  about: About,
  *,
  picture: Callable[[np.ndarray], np.ndarray] = images.grid,
) -> None:
  """Writes `count` images, and then the JSON file that describes them.

  Only process 0 writes, but all processes must iterate over `batches`.

  Args:
    output: A folder, a .png or an .npz.
    batches: The images, in batches (b, H, W, C).
    count: Number of images.
    about: How they are made.
    picture: Makes one image of all (N, H, W, C), for a .png.
  """
  if not processes.is_primary():
    for _ in batches:
      pass
    return
  ending, path = kind(output), _about_path(output)
  if ending:
    drawn = np.concatenate(list(batches))
    path.unlink(missing_ok=True)  # It describes the file that is replaced.
    if ending == '.npz':
      images.save_npz(output, drawn)
    else:
      images.save_png(output, picture(drawn))
  else:
    # Written first, so that after a kill the images can be recognized.
    _write(path, {**about, 'images': count, 'complete': False})
    name, written = iter(_names(count)), [path]
    try:
      for batch in batches:
        for image in batch:
          written.append(output / next(name))
          images.save_png(written[-1], image)
    except errors.RunError:  # Some are not finite: write all or none.
      for file in written:
        file.unlink(missing_ok=True)
      raise
  _write(path, {**about, 'images': count, 'complete': True})


def _found(output: pathlib.Path) -> list[str]:
  """Returns the images in a folder; [] for a file, which would be replaced."""
  if kind(output):
    return []
  return sorted(path.name for path in output.glob('*.png'))


def _names(count: int) -> list[str]:
  return [f'{i:06d}.png' for i in range(count)]


def _about_path(output: pathlib.Path) -> pathlib.Path:
  return output.with_suffix('.json') if kind(output) else output / ABOUT


def _read(path: pathlib.Path) -> About | None:
  """Reads how the images beside a file were made; None if it does not exist.

  Raises:
    UserError: If the file is about something else, and must not be replaced.
  """
  if not path.exists():
    return None
  try:
    values = jsonfile.read(path)
  except (OSError, errors.UserError):
    values = None
  if not isinstance(values, dict) or not {'mode', 'run'} <= values.keys():
    raise errors.UserError(
      f'{path} would be replaced, but does not describe images: choose another '
      '--output, or remove it'
    )
  return values


def _write(path: pathlib.Path, about: About) -> None:
  with paths.atomic_write(path) as part:
    part.write_text(json.dumps(about, indent=2) + '\n')
