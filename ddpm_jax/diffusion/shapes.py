"""The shapes in the signatures of this package, by name."""

import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Key

# An array of any shape; all of one call have the same. `Like`: or its numbers.
X = Float[Array, '*shape']
XLike = Float[ArrayLike, '*shape']
# Broadcasts against an X.
Scale = Float[Array, '*#shape']
# A time, or times in a shape that broadcasts against that of an X.
Time = Int[Array | np.ndarray, '*#shape'] | int

# B examples, such as x_0, x_t or ε.
Batch = Float[Array, 'B *shape']
# One for each example.
Keys = Key[Array, 'B']
Times = Int[Array, 'B']
Values = Float[Array, 'B']
# One time for all examples.
Step = Int[Array, ''] | int
