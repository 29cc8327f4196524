"""What a step of Wan2.1-I2V-14B costs, with random weights: a plain port of the released loop, diffusers, ours, ours compiled; taking turns in one process.

    python tools/bench_wan.py                                      a small model of the same shape on this CPU
    python tools/bench_wan.py --device cuda --size 480p            the true one: 14 billion random numbers, 81 frames, two people
    python tools/bench_wan.py --device cuda --size 480p --memory   and each way of holding them (chapter 13, `MEMORY`)

A forward is one network evaluation; a guided step is two (without expression, with it), three with text guidance. The released loop makes keys and values of
512 text places anew in every forward and turns positions in float64. diffusers has no expression memory: its forward lacks that work (0.5 % of the operations
at full size). "Share" is counted operations a second against square matrix products of the same precision on the same device, measured in the same run; making keys and values
is not counted (ours has made them before, the others make them in every forward).
Answers must agree, or this ends with an error."""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import fantasy_nb.dit as dit_module
from fantasy_nb.dit import DiT, DiTConfig, as_diffusers, pad_text
from fantasy_nb.pretrained import dit_flops, diffusers_name
from fantasy_nb.regions import add_expression

SIZES = {  # dimensions, tokens (frames, rows, columns), width of the expression tokens
    "small": (DiTConfig(width=512, ffn=1382, heads=4, layers=4, text_width=256, image_width=320), (3, 15, 26), 256),
    "480p": (DiTConfig.wan_14b(), (21, 30, 52), 2048),
    "720p": (DiTConfig.wan_14b(), (21, 45, 80), 2048),
}
AGREE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative difference of two answers, at most


def random_dit(config, token_width, device, dtype):
    "A DiT with the expression memory, filled on its device."
    with torch.device("meta"):
        dit = add_expression(DiT(config), token_width)
    dit = dit.to(dtype).to_empty(device=device).eval()
    g = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            p.normal_(generator=g).mul_(0.02 if p.ndim == 1 or "modulation" in name else p[0].numel() ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return dit


def draw_case(config, grid, token_width, people, device, dtype):
    "What a forward is given: latents, prompt, picture, 97 expression tokens a person in each latent frame, the mask."
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    t, h, w = grid
    owners = torch.randint(0, people + 1, (t, h * w), generator=g).to(device)
    mask = (owners[..., None] == 1 + torch.arange(people, device=device)) | (owners == 0)[..., None]
    told = dict(text=draw(1, 1, config.text_width), image=draw(1, 257, config.image_width), expression=draw(1, t, 97 * people, token_width))
    return draw(1, config.in_channels, t, 2 * h, 2 * w), told, mask.repeat_interleave(97, -1)[None]


def double_rope(x, rope):
    "Positions as in the release: complex numbers of 128 bits."
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rope.double())[:, None]).flatten(-2).type_as(x)


def contestants(dit, x, told, mask, device, compiled):
    "name -> a forward at time t."
    memories = dit.prepare(**told)

    def release(t):
        with mock.patch.object(dit_module, "apply_rope", double_rope):
            padded = told | {"text": pad_text(told["text"], dit.config.text_tokens)}
            return dit(x, t, **padded, expression_mask=mask)

    def ours(t):
        return dit(x, t, memories=memories, expression_mask=mask)

    yield "the released loop", release
    twin = diffusers_twin(dit)
    text = pad_text(told["text"], dit.config.text_tokens)
    yield "diffusers, without expression", lambda t: twin(x, t, text, told["image"], return_dict=False)[0]
    yield "ours", ours
    if compiled:
        forwards = [torch.compile(block.forward) for block in dit.blocks]

        def quick(t):
            with contextlib.ExitStack() as stack:
                for block, forward in zip(dit.blocks, forwards):
                    stack.enter_context(mock.patch.object(block, "forward", forward))
                return ours(t)

        yield "ours, blocks compiled", quick


def diffusers_twin(dit):
    "diffusers' WanTransformer3DModel on the same tensors."
    from diffusers import WanTransformer3DModel

    c = dit.config
    with torch.device("meta"):
        twin = WanTransformer3DModel(c.patch, c.heads, c.width // c.heads, c.in_channels, c.out_channels, c.text_width, c.frequencies, c.ffn, c.layers, eps=c.eps, image_dim=c.image_width, added_kv_proj_dim=c.width)
    base = {diffusers_name(name): p for name, p in dit.release_state_dict().items() if "ip_adapter" not in name}
    twin.load_state_dict(base, assign=True)
    fresh = WanTransformer3DModel(c.patch, c.heads, c.width // c.heads, num_layers=0, rope_max_seq_len=1024)
    twin.rope = fresh.rope.to(next(dit.parameters()).device)  # its buffers cannot be made on the meta device
    return twin.eval()


class Clock:
    "Seconds and peak memory of a call."

    def __init__(self, device):
        self.cuda, self.device = device.type == "cuda", device

    def __call__(self, call):
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        out = call()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return out, time.perf_counter() - start, torch.cuda.max_memory_allocated(self.device) / 1e9 if self.cuda else float("nan")


def matmul_rate(device, dtype, clock):
    "Operations a second in square matrix products."
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    clock(lambda: a @ b)
    return 2 * n**3 / min(clock(lambda: [a @ b for _ in range(4)])[1] / 4 for _ in range(5))


def compare(args, device, dtype):
    "Rows of the table: name, seconds a forward, GB, share of the matrix products' rate."
    config, grid, token_width = SIZES[args.size]
    dit, clock = random_dit(config, token_width, device, dtype), Clock(device)
    x, told, mask = draw_case(config, grid, token_width, args.people, device, dtype)
    calls = dict(contestants(dit, x, told, mask, device, args.compile))
    moment, answers, seconds, peaks = torch.tensor([437.0], device=device), {}, {name: [] for name in calls}, {}
    for name, call in tqdm(calls.items(), desc="first calls"):
        answers[name] = clock(partial(call, moment))[0].float()
    plain = dit(x, moment, **{k: v for k, v in told.items() if k != "expression"}).float()
    for name, answer in answers.items():
        want = plain if name.startswith("diffusers") else answers["ours"]
        apart = ((answer - want).norm() / want.norm()).item()
        if not apart <= AGREE[dtype]:
            raise ValueError(f"{name} answers otherwise: relative difference {apart:.1e}")
    for _ in tqdm(range(args.repeats), desc="taking turns"):
        for name, call in calls.items():
            _, took, peaks[name] = clock(partial(call, moment))
            seconds[name].append(took)
    rate = matmul_rate(device, dtype, clock)
    flops = {}
    for name in calls:
        text, heard = 2 if name.startswith("ours") else config.text_tokens, 0 if name.startswith("diffusers") else 97 * args.people
        flops[name] = sum(dit_flops(config, grid, text, 257, heard).values())
    return [{"what": name, "seconds a forward": statistics.median(t), "guided step": 2 * statistics.median(t), "GB": peaks[name], "share": flops[name] / statistics.median(t) / rate} for name, t in seconds.items()], rate


def hold(dit, mode, device, dtype):
    "One way of holding a DiT's weights that wait on the CPU."
    if mode == "gpu":
        return dit.to(device)
    if mode == "float8":
        as_diffusers(dit).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        return dit.to(device)
    if mode == "groups":  # by layers, none fetched ahead: what runs is the DiT, not its host (chapter 06)
        as_diffusers(dit).enable_group_offload(device, use_stream=device.type == "cuda")
        return dit
    from accelerate import cpu_offload

    return cpu_offload(dit, device)


def memory_ways(args, device, dtype):
    "Rows: seconds of one forward (the second of two) and peak memory of each way."
    config, grid, token_width = SIZES[args.size]
    x, told, mask = draw_case(config, grid, token_width, args.people, device, dtype)
    clock, rows = Clock(device), []
    gc.collect()
    for mode in tqdm(("gpu", "float8", "groups", "sequential"), desc="ways of holding weights"):
        dit = hold(random_dit(config, token_width, torch.device("cpu") if mode != "gpu" else device, dtype), mode, device, dtype)
        memories = dit.prepare(**told)
        forward = partial(dit, x, torch.tensor([437.0], device=device), memories=memories, expression_mask=mask)
        clock(forward)
        _, took, peak = clock(forward)
        rows.append({"what": mode, "seconds a forward": took, "GB": peak})
        del dit, memories, forward
        gc.collect()  # hooks and what they hook into hold each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def table(rows):
    "Markdown."
    shown = lambda v: v if isinstance(v, str) else "-" if v != v else f"{v:.3g}"  # noqa: E731
    lines = ["| " + " | ".join(rows[0]) + " |", "|-" * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(shown(v) for v in row.values()) + " |" for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--people", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="also ours with compiled blocks (default: on CUDA)")
    parser.add_argument("--memory", action="store_true", help="also each way of holding the weights")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="write all numbers as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_wan: want --device cpu: there is no CUDA device here")
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    with torch.no_grad():
        rows, rate = compare(args, device, dtype)
        print(f"\n{args.size} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'this CPU'}, {args.dtype or dtype}, {args.people} people; matrix products {rate / 1e12:.3g} TFLOP/s\n\n{table(rows)}")
        ways = memory_ways(args, device, dtype) if args.memory else []
        if ways:
            print(f"\n{table(ways)}")
    if args.out:
        args.out.write_text(json.dumps({"arguments": vars(args) | {"out": str(args.out)}, "rate": rate, "forwards": rows, "memory": ways}, indent=1))


if __name__ == "__main__":
    main()
