"""How many clips a second, and how much of the machine is used? `python tools/bench_train.py [--config tiny] [--kind stills] [--bf16] [--processes 2]`

Random latents of two people in the shape that training has; steps of `fantasy_nb.train.train`, the first three not counted. Model FLOPs are counted by torch (forward and backward of
one step); the rate they are compared with is that of a square matrix product in the same precision, in the same run, with as many processes at once."""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from fantasy_nb.core import default_device
from fantasy_nb.train import PICTURES, STAGES, Animator, LatentClips, animator_loss, make_accelerator, owners_from_portrait, start_processes, step_generator, train


def random_cache(folder: Path, config: str, kind: str, token: int, clips: int = 16) -> None:
    "Clips of noise for two people."
    (clip, _, _), g = PICTURES[config][kind], torch.Generator().manual_seed(0)
    h, w = clip.size(2)
    moments = clip.frames if clip.stills else (clip.frames - 1) // 4 + 1
    boxes = torch.tensor([[0.10 * w, 0.2 * h, 0.40 * w, 0.9 * h], [0.60 * w, 0.2 * h, 0.90 * w, 0.9 * h]])
    rows = {}
    for k in range(clips):
        rows |= {f"{k}.latents": torch.randn(48, moments, h // 8, w // 8, generator=g).half(), f"{k}.features": torch.randn(2, clip.frames, 554, generator=g).half(),
                 f"{k}.owners": owners_from_portrait(boxes, (h, w), 1 if clip.stills else clip.frames, token), f"{k}.weight": torch.ones(1, moments, h // 8, w // 8).half()}
    save_file(rows, folder / "clips-000000.safetensors")


def matmul_rate(dtype: torch.dtype, device, size: int = 1024, seconds: float = 2.0) -> float:  # FLOP/s
    "Of square matrix products."
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    (a @ b).sum().item()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            c = a @ b
        c.sum().item()
        count += 5
    return count * 2 * size**3 / (time.perf_counter() - began)


def measure(arguments: list[str]) -> int:
    "In this process, and all others that run the same."
    args = build_parser().parse_args(arguments)
    device, accelerator = default_device(), make_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    animator = getattr(Animator, args.config)().to(device).train()
    config = replace(STAGES["stills" if args.kind == "stills" else "clips"][1], loss="latents", steps=args.steps + 3, batch=args.batch, bf16=args.bf16)
    with tempfile.TemporaryDirectory() as folder:
        random_cache(Path(folder), args.config, args.kind, 8 * animator.dit.config.patch[1])
        clips = LatentClips(Path(folder))
    rate = matmul_rate(torch.bfloat16 if args.bf16 else torch.float32, device)
    batch = {name: value.to(device) for name, value in clips.stack([k % len(clips) for k in range(args.batch // world)]).items()}
    with FlopCounterMode(display=False) as counter:
        animator_loss(animator, batch, config, step_generator(0, 0)).loss.backward()
    times = []
    train(animator, clips, config, show=False, watch=lambda *_: times.append(time.perf_counter()))
    seconds, work = (times[-1] - times[2]) / (len(times) - 3), counter.get_total_flops()
    if world > 1:
        rate, work = accelerator.reduce(torch.tensor([rate, float(work)], device=device)).tolist()
    if rank == 0:
        print(f"{args.config} {args.kind}, batch {args.batch}, {'bfloat16' if args.bf16 else 'float32'}, {world} process{'es' if world > 1 else ''} of {torch.get_num_threads()} threads on {device}: "
              f"{args.batch / seconds:.2f} clips a second, {work / 1e9:.1f} GFLOP a step, {work / seconds / 1e9:.1f} GFLOP/s of {rate / 1e9:.1f} in matrix products: {work / seconds / rate:.0%}", flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench_train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(PICTURES), default="tiny")
    parser.add_argument("--kind", choices=["stills", "clips"], default="stills")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    return parser


if __name__ == "__main__":
    asked = build_parser().parse_args().processes
    if asked == 1:
        sys.exit(measure(sys.argv[1:]))
    sys.path.insert(0, os.path.dirname(__file__))
    import bench_train

    sys.exit(start_processes(asked, sys.argv[1:], bench_train.measure))
