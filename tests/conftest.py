"""The suite runs on eight virtual CPU devices.

Most of its time is compilation, so the compiler optimises less; the programs
that `test_main.py` starts are compiled as a user's are.
"""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
