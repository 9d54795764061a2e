"""Kernels for accelerators, each beside plain code that computes the same.

A file such as `low_rank` has operations. Each is plain torch code, which is what a CPU runs, and an operator of
torch.library, which launches a Triton kernel; `choice.use_kernels` decides between them. The Triton code is in
`triton_kernels`, imported when an operator is first called: a CPU never imports triton.

No kernel has run on a card yet. The tests run them in Triton's interpreter, on a CPU, and compile them for sm_80, sm_89
and sm_90.
"""
