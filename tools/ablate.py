"""Train chapter 12's ablations: `python tools/ablate.py [--out runs/ablate] [--seeds 0 1 2] [--steps 500]` writes OUT/NAME-SEED, goes on where it was stopped, and says how to judge them.

All start from one base, whose expression memory and tokens begin anew; everything else is frozen. The scenes are drawn and encoded once (OUT/cache: MediaPipe finds the drivers' landmarks there, too).
OUT/made-of.json says what OUT is made of: another base, other scenes or steps want another OUT."""

import argparse
import csv
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fantasy_nb.animate import resize
from fantasy_nb.core import data_samples, tile_frames
from fantasy_nb.data import SceneClips
from fantasy_nb.exprbench import ABLATIONS, RULES, Benchmark, Studio, encode_both, train_ablation
from fantasy_nb.expression import ExpressionEncoder
from fantasy_nb.train import PICTURES, Animator, as_heard, encode_clips, fingerprint, stamp_cache
from fantasy_nb.vae import VideoVAE


def picture(out: Path, names: list[str], seed: int) -> Path:
    "Three people, two moments, the truth and every ablation: OUT/ablations.jpg."
    import cv2

    case = Benchmark.multi().case(3, seed, 2)
    films = [case.film[1:]] + [Studio(out / f"{name}-{seed}", name if name in RULES else "full").film(case) for name in names]
    sheet = tile_frames(np.concatenate([film[[8, 18]] for film in films]), columns=2)
    path = out / "ablations.jpg"
    cv2.imwrite(str(path), resize(sheet, (2 * sheet.shape[0], 2 * sheet.shape[1]))[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=data_samples("weights", "tiny"), help="weights of size tiny to start from (default: the shipped ones)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--names", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--scenes", type=int, default=2000, help="to draw, each used in a mirror as well (default: 2000)")
    parser.add_argument("--picture", action="store_true", help="only write OUT/ablations.jpg, of the first seed")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.picture:
        print(picture(args.out, args.names, args.seeds[0]))
        return
    vae, encoder = VideoVAE.from_pretrained(args.base / "vae").eval(), ExpressionEncoder.from_pretrained(args.base / "encoder").eval()
    pictures = as_heard(PICTURES["tiny"]["stills"][0], encoder)
    parts = {"vae": vae, "encoder": encoder, "base": Animator.from_pretrained(args.base)}
    try:
        stamp_cache(args.out, asdict(pictures) | {name: fingerprint(part) for name, part in parts.items()} | {"scenes": args.scenes, "steps": args.steps})
    except ValueError as error:
        sys.exit(f"ablate: {error}".replace("--cache", "--out"))
    encode_clips(SceneClips(pictures), args.scenes, args.out / "cache", vae, encoder, encode_both)
    for seed in args.seeds:
        for name in args.names:
            out = args.out / f"{name}-{seed}"
            if not (out / "pipeline.json").is_file():
                train_ablation(args.base, args.out / "cache", ABLATIONS[name], out, seed, args.steps)
            last = [float(row["loss"]) for row in csv.DictReader(open(out / "log.csv"))][-50:]
            print(f"{name}, seed {seed}: loss of the last 50 steps {sum(last) / len(last):.4f}, weights in {out}", flush=True)
    weights = " ".join(f"{name}={args.out}/{name}-{{seed}}" for name in args.names)
    print(f"fantasy-bench --clips 10 --seeds {' '.join(map(str, args.seeds))} --methods {','.join(args.names)},still,vae --weights default={args.base} {weights}")


if __name__ == "__main__":
    main()
