"""Several processes as one run: the group, launching, heartbeats, and DeepSpeed ZeRO.

In this package "rank" is the number of a process. The rank of an adapter is always written ``adapter.rank``.
"""
