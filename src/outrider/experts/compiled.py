"""`@compiled`: numba's njit at the first call, so that importing experts costs neither numba nor a compiler. Pure.

Compiled code is cached on disk by numba, beside the file or in the user's cache. A compiled function may not call
another one: numba's cache would miss a change in the other file.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, compiled when it is first called."""
    kernels: list[Callable[P, T]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not kernels:
            from numba import njit  # heavy: 0.4 s, and an optional dependency of the package

            kernels.append(njit(cache=True)(function))
        return kernels[0](*args, **kwargs)

    return call
