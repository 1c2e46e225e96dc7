"""Images never lie beside images that were made in another way."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import errors
from ddpm_jax.storage import outputs

RUN = {'mode': 'sample', 'run': '/runs/a', 'step': 7, 'seed': 0, 'steps': 50}


def drawn(count, gray=0):
  return np.full((count, 4, 4, 1), gray, np.uint8)


def save(output, count, gray=0, **changes):
  outputs.check(output, count, RUN | changes)
  batches = iter([drawn(count, gray)[:1], drawn(count, gray)[1:]])
  outputs.save(output, batches, count, RUN | changes)


def grays(folder):
  return [
    int(np.asarray(Image.open(path)).max())
    for path in sorted(folder.glob('*.png'))
  ]


@pytest.mark.parametrize('name', ['a.jpg', 'a.JPEG', 'b/a.webp', 'a.npy'])
def test_names_of_other_files_are_refused(name, tmp_path):
  with pytest.raises(
    errors.UserError, match='are not supported; choose a folder'
  ):
    outputs.prepare(tmp_path / name)
  assert not list(tmp_path.iterdir())


def test_endings_in_capitals_are_the_same(tmp_path):
  save(tmp_path / 'A.PNG', 3)
  save(tmp_path / 'B.NPZ', 3)
  with Image.open(tmp_path / 'A.PNG') as file:
    assert file.format == 'PNG'
  with np.load(tmp_path / 'B.NPZ') as arrays:
    assert arrays['images'].shape == (3, 4, 4, 1)
  assert all(path.is_file() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
  ('name', 'about'),
  [('a', 'a/samples.json'), ('a.png', 'a.json'), ('a.npz', 'a.json')],
)
def test_how_they_were_made_stands_beside_them(name, about, tmp_path):
  save(tmp_path / name, 3, labels=['1', 'b'])
  told = json.loads((tmp_path / about).read_text())
  assert told == RUN | {'labels': ['1', 'b'], 'images': 3, 'complete': True}


def test_folders_may_have_dots_in_their_names(tmp_path):
  save(tmp_path / 'samples_guidance1.5', 2)
  assert len(grays(tmp_path / 'samples_guidance1.5')) == 2


def test_the_same_settings_replace_their_own_images_and_others_never_mix(
  tmp_path,
):
  save(tmp_path / 'a', 3, gray=1)
  save(tmp_path / 'a', 4, gray=2)
  assert grays(tmp_path / 'a') == [2] * 4
  for count in (2, 4, 9):
    with pytest.raises(errors.UserError, match=r'seed \(0 there, 1 here\)'):
      save(tmp_path / 'a', count, gray=3, seed=1)
  with pytest.raises(errors.UserError, match=r"run \('/runs/a' there"):
    save(tmp_path / 'a', 4, gray=3, run='/runs/b')
  with pytest.raises(errors.UserError, match=r"labels \('absent' there"):
    save(tmp_path / 'a', 4, gray=3, labels=['1'])
  with pytest.raises(errors.UserError, match=r'000003\.png, beyond the 3'):
    save(tmp_path / 'a', 3, gray=3)
  assert grays(tmp_path / 'a') == [2] * 4


def test_what_was_killed_is_made_again_and_not_mixed(tmp_path):
  def killed():
    yield drawn(1, 1)
    raise KeyboardInterrupt

  outputs.check(tmp_path / 'a', 3, RUN)
  with pytest.raises(KeyboardInterrupt):
    outputs.save(tmp_path / 'a', killed(), 3, RUN)
  told = json.loads((tmp_path / 'a' / 'samples.json').read_text())
  assert told['complete'] is False
  with pytest.raises(errors.UserError, match='seed'):
    save(tmp_path / 'a', 3, seed=1)
  save(tmp_path / 'a', 3, gray=2)
  assert grays(tmp_path / 'a') == [2] * 3


def test_a_run_may_be_moved_with_its_images(tmp_path):
  run = tmp_path / 'run'
  save(run / 'samples', 2, run=str(run))
  moved = run.rename(tmp_path / 'moved')
  save(moved / 'samples', 2, run=str(moved), gray=5)
  assert grays(moved / 'samples') == [5, 5]


def test_images_of_unknown_origin_are_left_alone(tmp_path):
  (tmp_path / '000000.png').write_bytes(b'mine')
  with pytest.raises(errors.UserError, match=r'000000\.png, and no samples'):
    save(tmp_path, 3)
  assert (tmp_path / '000000.png').read_bytes() == b'mine'


def test_json_of_something_else_is_left_alone(tmp_path):
  (tmp_path / 'config.json').write_text('{"steps": 3}')
  with pytest.raises(errors.UserError, match='does not describe images'):
    save(tmp_path / 'config.png', 3)
  assert (tmp_path / 'config.json').read_text() == '{"steps": 3}'


def test_a_folder_is_no_file_of_images(tmp_path):
  (tmp_path / 'a.png').mkdir()
  with pytest.raises(errors.UserError, match=r'a\.png is a folder'):
    outputs.prepare(tmp_path / 'a.png')


def test_what_is_said_about_images_and_cannot_be_read_is_left_alone(tmp_path):
  save(tmp_path / 'a.npz', 3)
  (tmp_path / 'a.json').write_text('{')
  with pytest.raises(errors.UserError, match='does not describe images'):
    save(tmp_path / 'a.npz', 3)
  assert (tmp_path / 'a.json').read_text() == '{'
