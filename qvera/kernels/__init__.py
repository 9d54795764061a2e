"""Kernels for accelerators, each beside plain torch code that computes the same; `choice.use_kernels` decides.

`triton_kernels` is imported at an operator's first call, so a CPU never imports triton.
No kernel has run on a card yet. Tests run them in Triton's interpreter and compile them for sm_80, sm_89 and sm_90.
"""
