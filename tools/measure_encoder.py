"""What does the encoder know, and what does it keep to itself? `python tools/measure_encoder.py [--weights FOLDER] [--real FOLDER]` prints the tables of LOG.md
(the last one of real films, if there are any: shared/real beside the repository, or --real).

People and motions are never those of training. A *probe* is a straight line (ridge regression) fitted on half of the people and judged on the other half. Beside the
encoder: the same network untrained, and 478 landmarks of MediaPipe on the release's wider crops of the same faces, 128 pixels (x and y, as fractions of the crop)."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fantasy_nb.core import data_samples, read_video
from fantasy_nb.expression import GROUPS, ExpressionEncoder, Features, fit_ruler, fit_size
from fantasy_nb.faces import EMOTIONS, Expression, Identity, render_crops
from fantasy_nb.tracking import FACE_ALONE, align_crop, measure_expression, quiet, to_pixels, track_faces

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
FACTORS = [n for n in Expression.names() if n not in EMOTIONS]
OWN = {name: [n for n in Expression.GROUPS[name] if n in FACTORS] for name in GROUPS}


def landmarks_of(crops):  # (n 3 s s) in [-1, 1] -> (n 956), (n,) found
    "MediaPipe on every crop by itself."
    import mediapipe

    found, rows, size = [], [], crops.shape[-1]
    with quiet(), mediapipe.solutions.face_mesh.FaceMesh(static_image_mode=True, max_num_faces=1, refine_landmarks=True) as mesh:
        for crop in ((crops + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy():
            faces = mesh.process(np.ascontiguousarray(crop)).multi_face_landmarks or []
            found.append(len(faces) > 0)
            rows.append(to_pixels([f.landmark for f in faces[:1]], (size, size))[0, :, :2].ravel() / size if faces else np.zeros(956, np.float32))
    return torch.from_numpy(np.stack(rows)).float(), torch.tensor(found)


def r_squared(x, y, fit):
    "R squared of each column of y on the rows that are not in `fit`."
    seen, true = fit_ruler(x[fit], y[fit])(x[~fit]), y[~fit]
    return 1 - (seen - true).square().sum(0) / (true - true.mean(0)).square().sum(0)


def share_right(x, label, fit, penalty=1e-3):
    "A linear classifier (softmax regression, features standardised): share right on the rows that are not in `fit`."
    x = (x - x[fit].mean(0)) / (x[fit].std(0) + 1e-6)
    weight, bias = torch.zeros(x.shape[1], int(label.max()) + 1, requires_grad=True), torch.zeros(int(label.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x[fit] @ weight + bias, label[fit]) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((x @ weight + bias).argmax(1) == label)[~fit].float().mean().item()


def faces(people, each, seed, size, closer):
    "`each` random expressions of each of `people` random people."
    who, expression = torch.arange(people).repeat_interleave(each), Expression.sample(people * each, seed)
    return who, expression, render_crops(Identity.sample(people, seed)[who], expression, size, closer=closer)


def in_batches(f, crops):
    with torch.no_grad():
        return torch.cat([f(c) for c in crops.split(100)])


def matrix(views, expression, who):
    "Own and foreign factors of every view."
    fit, y = who < who.max() // 2 + 1, torch.stack([getattr(expression, n) for n in FACTORS], 1)
    print(f"{'':22s}" + "".join(f"{n:>12s}" for n in FACTORS) + f"{'emotion':>12s}")
    for view, (groups, found) in views.items():
        worst = (0.0, "")
        for name, x in groups.items():
            row = r_squared(x[found], y[found], fit[found])
            right = share_right(x[found], expression.emotion[found], fit[found])
            print(f"{view + ' ' + name:22s}" + "".join(f"{v:12.2f}" for v in row) + f"{right:12.2f}", flush=True)
            if name in OWN:
                worst = max(worst, *[(v.item(), f"{n} from {name}") for n, v in zip(FACTORS, row) if n not in OWN[name]])
        if worst[1]:
            print(f"{view}: largest foreign factor {worst[0]:.2f} ({worst[1]})")
    print(f"chance: R squared 0, emotion {1 / 7:.2f}")


def leakage(views, who, each):
    "Who is it? From all features, 30 pictures of each person to learn from, 10 to guess."
    fit = torch.arange(len(who)) % each < 30
    for view, (x, found) in views.items():
        right = share_right(x[found], who[found], fit[found])
        print(f"{view:22s}{right:8.3f}  ({right * (int(who.max()) + 1):.1f} times chance)", flush=True)


def nearest(x, y):
    "Share of rows whose nearest row of y is their own partner; columns standardised by all."
    mean, scale = torch.cat([x, y]).mean(0), torch.cat([x, y]).std(0) + 1e-6
    return (torch.cdist((x - mean) / scale, (y - mean) / scale).argmin(1) == torch.arange(len(x))).float().mean().item()


def per_group(packed):
    "Every group as loud as every other."
    f = Features.unpack(packed)
    return torch.cat([(x - x.mean(0)) / x.var(0).sum().sqrt() for x in (getattr(f, g) for g in GROUPS)], 1)


def real_films(encoder, folder, rulers):
    "Rulers laid on drawn people, read on real ones; r with MediaPipe's measure."
    for name, people in (("biden.mp4", 1), ("two_person.mp4", 2)):
        frames, _ = read_video(folder / name)
        for k, track in enumerate(track_faces(frames, people)):
            seen, config = measure_expression(track), encoder.config
            for way, options in (("as cropped", {}), ("the face alone", {"face_only": True}), ("and exposed", FACE_ALONE)):
                crops = align_crop(frames, track, config.image_size, config.keep_roll, config.closer, **options)
                features = Features.unpack(in_batches(lambda c: encoder(c).pack(), crops))
                row = [f"{factor} {np.corrcoef(ruler(getattr(features, group))[:, 0], np.asarray(seen[factor]))[0, 1]:.2f}" for factor, (group, ruler) in rulers.items()]
                print(f"{name} person {k + 1}, {way}: " + ", ".join(row), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=data_samples("weights", "encoders", "mini"))
    parser.add_argument("--real", type=Path, help="folder with biden.mp4 and two_person.mp4 (default: shared/real beside the repository)")
    args = parser.parse_args()
    folder = args.real or REAL
    if args.real and not folder.is_dir():
        sys.exit(f"want a folder for --real, got {folder}")
    encoder = ExpressionEncoder.from_pretrained(args.weights).eval()
    size, closer = encoder.config.image_size, encoder.config.closer
    torch.manual_seed(0)
    blank = ExpressionEncoder(encoder.config).eval()
    views = {"ours": lambda c: encoder(c).pack(), "untrained": lambda c: blank(c).pack()}

    who, expression, crops = faces(200, 10, 31_001, size, closer)
    everything, rulers = torch.ones(len(who), dtype=torch.bool), {}
    packed = {name: in_batches(f, crops) for name, f in views.items()}
    table = {name: ({g: getattr(Features.unpack(x), g) for g in GROUPS}, everything) for name, x in packed.items()}
    big = render_crops(Identity.sample(200, 31_001)[who], expression, 128)
    marks, found = landmarks_of(big)
    print(f"landmarks: MediaPipe found {found.float().mean():.1%} of the faces")
    matrix(table | {"landmarks": ({"all 478": marks}, found)}, expression, who)
    for factor, group in (("yaw", "head"), ("blink", "eyes"), ("mouth_open", "mouth"), ("smile", "mouth")):
        rulers[factor] = group, fit_ruler(table["ours"][0][group], getattr(expression, factor)[:, None])

    print("\nwho is it? 50 people, share right")
    who, expression, crops = faces(50, 40, 32_001, size, closer)
    marks, found = landmarks_of(render_crops(Identity.sample(50, 32_001)[who], expression, 128))
    everything = torch.ones(len(who), dtype=torch.bool)
    leakage({name: (in_batches(f, crops), everything) for name, f in views.items()} | {"landmarks": (marks, found)}, who, 40)

    print("\nwhose expression is nearest? 200 expressions, each by two people; chance 0.005")
    expression = Expression.sample(200, 33_001)
    pair = [render_crops(Identity.sample(200, seed), expression, 128) for seed in (33_001, 33_002)]
    small = [fit_size(render_crops(Identity.sample(200, seed), expression, 128, closer=closer), size) for seed in (33_001, 33_002)]
    for name, f in views.items():
        a, b = (in_batches(f, c) for c in small)
        both = per_group(torch.cat([a, b]))
        print(f"{name:22s}{(torch.cdist(both[:200], both[200:]).argmin(1) == torch.arange(200)).float().mean():8.3f}")
    (a, fa), (b, fb) = (landmarks_of(c) for c in pair)
    print(f"{'landmarks':22s}{nearest(a[fa & fb], b[fa & fb]):8.3f}")

    if folder.is_dir():
        print("\nreal films, never trained on")
        real_films(encoder, folder, rulers)
    else:
        print(f"\nno real films, for there is no {folder}")


if __name__ == "__main__":
    main()
