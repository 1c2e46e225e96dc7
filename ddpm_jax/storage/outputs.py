"""Where images go: a folder of PNG files, one grid (.png) or an array (.npz).

How they were made stands beside them as JSON: `samples.json` in a folder,
`a.json` beside `a.png` or `a.npz`. A folder never holds images that were made
in different ways.
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
# Names that end so are of files, and not of the kinds that are written here.
OTHER_FILES = (
  *('.apng', '.avif', '.bmp', '.csv', '.gif', '.gz', '.h5', '.heic', '.jp2'),
  *('.jpeg', '.jpg', '.json', '.jxl', '.mp4', '.npy', '.pdf', '.pgm', '.pkl'),
  *('.ppm', '.pt', '.svg', '.tar', '.tga', '.tif', '.tiff', '.txt', '.webp'),
  '.zip',
)
# These may differ where images are made again.
FREE = ('images', 'complete')

About = dict[str, Any]


def kind(output: pathlib.Path) -> str:
  """'.png', '.npz', or '' for a folder.

  Raises:
    UserError: the name is of a file of another kind.
  """
  suffix = output.suffix.lower()
  if suffix in OTHER_FILES:
    raise errors.UserError(
      f'--output={output}: {suffix} files are not written; name a folder (a '
      'PNG each), a .png (one grid) or an .npz'
    )
  return suffix if suffix in ('.png', '.npz') else ''


def prepare(output: pathlib.Path) -> None:
  """Makes the folders, before minutes are spent.

  Raises:
    UserError: it cannot be written, or holds images of unknown origin.
  """
  ending = kind(output)
  workdir.create(output.parent if ending else output)
  if ending and output.is_dir():
    raise errors.UserError(f'{output} is a folder')
  found = _found(output)
  if found and not _about_path(output).exists():
    raise errors.UserError(
      f'{output} holds other images, such as {found[0]}, and no {ABOUT} that '
      'says how they were made: name another --output'
    )


def check(output: pathlib.Path, count: int, about: About) -> None:
  """Prepares `output`, and refuses to mix `count` images with others there.

  Raises:
    UserError: it cannot be written, or holds images made in another way, or
      more images.
  """
  prepare(output)
  there, found = _read(_about_path(output)), _found(output)
  if not found or there is None:
    return
  here = json.loads(json.dumps(about))
  if output.resolve().is_relative_to(here['run']):
    here['run'] = there['run']  # The run may have been moved, images and all.
  differ = [
    f'{key} ({there.get(key, "absent")!r} there, {here.get(key, "absent")!r} '
    'here)'
    for key in there | here
    if key not in FREE and there.get(key) != here.get(key)
  ]
  if differ:
    raise errors.UserError(
      f'{output} holds images that were made in another way; these differ: '
      f'{", ".join(differ)}. Name another --output'
    )
  others = set(found) - set(_names(count))
  if others:
    raise errors.UserError(
      f'{output} holds other images, such as {min(others)}, beyond the {count} '
      'asked for: name another --output'
    )


def save(
  output: pathlib.Path,
  batches: Iterator[np.ndarray],
  count: int,
  about: About,
  *,
  picture: Callable[[np.ndarray], np.ndarray] = images.grid,
) -> None:
  """Writes `count` images, and last how they were made.

  Of several processes the first one writes; all must draw.

  Args:
    output: a folder, a .png or an .npz.
    batches: the images, a batch (b, H, W, C) at a time.
    count: how many there will be.
    about: how they are made.
    picture: makes one picture of all (N, H, W, C), for a .png.
  """
  if not processes.is_primary():
    for _ in batches:
      pass
    return
  ending, path = kind(output), _about_path(output)
  if ending:
    drawn = np.concatenate(list(batches))
    path.unlink(missing_ok=True)  # It is of the file that is replaced now.
    if ending == '.npz':
      images.save_npz(output, drawn)
    else:
      images.save_png(output, picture(drawn))
  else:
    # Should this be killed, what is there can be told apart, and made again.
    _write(path, {**about, 'images': count, 'complete': False})
    name, written = iter(_names(count)), [path]
    try:
      for batch in batches:
        for image in batch:
          written.append(output / next(name))
          images.save_png(written[-1], image)
    except errors.RunError:  # Some are not finite: all or none.
      for file in written:
        file.unlink(missing_ok=True)
      raise
  _write(path, {**about, 'images': count, 'complete': True})


def _found(output: pathlib.Path) -> list[str]:
  """The images of a folder; none of a file, which is replaced as a whole."""
  if kind(output):
    return []
  return sorted(path.name for path in output.glob('*.png'))


def _names(count: int) -> list[str]:
  return [f'{i:06d}.png' for i in range(count)]


def _about_path(output: pathlib.Path) -> pathlib.Path:
  return output.with_suffix('.json') if kind(output) else output / ABOUT


def _read(path: pathlib.Path) -> About | None:
  """How the images beside it were made; None if there is no such file.

  Raises:
    UserError: it is a file of something else, which must not be lost.
  """
  if not path.exists():
    return None
  try:
    values = jsonfile.read(path)
  except (OSError, errors.UserError):
    values = None
  if not isinstance(values, dict) or not {'mode', 'run'} <= values.keys():
    raise errors.UserError(
      f'{path} is there, and would be replaced, but is not about images: name '
      'another --output, or remove it'
    )
  return values


def _write(path: pathlib.Path, about: About) -> None:
  with paths.atomic_write(path) as part:
    part.write_text(json.dumps(about, indent=2) + '\n')
