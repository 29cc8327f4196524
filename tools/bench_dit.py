"""How fast is our DiT beside diffusers' WanTransformer3DModel? `make bench`, or `python tools/bench_dit.py --quick`.

Thirty guided Euler steps, two branches each (prompt, empty prompt), image memory in both; the same weights, the same loop, one process, taking turns.
Ours makes every memory's keys and values once per sample with `prepare()`, inside the time that is measured. The ratio is diffusers' time over ours, the
median over repeats; on a machine that does other things too, read the ratio of CPU seconds. Memory is the peak of one step above weights and inputs
(CPU: every allocation counted by torch's profiler) or of the whole loop (CUDA). The films of both must agree, or this ends with an error."""

import argparse
import itertools
import os
import statistics
import sys
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from fantasy_nb.dit import DiT, DiTConfig, pad_text
from fantasy_nb.flow import euler, guide, time_grid
from fantasy_nb.pretrained import diffusers_name

CONFIG = DiTConfig(width=256, ffn=1024, heads=4, layers=8)  # 13 M parameters; image to video, text and picture as wide as Wan's
GUIDANCE, PROMPT, PICTURE = 5.0, 60, 257  # scale; tokens of the prompt and of the picture
AGREE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative difference of the two films, at most


def diffusers_twin(dit):
    "diffusers' WanTransformer3DModel with the same weights."
    from diffusers import WanTransformer3DModel

    c = dit.config
    twin = WanTransformer3DModel(
        c.patch, c.heads, c.width // c.heads, c.in_channels, c.out_channels, c.text_width, c.frequencies, c.ffn, c.layers,
        eps=c.eps, image_dim=c.image_width, added_kv_proj_dim=c.width if c.image_width else None)
    twin.load_state_dict({diffusers_name(name): p for name, p in dit.release_state_dict().items()})
    return twin.to(next(dit.parameters())).eval()


class Case(NamedTuple):
    "What both models are given."
    noise: torch.Tensor  # (1 16 t h w) float32
    picture_latents: torch.Tensor  # (1 20 t h w)
    prompts: list  # two (1 n d): empty, prompt
    picture: torch.Tensor  # (1 257 1280)


def draw_case(size, device, dtype):
    "Inputs of one size (t h w), the same every time."
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    prompts = [draw(1, n, CONFIG.text_width) for n in (1, PROMPT)]
    return Case(draw(1, 16, *size).float(), draw(1, 20, *size), prompts, draw(1, PICTURE, CONFIG.image_width))


def guided(branches, case, dtype):
    "v(x, t) of two branches; the sum over steps stays in float32."
    def velocity(x, t):
        seen = torch.cat([x.to(dtype), case.picture_latents], 1)
        return guide(*(branch(seen, 1000 * t).float() for branch in branches), GUIDANCE)
    return velocity


def our_branches(dit, prepare, case):
    "Keys and values once; then each branch is a call."
    memories = [prepare(text=text, image=case.picture) for text in case.prompts]
    return [lambda x, t, m=m: dit(x, t, memories=m) for m in memories]


def their_branches(twin, case):
    "diffusers takes the text at its full length, and the picture, in every call."
    texts = [pad_text(text, CONFIG.text_tokens) for text in case.prompts]
    return [lambda x, t, text=text: twin(x, t, text, case.picture, return_dict=False)[0] for text in texts]


def peak_of(device, call, *args):
    "Bytes that a call holds at most, above what was there before."
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(*args)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call(*args)
    events = sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


def timed(device, call, *args):
    "What a call returns; its seconds on the wall and on the processor."
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    wall, cpu = time.perf_counter(), time.process_time()
    answer = call(*args)
    sync()
    return answer, time.perf_counter() - wall, time.process_time() - cpu


def both(case, device, dtype, compiled):
    "run(name, steps, progress) -> film, for ours and diffusers, with the same weights."
    torch.manual_seed(0)
    dit = DiT(CONFIG)
    for p in dit.parameters():
        p.data += 0.02 * torch.randn_like(p)  # no gate, no branch and no head stays at zero
    dit = dit.to(device, dtype).eval()
    twin, prepare = diffusers_twin(dit), dit.prepare
    if compiled:
        dit, twin = torch.compile(dit), torch.compile(twin)
    branches = {"ours": lambda: our_branches(dit, prepare, case), "diffusers": lambda: their_branches(twin, case)}
    return lambda name, steps, progress=None: euler(guided(branches[name](), case, dtype), case.noise, time_grid(steps), progress)


@torch.no_grad()
def compare(size, steps, repeats, device, dtype, compiled):
    "Both models on one size, taking turns: their seconds and memory, and how far their films are apart."
    run, names = both(draw_case(size, device, dtype), device, dtype, compiled), ["ours", "diffusers"]
    films, seconds, memory = {}, {name: [] for name in names}, {}
    for name in names:
        run(name, 1)  # warm up, compile
        memory[name] = peak_of(device, run, name, 1 if device.type == "cpu" else steps)
    label = f"{'x'.join(map(str, size))} {'compiled' if compiled else 'eager'}"
    with tqdm(total=2 * repeats * steps, desc=label, unit="step", leave=False) as bar:
        for turn in range(repeats):
            for name in names if turn % 2 == 0 else names[::-1]:
                films[name], *spent = timed(device, run, name, steps, lambda *_: bar.update())
                seconds[name].append(spent)
    error = (films["ours"] - films["diffusers"]).norm() / films["diffusers"].norm()
    return seconds, memory, error.item()


def report(size, seconds, memory, error, what):
    "One paragraph of numbers."
    ratios = [[t / o for t, o in zip(theirs, ours)] for theirs, ours in zip(seconds["diffusers"], seconds["ours"])]
    wall, cpu = ([r[i] for r in ratios] for i in (0, 1))
    middle = lambda name, i: statistics.median(s[i] for s in seconds[name])
    spread = f" ({min(wall):.2f} to {max(wall):.2f})" if len(wall) > 1 else ""
    print(f"{size[0] * size[1] * size[2] // 4:,} tokens ({'x'.join(map(str, size))} latents), {what}")
    print(f"  ratio {statistics.median(wall):.2f}{spread} on the wall, {statistics.median(cpu):.2f} in CPU seconds; relative difference {error:.1e}")
    for name in seconds:
        print(f"  {name:10} {middle(name, 0):7.2f} s on the wall, {middle(name, 1):7.2f} CPU s; {memory[name] / 2**20:6.1f} MiB at the peak, above weights")


def latent_size(text):
    "'4x20x20' -> (4, 20, 20)."
    size = tuple(map(int, text.split("x")))
    if len(size) != 3 or size[1] % 2 or size[2] % 2:
        raise argparse.ArgumentTypeError(f"want latent frames x rows x columns, the last two even, got {text}")
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=latent_size, nargs="+", default=[(4, 20, 20), (6, 32, 32)], help="latents, as 4x20x20 (400 tokens)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice if left out")
    parser.add_argument("--quick", action="store_true", help="2 steps, once, 400 tokens only")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repeats, args.sizes = 2, 1, args.sizes[:1]
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available() and not args.cpu
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} of {os.cpu_count()} cores, load before the start {os.getloadavg()[0]:.1f}"
    print(f"{args.steps} guided steps, {args.repeats} times; {str(dtype)[6:]}; {machine}")
    apart = 0
    for size in args.sizes:
        for compiled in (False, True) if cuda else (False,):
            seconds, memory, error = compare(size, args.steps, args.repeats, device, dtype, compiled)
            report(size, seconds, memory, error, "compiled" if compiled else "eager")
            apart += not error <= AGREE[dtype]  # nan differs, too
    return f"{apart} comparisons differ by more than {AGREE[dtype]:.0e}" if apart else 0


if __name__ == "__main__":
    sys.exit(main())
