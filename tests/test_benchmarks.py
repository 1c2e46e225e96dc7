"""The programs behind the figures of the documentation still run."""

import pytest

import benchmarks.__main__ as program
from benchmarks import digits_sweep
from ddpm_jax import recipe
from ddpm_jax import validate


@pytest.mark.parametrize('name', digits_sweep.ROWS)
def test_every_row_of_the_sweep_is_a_recipe(name):
  changes = digits_sweep.ROWS[name]
  config = recipe.changed_copy(recipe.load('configs/digits.py'), changes)
  validate.check(config)
  validate.unread(config, changes)
  # A row that changes nothing measures nothing.
  assert (config == recipe.load('configs/digits.py')) == (not changes)


def test_the_sweep_draws_what_it_has_trained(monkeypatch):
  monkeypatch.setitem(digits_sweep.SAMPLER, 'sampler.steps', 2)
  monkeypatch.setattr(digits_sweep, 'SAMPLES', 3)
  changes = {'model.channels': 8, 'batch_size': 8, 'steps': 2}
  config = recipe.changed_copy(recipe.load('configs/digits.py'), changes)
  images, seconds = digits_sweep.trained(config)
  assert images.shape == (3, 8, 8, 1)
  assert seconds > 0


def test_the_networks_beside_pytorch_are_recipes():
  for spec, changes in program.NETWORKS.values():
    validate.check(recipe.changed_copy(recipe.load(spec), changes))


def test_what_cannot_be_measured_here_is_said():
  """The tests run on a CPU."""
  assert program.accelerator() == {'not measured': 'no GPU or TPU here'}


def test_a_section_that_is_not_known_is_said(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['benchmarks', 'first'])
  with pytest.raises(SystemExit, match='2'):
    program.main()
  assert (
    "no section 'first': choose of first_picture" in capsys.readouterr().err
  )


def test_the_machine_is_named():
  assert set(program.machine()) >= {'processor', 'cores', 'jax'}


@pytest.mark.slow
def test_the_judges_are_sure_of_real_digits():
  judges = digits_sweep.Judges()
  score = judges.score(judges.held_out)
  assert score['sure'] > 0.9
  assert score['svm'] > 0.9
  assert score['classes'] == 10
