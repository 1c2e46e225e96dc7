"""What runs the suite for those who fork, and before a commit, is in order."""

import pathlib
import shlex
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOW = ROOT / '.github/workflows/ci.yml'
HOOKS = ROOT / '.pre-commit-config.yaml'
CI = (ROOT / '.ci/run').read_text()


def test_their_yaml_is_clean():
  subprocess.run(
    [
      *(sys.executable, '-m', 'yamllint', '--strict'),
      *('-d', '{extends: default}', WORKFLOW, HOOKS),
    ],
    check=True,
  )


def test_the_workflow_runs_what_must_pass_on_both_stacks():
  job = yaml.safe_load(WORKFLOW.read_text())['jobs']['ci']
  assert {'run': '.ci/run'} in job['steps']
  new = [v >= '3.12' for v in job['strategy']['matrix']['python']]
  assert set(new) == {False, True}


def test_the_hooks_run_the_tools_of_ci():
  (repo,) = yaml.safe_load(HOOKS.read_text())['repos']
  tools = {shlex.split(hook['entry'])[0] for hook in repo['hooks']}
  assert tools == {'ruff', 'mypy'}
  assert all(f'in_venv first {tool}' in CI for tool in tools)
