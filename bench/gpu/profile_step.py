"""Where the time of one training step goes, kernel by kernel: torch.profiler's table of ours at r=256."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.common import Results, base_on_device, compute_dtype, options, synchronize
from bench.gpu.speed import prepared, step

SHOWN = 30


def main() -> None:
    args = options(__doc__)
    device, results = torch.device(args.device), Results(args.out, "profile")
    model = prepared("ours r=256", base_on_device(args.shape, args.layers, device, compute_dtype(device)))
    tokens = args.tokens[len(args.tokens) // 2]
    step(model, tokens, device)
    on_card = device.type != "cpu"
    activities = [ProfilerActivity.CPU]
    if on_card:
        activities.append(getattr(ProfilerActivity, {"xpu": "XPU"}.get(device.type, "CUDA")))
    with profile(activities=activities) as measured:
        step(model, tokens, device)
        synchronize(device)
    # on a card the rows that are kernels; on a CPU its operators
    rows = [
        (event.key, event.count, event.self_device_time_total if on_card else event.self_cpu_time_total)
        for event in measured.key_averages()
        if not on_card or event.device_type.name != "CPU"
    ]
    total = sum(time for _, _, time in rows)
    for name, count, time in sorted(rows, key=lambda row: -row[2])[:SHOWN]:
        results.add(tokens=tokens, kernel=name, launches=count, microseconds=time, share=time / total)
    results.add(tokens=tokens, kernel="all of them", launches=sum(n for _, n, _ in rows), microseconds=total, share=1.0)


if __name__ == "__main__":
    main()
