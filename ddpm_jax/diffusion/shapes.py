"""Names for the array shapes in this package's signatures."""

import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Key

# Any shape, the same for all X of a call; an XLike may also be NumPy's.
X = Float[Array, '*shape']
XLike = Float[ArrayLike, '*shape']
# Broadcasts against an X.
Scale = Float[Array, '*#shape']
# A time, or times that broadcast against an X.
Time = Int[Array | np.ndarray, '*#shape'] | int

# B examples, such as x_0, x_t or ε.
Batch = Float[Array, 'B *shape']
# One per example.
Keys = Key[Array, 'B']
Times = Int[Array, 'B']
Values = Float[Array, 'B']
# One time for all examples.
Step = Int[Array, ''] | int
