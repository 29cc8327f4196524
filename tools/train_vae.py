"""Train a VAE on the synthetic world and store it: `tools/train_vae.py data_samples/weights/tiny/vae --config tiny --steps 650`.

Renders a bank of clips (kept in --bank), solves the linear code, trains the network beside it, measures it on people
never seen in training, and writes config.json, model.safetensors (float16) and training.json.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fantasy_nb.core import atomic
from fantasy_nb.faces import Scene, random_motion, render_scene
from fantasy_nb.vae import LinearCode, VAEConfig, VideoVAE, charbonnier, edge_error, from_blocks, measure_latents, to_blocks, train_vae

PEOPLE = (1, 2, 1, 2, 1, 2, 1, 2, 1, 3)
WIDTH = {1: 128, 2: 192, 3: 256}


def render_bank(base: int, count: int, frames: int):
    "Clips (3 f 128 w) uint8 and their face boxes (f p 4); two in three at 25 fps, the rest at 12 (more motion)."
    clips, boxes = [], []
    for i in range(count):
        people = PEOPLE[i % 10]
        motions = [random_motion(frames, base * 10 + i * 7 + k, fps=25 if i % 3 else 12) for k in range(people)]
        shown, box, _ = render_scene(Scene.sample(people, base + i), motions, (128, WIDTH[people]))
        clips.append((shown * 255).round().byte().transpose(0, 1).contiguous())
        boxes.append(box)
    return {"clips": clips, "boxes": boxes}


def whole(clip):
    return clip[None].float() / 127.5 - 1


def face_mask(clip, boxes, inside: float):
    "1 outside, `inside` in face boxes: (1 1 f h w)."
    mask = torch.ones(1, 1, *clip.shape[1:])
    for t, frame in enumerate(boxes.int().tolist()):
        for x0, y0, x1, y1 in frame: mask[..., t, y0:y1, x0:x1] = inside
    return mask


def face_crops(bank, batch=4, size=64, seed=0):
    "Endless crops (batch 3 f size size); three in five near a face, half mirrored, some backwards."
    g = torch.Generator().manual_seed(seed)
    rand, pick = lambda: torch.rand(1, generator=g).item(), lambda n: int(torch.randint(n, (1,), generator=g))
    while True:
        crops = []
        for _ in range(batch):
            i = pick(len(bank["clips"]))
            clip, boxes = bank["clips"][i], bank["boxes"][i][0]
            h, w = clip.shape[-2:]
            y, x = pick(h - size + 1), pick(w - size + 1)
            if rand() < 0.6:
                x0, y0, x1, y1 = boxes[pick(len(boxes))].tolist()
                x = int(min(max((x0 + x1 - size) / 2 + 40 * rand() - 20, 0), w - size))
                y = int(min(max((y0 + y1 - size) / 2 + 40 * rand() - 20, 0), h - size))
            crop = clip[:, :, y : y + size, x : x + size]
            if rand() < 0.5: crop = crop.flip(-1)
            if rand() < 0.3: crop = crop.flip(1)
            crops.append(crop)
        yield torch.stack(crops).float() / 127.5 - 1


@torch.no_grad()
def measure(rebuild, bank):
    "Mean over clips of PSNR (whole picture, first frame, face boxes) and of the two parts of the loss."
    db = lambda error: -10 * math.log10(error.mean().item())
    rows = []
    for clip, boxes in zip(bank["clips"], bank["boxes"]):
        video = whole(clip)
        error = video - rebuild(video).clamp(-1, 1)
        squared = (error / 2) ** 2
        face = squared.mean(1, keepdim=True)[face_mask(clip, boxes, 0.0) == 0]
        rows.append((db(squared), db(squared[:, :, 0]), db(face), charbonnier(error).item(), edge_error(error).item()))
    names = {"whole": 2, "first": 2, "face": 2, "error": 5, "edges": 5}  # digits kept
    return {name: round(sum(column) / len(column), digits) for (name, digits), column in zip(names.items(), zip(*rows))}


def pca_alone(code: LinearCode):
    "The code's own components, each block by itself: the baseline. (What of the mean lies outside them is lost; next to nothing.)"
    axes = torch.nn.functional.normalize(code.down.weight.detach(), dim=1)
    return lambda video: from_blocks(to_blocks(video) @ axes.T @ axes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", choices=["tiny", "mini"], default="tiny", help="size of the VAE")
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--every", type=int, default=200, help="steps between measurements")
    parser.add_argument("--bank", type=Path, default=Path("runs/vae_bank.pt"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if not args.bank.exists():
        args.bank.parent.mkdir(parents=True, exist_ok=True)
        drawn = {"train": render_bank(100_000, args.clips, 9), "test": render_bank(900_000, 14, 17)}
        with atomic(args.bank) as part:
            torch.save(drawn, part)
    bank = torch.load(args.bank)
    train, test = bank["train"], bank["test"]
    if len(train["clips"]) != args.clips:
        sys.exit(f"train_vae: want a bank of {args.clips} clips, got {len(train['clips'])} in {args.bank}: name another --bank, or remove it")
    start, vae = time.time(), VideoVAE(getattr(VAEConfig, args.config)())
    videos = [whole(clip) for clip in train["clips"]]
    vae.code.fit(videos, [face_mask(clip, boxes, 3.0) for clip, boxes in zip(train["clips"], train["boxes"])])
    summary = {"PCA, each block by itself": measure(pca_alone(vae.code), test), "linear code with neighbours": measure(lambda v: vae.code.decode(vae.code.encode(v)), test)}
    print(json.dumps(summary))
    log = [{"step": 0, "seconds": 0, **summary["linear code with neighbours"]}]

    def progress(step, out, model):
        if step % args.every and step != args.steps: return
        log.append({"step": step, "seconds": round(time.time() - start), "train": round(out.loss.item(), 5),
                    **measure(lambda v: model.reconstruct(model.posterior(v).mean), test)})
        print(json.dumps(log[-1]), flush=True)

    train_vae(vae, face_crops(train), args.steps, lr=args.lr, autocast=torch.bfloat16, progress=progress)
    measure_latents(vae.eval(), videos[::2])
    vae.save_pretrained(args.out, torch.float16)
    vae = VideoVAE.from_pretrained(args.out)
    summary[f"VideoVAE {args.config}, as stored"] = measure(lambda v: vae.decode(vae.encode(v)), test)
    (args.out / "training.json").write_text(json.dumps({"command": "tools/train_vae.py " + " ".join(sys.argv[1:]), "summary": summary, "log": log}, indent=1) + "\n")
    print(json.dumps(summary[f"VideoVAE {args.config}, as stored"]))


if __name__ == "__main__":
    main()
