"""Results of one kind stay beside those of another."""

import json

import pytest

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax.evaluation import record
from ddpm_jax.evaluation import small_data

HOW = {
  'step': 100,
  'weights': 'EMA',
  'data': 'digits',
  'split': 'train',
  'images': 8,
  'times_an_image': 11,
  'exact_in_t': False,
  'variance': 'beta',
  'seed': 0,
}
FOUND = {
  **{'bits_per_dim': 4.0, 'standard_error': 0.1, 'L_T': 0.0, 'L_0': 1.0},
  **{'L_1_to_T-1': 3.0, 'rate': 3.0, 'distortion': 1.0, 'rmse': 2.0},
  'L_t_by_t': {'t': [1], 'bits_per_dim': [1.0]},
}


def bits(folder):
  return [bound['bits_per_dim'] for bound in record.read(folder)['bounds']]


@pytest.mark.parametrize(
  'other',
  [
    {'step': 200},
    {'weights': 'raw'},
    {'data': 'letters'},
    {'split': 'test'},
    {'images': 9},
    {'times_an_image': 1001, 'exact_in_t': True},
    {'variance': 'beta_tilde'},
    {'seed': 1},
  ],
)
def test_a_bound_replaces_only_one_made_in_the_very_same_way(other, tmp_path):
  record.write_bound(tmp_path, HOW | FOUND)
  record.write_bound(tmp_path, HOW | FOUND | other | {'bits_per_dim': 5.0})
  assert bits(tmp_path) == [4.0, 5.0]
  record.write_bound(tmp_path, HOW | FOUND | {'bits_per_dim': 4.5})
  assert bits(tmp_path) == [5.0, 4.5]


def test_files_of_earlier_versions_are_one_entry(tmp_path):
  old = {k: x for k, x in (HOW | FOUND).items() if k != 'data'}
  samples = [{'step': 100, 'scores': {'FID': 3.0}}]
  both = {**old, 'scores_of_samples': samples}
  (tmp_path / 'evaluation.json').write_text(json.dumps(both))
  assert record.read(tmp_path) == {
    'bounds': [old],
    'scores_of_samples': samples,
  }
  record.write_bound(tmp_path, HOW | FOUND | {'step': 200})
  again = record.read(tmp_path)
  assert [bound['step'] for bound in again['bounds']] == [100, 200]
  assert again['scores_of_samples'] == samples
  old = {'frechet_distance': 1.0, 'step': 7}
  (tmp_path / 'score.json').write_text(json.dumps(old))
  assert small_data.read(tmp_path) == [old]


def test_numbers_that_are_not_finite_are_never_written(tmp_path):
  record.write_bound(tmp_path, HOW | FOUND)
  before = (tmp_path / 'evaluation.json').read_bytes()
  for wrong in (float('nan'), float('inf')):
    with pytest.raises(errors.RunError, match='not finite'):
      record.write_bound(tmp_path, HOW | FOUND | {'rate': wrong})
    with pytest.raises(errors.RunError, match='not finite'):
      record.write_scores(tmp_path, {'step': 1, 'scores': {'FID': wrong}})
  assert (tmp_path / 'evaluation.json').read_bytes() == before
  assert len(list(tmp_path.iterdir())) == 1


def test_compare_names_how_each_number_was_made(tmp_path, capsys):
  for run, change, found in (
    ('a', {}, 4.001),
    ('a', {'weights': 'raw'}, 4.002),
    ('b', {'step': 300}, 4.003),
    ('b', {'split': 'test'}, 4.004),
    ('b', {'times_an_image': 1001, 'exact_in_t': True}, 4.005),
  ):
    (tmp_path / run).mkdir(exist_ok=True)
    record.write_bound(
      tmp_path / run, HOW | FOUND | change | {'bits_per_dim': found}
    )
  main.run(['--mode=compare', f'--workdir={tmp_path}'])
  out = capsys.readouterr().out
  lines = [
    line.strip('| ').split(' | ')
    for line in out.splitlines()
    if line.startswith('| ')
  ]
  titles, _, *rows = lines
  found = [dict(zip(titles, row, strict=True)) for row in rows]
  keys = 'run', 'step', 'weights', 'split', 'draws', 'bits/dim ≤'
  assert [tuple(row[key] for key in keys) for row in found] == [
    ('b', '100', 'EMA', 'test', '10', '4.004'),
    ('a', '100', 'EMA', 'train', '10', '4.001'),
    ('b', '300', 'EMA', 'train', '10', '4.003'),
    ('b', '100', 'EMA', 'train', 'all t', '4.005'),
    ('a', '100', 'raw', 'train', '10', '4.002'),
  ]


def test_kinds_of_scores_have_a_table_each(tmp_path, capsys):
  """Of an old score.json too, which does not say which weights."""
  folder = tmp_path / 'a'
  folder.mkdir()
  how = {'step': 5, 'seed': 0, 'sampler': 'ddim', 'sampler_steps': 20}
  small = {'frechet_distance': 0.5, 'precision': 1, 'recall': 1}
  small |= {'sure_share': 1, 'fake_images': 30}
  (folder / 'score.json').write_text(json.dumps(how | small))
  scores = {'FID@9': 7.25, 'IS': 2.0, 'IS_deviation': 0.1}
  entry = {**how, 'weights': 'raw', 'samples': 9, 'reference': 'digits'}
  record.write_scores(folder, entry | {'scores': scores})
  main.run(['--mode=compare', f'--workdir={tmp_path}'])
  out = capsys.readouterr().out
  first, second = out.split('\n\nScores of Inception\n\n')
  assert '| a | 5 |  | 30 | ddim, 20 steps | 0 | 0.500 |' in first
  assert (
    '| a | 5 | raw | 9 | ddim, 20 steps | digits | 0 | FID@9 7.25' in second
  )


DAMAGE = {
  'cut off': '{"bounds": [{"bits_per',
  'zeros': '\0' * 64,
  'not text': b'\xff\xfe\x00',
  'empty': '',
  'a list': '[1]',
  'a number': '7',
  'no list': '{"bounds": 3}',
  'no objects': '{"bounds": [1, 2]}',
  'deep': '[' * 100_000,
  'NaN': '{"bounds": [{"rate": NaN}]}',
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_file_costs_no_finished_work(damage, tmp_path, caplog):
  text = DAMAGE[damage]
  text = text.encode() if isinstance(text, str) else text
  (tmp_path / 'evaluation.json').write_bytes(text)
  assert record.read(tmp_path) == {}
  record.write_bound(tmp_path, HOW | FOUND)
  assert bits(tmp_path) == [4.0]
  (aside,) = tmp_path.glob('evaluation.json.damaged-*')
  assert aside.read_bytes() == text
  assert caplog.messages
  assert all('evaluation.json is damaged' in m for m in caplog.messages)
  assert not any('\n' in m for m in caplog.messages)


def test_compare_leaves_out_what_it_cannot_read_and_says_so(
  tmp_path, capsys, caplog
):
  for run in 'abc':
    (tmp_path / run).mkdir()
  record.write_bound(tmp_path / 'a', HOW | FOUND)
  (tmp_path / 'b' / 'evaluation.json').write_text('{"bits_per_dim": [3]}')
  (tmp_path / 'c' / 'score.json').write_text('{"frechet')
  main.run(['--mode=compare', f'--workdir={tmp_path}'])
  assert '| a | 100 |' in capsys.readouterr().out
  first, second = caplog.messages
  assert 'b: an entry is left out (' in first
  assert 'score.json is damaged' in second


def test_compare_leaves_cells_empty_that_a_file_does_not_tell(tmp_path, capsys):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'evaluation.json').write_text('{"bits_per_dim": 3}')
  main.run(['--mode=compare', f'--workdir={tmp_path}'])
  *_, row = capsys.readouterr().out.splitlines()
  cells = [cell.strip() for cell in row.strip('|').split('|')]
  assert [cell for cell in cells if cell] == ['a', '3.000']
