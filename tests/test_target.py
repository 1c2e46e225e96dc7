"""Topologies by name."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax import errors
from ddpm_jax.parallel import meshes
from ddpm_jax.planning import topology

pytestmark = pytest.mark.eight_devices

GIVEN = {
  'tpu': importlib.util.find_spec('libtpu'),
  'cuda': importlib.util.find_spec('jax_cuda13_plugin'),
}


@pytest.mark.parametrize(
  'name',
  ['v9:2x2', 'v5e', 'v5e-16', 'v5e:', 'v5e:0x4', 'h100:8', 'cpu:2x2', ''],
)
def test_an_unknown_topology_is_a_line_that_names_the_known(name):
  with pytest.raises(errors.UserError, match=r'v5e:4x4.*v6e:16x16') as caught:
    topology.find(name)
  assert '\n' not in str(caught.value)


def test_more_virtual_devices_than_there_are_is_a_line():
  assert len(jax.devices()) == 8  # from here on there are no more
  with pytest.raises(errors.UserError, match='this process has 8'):
    topology.find('cpu:9')


def test_fewer_virtual_devices_are_the_first():
  assert topology.find('cpu:4').devices == jax.devices()[:4]


@pytest.mark.parametrize(
  ('name', 'extra'), [('v5e:4x4', '[plan]'), ('h100:1x8', '[plan-cuda]')]
)
def test_without_its_compiler_the_command_to_install_is_named(name, extra):
  if GIVEN['cuda' if 'h100' in name else 'tpu']:
    pytest.skip('it is installed')
  with pytest.raises(errors.UserError) as caught:
    topology.find(name)
  assert f"pip install -e '.{extra}'" in str(caught.value)


@pytest.mark.skipif(not GIVEN['tpu'], reason='no libtpu')
@pytest.mark.parametrize(
  ('name', 'devices', 'processes'),
  [
    ('v4:1x1x1', 1, 1),
    ('v4:2x2x1', 4, 1),
    ('v4:4x8x8', 256, 64),
    ('v5e:1x1', 1, 1),
    ('v5e:16x16', 256, 64),
    ('v5p:4x8x8', 256, 64),
    ('v6e:4x4', 16, 4),
  ],
)
def test_a_chip_is_a_device(name, devices, processes):
  found = topology.find(name)
  assert len(found.devices) == devices
  assert len({d.process_index for d in found.devices}) == processes


@pytest.mark.skipif(not GIVEN['tpu'], reason='no libtpu')
def test_a_shape_that_there_is_not_is_a_line():
  with pytest.raises(errors.UserError, match='v5e:3x5') as caught:
    topology.find('v5e:3x5')
  assert '\n' not in str(caught.value)


@pytest.mark.skipif(not GIVEN['tpu'], reason='no libtpu')
def test_an_image_is_cut_over_devices_of_one_process():
  """Each brings whole images, and here they have four devices each."""
  devices = topology.find('v5e:4x4').devices
  mesh = meshes.make_mesh(2, 2, 4, devices=devices)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'spatial': 4}
  for row in mesh.devices.reshape(4, 4):
    assert len({d.process_index for d in row}) == 1
  with pytest.raises(errors.UserError, match=r'the 4 device.* of a process'):
    meshes.make_mesh(1, 1, 8, devices=devices)


@pytest.mark.slow
@pytest.mark.skipif(not GIVEN['tpu'], reason='no libtpu')
@pytest.mark.parametrize('kind', topology.TPUS)
def test_the_memory_of_a_chip_is_what_its_compiler_gives(kind):
  """It says so when a program wants more."""
  side = '1x1x1' if kind in ('v4', 'v5p') else '1x1'
  found = topology.find(f'{kind}:{side}')
  sharding = jax.sharding.SingleDeviceSharding(found.devices[0])
  x = jax.ShapeDtypeStruct((2**30, 1024), jnp.float32, sharding=sharding)
  lowered = jax.jit(lambda x: jnp.sort(x, axis=0).sum(0)).trace(x)
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    lowered.lower(lowering_platforms=('tpu',)).compile()
  gib = re.search(r'(?:HBM \(|of )([\d.]+)G', str(caught.value))[1]
  assert float(gib) * topology.GIB == found.chip.memory


@pytest.mark.skipif(not GIVEN['cuda'], reason='no CUDA plugin')
def test_hosts_of_gpus_are_processes():
  found = topology.find('h100:2x8')
  assert len(found.devices) == 16
  assert len({d.process_index for d in found.devices}) == 2
