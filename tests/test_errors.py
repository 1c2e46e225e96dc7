"""Errors for the user: what is missing, and what is broken."""

import pytest

from ddpm_jax import errors

NEEDED = {'what': '--mode=x', 'install': 'pip install it'}


def test_an_optional_package_that_is_missing_is_said_with_its_command():
  for find in (errors.optional, errors.find_optional):
    with pytest.raises(errors.UserError) as caught:
      find('nowhere_to_be_found', **NEEDED)
    assert str(caught.value) == (
      '--mode=x needs the package nowhere_to_be_found: pip install it'
    )


def test_a_package_that_is_broken_is_not_one_that_is_missing(
  tmp_path, monkeypatch
):
  (tmp_path / 'broken_here.py').write_text('import nowhere_to_be_found\n')
  (tmp_path / 'whole_here.py').write_text('answer = 42\n')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(errors.UserError, match='fails to import') as caught:
    errors.optional('broken_here', **NEEDED)
  assert "No module named 'nowhere_to_be_found'" in str(caught.value)
  assert errors.optional('whole_here', **NEEDED).answer == 42
  found = errors.find_optional('whole_here', **NEEDED)
  assert found == tmp_path / 'whole_here.py'


def test_a_long_list_of_names_is_cut_to_the_nearest():
  known = [f'key.{i}' for i in range(90)]
  message = str(errors.unknown('key', 'kye.17', known, others='see there'))
  assert message.count('key.') == 4  # the guess, and three
  assert message.endswith('; see there')
