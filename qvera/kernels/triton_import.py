"""`tl` and `jit` of triton for the files that hold kernels.

They can be imported where there is no triton, which is any machine without a card; nobody calls a kernel there.
"""

from typing import Any

try:
    import triton
    from triton import language
except ImportError:
    triton = language = None

tl: Any = language
jit: Any = (lambda kernel: kernel) if triton is None else triton.jit
