"""How fast does the encoder read face crops? `python tools/bench_encoder.py [--config tiny mini]` prints a table.

The same weights and the same crops, read one frame at a time (the naive way, as a loop over a video would), in batches, in batches with channels last (the order of
numbers that convolutions like best), and compiled. The ways take turns in one process; a rate is crops a second, a ratio is the naive way's time over this one's, the
median over repeats. All ways must give the same features, or this ends with an error."""

import argparse
import statistics
import time

import torch

from fantasy_nb.expression import ExpressionConfig, ExpressionEncoder


def timed(read, crops, device):
    "Seconds, and features."
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    features = read(crops)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, features


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["tiny", "mini"], choices=["tiny", "mini", "pd_fgc"])
    parser.add_argument("--crops", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it wants a C++ compiler on the CPU)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, torch {torch.__version__}")
    for name in args.config:
        config = getattr(ExpressionConfig, name)()
        torch.manual_seed(0)
        encoder = ExpressionEncoder(config).to(device).eval()
        last = ExpressionEncoder(config).to(device, memory_format=torch.channels_last).eval()
        last.load_state_dict(encoder.state_dict())
        crops = torch.rand(args.crops, 3, config.image_size, config.image_size, device=device) * 2 - 1

        def batches(model, layout):
            return lambda x: torch.cat([model(part.contiguous(memory_format=layout)).pack() for part in x.split(args.batch)])

        ways = {
            "one frame at a time": lambda x, model=encoder: torch.cat([model(frame[None]).pack() for frame in x]),
            f"batches of {args.batch}": batches(encoder, torch.contiguous_format),
            "and channels last": batches(last, torch.channels_last),
        }
        if not args.no_compile:
            ways["and compiled"] = batches(torch.compile(last), torch.channels_last)
        times, want = {way: [] for way in ways}, None
        for repeat in range(-1, args.repeats):  # the first round warms up
            for way, read in ways.items():
                seconds, features = timed(read, crops, device)
                want = features if want is None else want
                if not (features - want).norm() <= 1e-3 * want.norm():  # nan differs, too
                    raise SystemExit(f"{name}, {way}: features differ by {(features - want).norm() / want.norm():.1e} of their size")
                if repeat >= 0:
                    times[way].append(seconds)
        for way, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["one frame at a time"], seconds))
            print(f"{name:8s}{way:22s}{args.crops / statistics.median(seconds):10.0f} crops/s{ratio:8.2f}x", flush=True)


if __name__ == "__main__":
    main()
