"Curation of raw footage (chapter 09): shots, measures, verdicts, resume, pool and Ray, and the clips it leaves."
import json
import os
import shutil
import sys
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fantasy_nb.core import read_video, write_video
from fantasy_nb.data import (
    ClipConfig, ClipFolder, CurationConfig, SceneClips, collate, count_verdicts, curate, cut_view, find_shots, find_videos, frame_people, laplacian_sharpness, main, run_jobs, why_not,
)  # fmt: skip
from fantasy_nb.faces import Scene, random_motion, render_scene
from fantasy_nb.tracking import FaceTrack

GOOD = dict(presence=1.0, face_height=100.0, sharpness=200.0, turning=5.0, motion=0.02)


def film(seeds, frames=20, height=128):
    motions = [random_motion(frames, 10 * seed) for seed in seeds]
    pictures, _, _ = render_scene(Scene.sample(len(seeds), seeds[0]), motions, (height, height * len(seeds)))
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def rushes(tmp_path_factory):
    "A folder of raw films: two people, one with a cut, a wall, a text file that says it is a film."
    folder = tmp_path_factory.mktemp("rushes")
    (folder / "deep").mkdir()
    write_video(folder / "two.mp4", film([1, 2]), 25)
    write_video(folder / "deep" / "cut.mp4", np.concatenate([film([3], 20), film([4], 22)]), 25)
    write_video(folder / "wall.mp4", np.full((20, 64, 64, 3), 90, np.uint8), 25)
    (folder / "torn.mp4").write_text("no film")
    (folder / "two.txt").write_text("Two people talk.\n")
    return folder


@pytest.fixture(scope="module")
def curated(rushes, tmp_path_factory):
    out = tmp_path_factory.mktemp("curated")
    return out, curate(rushes, out, processes=1, show=False)


def test_shots_end_at_cuts_and_long_ones_are_divided(rushes):
    assert [(first, count) for first, count, _ in find_shots(rushes / "deep" / "cut.mp4")] == [(0, 20), (20, 22)]
    pieces = find_shots(rushes / "two.mp4", CurationConfig(min_frames=5, max_frames=9))
    assert [first for first, _, _ in pieces] == [0, 6, 13] and sum(count for _, count, _ in pieces) == 20
    with pytest.raises(ValueError, match="torn.mp4"):
        find_shots(rushes / "torn.mp4")


def test_verdicts_with_their_reasons(curated):
    out, rows = curated
    told = {(row["source"].split("/")[-1], row["first"]): row for row in rows}
    two, wall, torn = told["two.mp4", 0], told["wall.mp4", 0], told["torn.mp4", 0]
    assert two["kept"] and two["kind"] == "multi" and two["people"] == 2 and two["caption"] == "Two people talk."
    assert all(told["cut.mp4", first]["kept"] and told["cut.mp4", first]["kind"] == "single" for first in (0, 20))
    assert not wall["kept"] and wall["reason"] == "no face" and not torn["kept"] and "cannot read" in torn["reason"]
    assert sorted(p.name for p in (out / "clips").iterdir()) == sorted(f"{row['clip']}.mp4" for row in rows if row["kept"])
    assert not [p for p in out.rglob("*") if ".part" in p.name]


def test_clips_hold_the_frames_they_name(curated, rushes):
    out, rows = curated
    row = next(r for r in rows if r["first"] == 20)
    kept, original = read_video(out / "clips" / f"{row['clip']}.mp4")[0], read_video(rushes / "deep" / "cut.mp4")[0]
    error = [np.abs(kept.astype(float) - original[a : a + 22]).mean() for a in (19, 20) if a + 22 <= len(original)]
    assert error[-1] < 3 and error[-1] == min(error) and row["fps"] == 25


@pytest.mark.parametrize("name", ["presence", "face_height", "sharpness", "turning", "motion"])
def test_every_threshold_rejects_and_says_what_was_wanted(name):
    config, low = CurationConfig(), GOOD | {name: 0.0}
    assert why_not([GOOD, GOOD], 50, config) == ""
    assert name in why_not([low], 50, config) and f"want {getattr(config, name):g}" in why_not([low], 50, config)
    both = why_not([GOOD, low], 50, config)
    assert ("face 2" in both) == (name in ("presence", "face_height", "sharpness"))  # somebody must move; everybody must be seen
    assert why_not([low], 50, replace(config, **{name: 0.0})) == ""


def test_other_reasons():
    config = CurationConfig()
    assert why_not([], 50, config) == "no face" and "16 frames" in why_not([GOOD], 16, config) and "more than 5 people" in why_not([GOOD] * 6, 50, config)
    with pytest.raises(ValueError, match="min_frames"):
        CurationConfig(min_frames=20, max_frames=10)


def test_sharpness_falls_with_blur_and_not_with_size():
    rng, box = np.random.default_rng(0), torch.tensor([[10.0, 10.0, 74.0, 106.0]])
    frame = cv2.resize(rng.integers(0, 255, (24, 20, 3), np.uint8), (84, 116), interpolation=cv2.INTER_CUBIC)
    track = FaceTrack(box, torch.zeros(1, 478, 3), torch.ones(1, dtype=torch.bool), (116, 84))
    values = [laplacian_sharpness(cv2.GaussianBlur(frame, (0, 0), s)[None] if s else frame[None], track) for s in (0, 1, 2, 4)]
    assert all(sharp > 1.4 * blurred for sharp, blurred in zip(values, values[1:]))
    double = FaceTrack(2 * box, track.landmarks, track.present, (232, 168))
    large = laplacian_sharpness(cv2.resize(frame, (168, 232), interpolation=cv2.INTER_CUBIC)[None], double)
    assert 0.7 < large / values[0] < 1.3
    assert laplacian_sharpness(np.full((1, 116, 84, 3), 77, np.uint8), track) == 0


def test_a_second_run_does_only_what_is_missing(curated, rushes, monkeypatch, tmp_path):
    import fantasy_nb.data as data

    out, rows = shutil.copytree(curated[0], tmp_path / "out"), curated[1]
    calls = []
    monkeypatch.setattr(data, "curate_video", lambda path, *rest: calls.append(path) or [])
    assert curate(rushes, out, processes=1, show=False) == rows and not calls
    (out / "rows" / "two.json").unlink()
    curate(rushes, out, processes=1, show=False)
    assert [p.name for p in calls] == ["two.mp4"]
    curate(rushes, out, CurationConfig(sharpness=1.0), processes=1, show=False)
    assert len(calls) == 5  # another config: all again
    assert not [p for part in ("clips", "tracks") for p in (out / part).iterdir() if "cut" in p.name]  # clips of the old config do not stay behind


def test_odd_sizes_and_damaged_ends(tmp_path):
    import av

    frames = film([3])[:, :127, :127]
    with av.open(str(tmp_path / "odd.mkv"), "w") as container:  # lossless: the one way to store odd sides
        stream = container.add_stream("ffv1", 25)
        stream.width, stream.height, stream.pix_fmt = 127, 127, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    write_video(tmp_path / "whole.mkv", film([4]), 25)
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "torn.mkv").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match="128x128"):
        rows = curate(tmp_path, tmp_path / "out", processes=1, show=False)
    assert {row["source"].split("/")[-1] for row in rows} == {"odd.mkv", "whole.mkv", "torn.mkv"}
    odd = next(i for i, row in enumerate(ClipFolder(tmp_path / "out").rows) if "odd" in row["clip"])
    assert ClipFolder(tmp_path / "out")[odd].frames.shape == (9, 3, 64, 64)


def read_manifest(folder):
    import pyarrow.parquet

    return [row | {"source": row["source"].split("/")[-1]} for row in pyarrow.parquet.read_table(folder / "manifest.parquet").to_pylist()]


def test_pool_and_ray_write_the_same_manifest(rushes, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    curate(rushes, tmp_path / "pool", processes=2, show=False)
    monkeypatch.setattr("fantasy_nb.data.in_processes", None)  # the pool is not asked
    curate(rushes, tmp_path / "ray", processes=2, ray=True, show=False)
    assert read_manifest(tmp_path / "pool") == read_manifest(tmp_path / "ray") and len(read_manifest(tmp_path / "pool")) == 5
    for path in (tmp_path / "pool" / "tracks").iterdir():
        assert path.read_bytes() == (tmp_path / "ray" / "tracks" / path.name).read_bytes()
    for path in (tmp_path / "pool" / "clips").iterdir():  # the encoder's threads may cut the work differently
        pool, ray = (read_video(tmp_path / way / "clips" / path.name)[0].astype(float) for way in ("pool", "ray"))
        assert pool.shape == ray.shape and np.abs(pool - ray).mean() < 2


def test_folder_gives_the_batches_that_scenes_give(curated):
    out, rows = curated
    folder, drawn = ClipFolder(out), SceneClips(seed=0)
    pair, alone = (next(i for i, row in enumerate(folder.rows) if row["people"] == p) for p in (2, 1))
    for i, j in ((pair, 0), (alone, 1)):
        ours, theirs = collate([folder[i]]), collate([drawn[j]])
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        heights = [(b["boxes"][..., 3] - b["boxes"][..., 1]).median() for b in (ours, theirs)]
        assert (0.7 if i == alone else 0.5) < heights[0] / heights[1] < 1.2  # as large as in drawn clips, where people do not stand far apart
    assert torch.equal(folder[pair].frames, ClipFolder(out)[pair].frames) and not torch.equal(folder[pair].frames, ClipFolder(out, seed=1)[pair].frames)
    stills = ClipFolder(out, ClipConfig(frames=5, stills=True))[pair]
    assert stills.frames.shape == (5, 3, 64, 96) and stills.crops.shape == (2, 5, 3, 64, 64)
    assert [track.size for track in folder.tracks(pair)] == [(128, 256)] * 2
    grey = (stills.crops == 128).all(2).float().mean((2, 3))  # what is not face: as fantasy-animate cuts real drivers
    assert 0.4 < grey.min() and grey.max() < 0.8


def test_curated_clips_are_learned_from(curated, tmp_path, capsys):
    from fantasy_nb.train import LatentClips, main

    folder, _ = curated
    arguments = ["--run", str(tmp_path), "--data", str(folder), "--clips", "0", "--steps", "1", "--batch", "1", "--threads", "1", "--samples", "0"]
    assert main(["--stage", "clips", *arguments]) == 0 and "1 of 1 steps" in capsys.readouterr().out
    assert len(LatentClips(tmp_path / "cache" / "data")) == 2 * len(ClipFolder(folder))  # and their mirror images
    assert main(["--stage", "stills", *arguments, "--run", str(tmp_path / "other")]) == 2 and "--data" in capsys.readouterr().err


def test_ray_is_not_to_report_its_use(monkeypatch):
    from types import ModuleType

    told = []
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["ray"].init = lambda **options: told.append(os.environ.get("RAY_USAGE_STATS_ENABLED"))
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with pytest.raises(AttributeError):  # there is no more of Ray here
        run_jobs([{}], 1, True, False)
    assert told == ["0"]


def test_folder_errors(tmp_path, curated):
    with pytest.raises(FileNotFoundError, match="fantasy-curate"):
        ClipFolder(tmp_path)
    with pytest.raises(ValueError, match="41 frames"):
        ClipFolder(curated[0], ClipConfig(frames=41))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([(64, 64), (64, 96), (64, 144)]))
def test_everybody_is_in_the_view(people, seed, size):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(3, people, 2, generator=g) * torch.tensor([900.0, 300.0])
    boxes = torch.cat([corner, corner + 20 + 100 * torch.rand(3, people, 2, generator=g)], -1)
    start, scale = frame_people(boxes, size)
    moved = (boxes - start.repeat(2)) * scale
    assert moved.min() > 0 and moved[..., 2].max() < size[1] and moved[..., 3].max() < size[0]


def test_the_view_shows_what_the_boxes_say():
    frames = np.zeros((1, 200, 300, 3), np.uint8)
    frames[:, 80:120, 150:170] = 255
    boxes = torch.tensor([[[150.0, 80.0, 170.0, 120.0]]])
    for size in ((64, 64), (128, 128), (16, 32)):
        corner, scale = frame_people(boxes, size)
        view, (x0, y0, x1, y1) = cut_view(frames, corner, scale, size)[0, 0].float(), ((boxes - corner.repeat(2)) * scale)[0, 0].tolist()
        assert abs(view.sum() / 255 - (x1 - x0) * (y1 - y0)) < 0.06 * (x1 - x0) * (y1 - y0)
        ys, xs = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
        assert abs((view * xs).sum() / view.sum() - (x0 + x1) / 2) < 0.05 and abs((view * ys).sum() / view.sum() - (y0 + y1) / 2) < 0.05


def test_names_do_not_collide(tmp_path):
    for name in ("a/b.mp4", "a-b.mp4", "a-b.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_videos(tmp_path)
    assert len(found) == 3 == len(set(found.values()))
    assert list(find_videos(tmp_path, leave_out=tmp_path / "a").values()) == [tmp_path / "a-b.mov", tmp_path / "a-b.mp4"]  # clips of an earlier run are no footage


def test_clips_written_among_the_videos_are_not_cut_again(rushes, tmp_path):
    shutil.copytree(rushes, tmp_path / "rushes")
    first, second = (curate(tmp_path / "rushes", tmp_path / "rushes" / "out", CurationConfig(sharpness=0), processes=1, show=False) for _ in range(2))
    assert any(row["kept"] for row in first) and first == second


def test_command(curated, rushes, tmp_path, capsys):
    out, rows = curated
    assert main([str(rushes), str(tmp_path / "out"), "--processes", "1", "--sharpness", "0"]) == 0
    printed = capsys.readouterr().out
    assert "1 kept, multi" in printed and "2 kept, single" in printed and "no face" in printed and (tmp_path / "out" / "manifest.parquet").exists()
    (tmp_path / "empty").mkdir()
    for arguments in ([str(tmp_path / "nowhere"), "x"], [str(tmp_path / "empty"), str(tmp_path / "x")], [str(rushes), str(tmp_path / "x"), "--min-frames", "0"]):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("fantasy-curate: ") and said.count("\n") == 1
    assert not (tmp_path / "x").exists() or not any((tmp_path / "x").rglob("*.mp4"))
    assert "no face" in count_verdicts(rows)


def test_rows_are_plain_json(curated):
    out, rows = curated
    assert json.loads((out / "rows" / "two.json").read_text())["stamp"]["config"] == asdict(CurationConfig())
