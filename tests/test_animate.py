import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fantasy_nb.animate import (Animation, PipelineConfig, PortraitPipeline, blend_windows, carry_detail, check_assignment, fit_portrait, lay_on_grids, load_driver, main, resize, window_starts)
from fantasy_nb.core import data_samples, read_image, read_video, write_image, write_video
from fantasy_nb.faces import paint_background, pixel_grid, Identity
from fantasy_nb.tracking import face_mask, measure_expression, track_faces

PORTRAIT, DRIVERS = str(data_samples("portrait_two.png")), [str(data_samples(f"driver_{k}.mp4")) for k in "ab"]
ONE = str(data_samples("portrait_one.png"))


@pytest.fixture(scope="module")
def pipeline():
    return PortraitPipeline.from_pretrained("tiny")


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 13, 50])
def test_windows_cover_the_film_and_overlap(length):
    starts, n = window_starts(length, 3, 1), min(3, length)
    seen = [s + i for s in starts for i in range(n)]
    assert set(seen) == set(range(length)) and starts == sorted(set(starts))
    assert all(b - a <= 2 for a, b in zip(starts, starts[1:]))


def test_blending_constant_windows_changes_nothing():
    whole = torch.randn(1, 2, 8, 3, 3)
    starts = window_starts(7, 3, 1)
    parts = torch.stack([whole[0][:, [0] + list(range(s + 1, s + 4))] for s in starts])
    torch.testing.assert_close(blend_windows(parts, starts, 7), whole)


def test_portraits_are_scaled_to_the_faces_the_model_knows():
    picture, boxes = np.zeros((300, 500, 3), np.uint8), torch.tensor([[50.0, 60, 130, 160], [300, 60, 380, 160]])
    working, moved, size = fit_portrait(picture, boxes, PipelineConfig())
    assert working.shape[0] % 16 == working.shape[1] % 16 == 0 and size == (142, 238)
    assert abs((moved[0, 3] - moved[0, 1]).item() - PipelineConfig().face_height) < 0.5
    with pytest.raises(ValueError, match="crop it around the faces"):
        fit_portrait(np.zeros((3000, 5000, 3), np.uint8), boxes, PipelineConfig())


def test_assignment():
    assert check_assignment(None, 2, 3) == [1, 2] and check_assignment([3, 1], 2, 3) == [3, 1]
    for wrong in ([1, 1], [0, 1], [1, 4], [1]):
        with pytest.raises(ValueError, match="different person"):
            check_assignment(wrong, 2, 3)


def test_two_people_film(pipeline, tmp_path):
    film = pipeline(PORTRAIT, DRIVERS, frames=10, steps=2, show=False)
    assert isinstance(film, Animation) and len(film.frames) == 10 and film.frames.dtype == np.uint8 and film.fps == 25 and len(film.tracks) == 2
    again = pipeline(PORTRAIT, DRIVERS, frames=10, steps=2, show=False)
    assert np.array_equal(film.frames, again.frames)
    assert not np.array_equal(film.frames, pipeline(PORTRAIT, DRIVERS, frames=10, steps=2, seed=1, show=False).frames)
    film.save(tmp_path / "film.mp4", compare=True)
    frames, fps = read_video(tmp_path / "film.mp4")
    assert frames.shape[0] == 10 and fps == 25 and frames.shape[1] == 256


def test_another_driver_changes_only_whom_they_drive(pipeline):
    "Two films that differ in the right person's driver: the left half stays nearly the same."
    a, b = (pipeline(PORTRAIT, [DRIVERS[k]], frames=24, assign=[2], show=False).frames.astype(float) for k in (0, 1))
    half = a.shape[2] // 2
    left, right = (np.abs(a - b)[:, :, part].mean() for part in (slice(0, half), slice(half, None)))
    assert right > 2 * left, (left, right)


def test_people_follow_their_own_driver_and_not_the_other(pipeline):
    """Against the true film of the performance (the renderer can draw it): nearer with their own drivers than held still, and than with the drivers swapped. And a tracker sees each head turn as its own driver's.

    Mouths are not tested by the tracker: the tiny weights do not reach r >= 0.7 there (LOG.md)."""
    from fantasy_nb.animate import resize
    from fantasy_nb.faces import Expression, Scene, render_scene

    truth = [json.loads(data_samples(f"driver_{k}.json").read_text()) for k in "ab"]
    motions = [Expression(**{k: torch.tensor(v[:40], dtype=torch.float32) for k, v in t.items() if k in Expression.names()}) for t in truth]
    own, swapped = (pipeline(PORTRAIT, DRIVERS, frames=40, assign=order, show=False).frames.astype(float) for order in ([1, 2], [2, 1]))
    true = render_scene(Scene.sample(2, 9004), motions, (256, 384))[0]
    true = np.stack([resize((f.permute(1, 2, 0) * 255).byte().numpy(), own.shape[1:3]) for f in true]).astype(float)
    still = resize(read_image(PORTRAIT), own.shape[1:3])[None].astype(float)
    held, follows, other = (10 * np.log10(255**2 / ((film - true) ** 2).mean()) for film in (still, own, swapped))
    assert follows > held + 2 and follows > other + 2, (held, follows, other)
    seen = [measure_expression(track) for track in track_faces(own.astype(np.uint8), 2)]
    r = [[np.corrcoef(truth[who]["yaw"][:40], seen[k]["yaw"])[0, 1] for who in (k, 1 - k)] for k in (0, 1)]
    assert all(mine > 0.7 and mine > theirs + 0.3 for mine, theirs in r), r


def test_shapes_of_input(pipeline):
    picture, (frames, fps) = read_image(data_samples("portrait_one.png")), read_video(DRIVERS[0], 6)
    a = pipeline(picture, (frames, fps), steps=1, show=False)
    b = pipeline(torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255, [frames], steps=1, show=False)
    assert len(a.frames) == 6 and np.array_equal(a.frames, b.frames)


def test_one_video_with_two_people_drives_two_people(pipeline):
    from fantasy_nb.faces import Scene, random_motion, render_scene

    film, _, _ = render_scene(Scene.sample(2, 77), [random_motion(6, 1), random_motion(6, 2)], (256, 384))
    assert pipeline(PORTRAIT, film, steps=1, show=False).people == [1, 2]


def test_saved_pipeline_is_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "weights")
    assert not list((tmp_path / "weights").rglob("*.pt")) and not list((tmp_path / "weights").rglob("*.bin"))
    again = PortraitPipeline.from_pretrained(tmp_path / "weights")
    a, b = (p(PORTRAIT, DRIVERS, frames=4, steps=1, show=False).frames for p in (pipeline, again))
    assert np.array_equal(a, b)


@pytest.fixture
def wrong(tmp_path):
    "Files that are not what they say."
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    wall = tmp_path / "wall.png"
    background = paint_background(Identity.sample(1, 9), *pixel_grid(256, 256))[0]
    write_image(wall, background)
    faceless = tmp_path / "faceless.mp4"
    write_video(faceless, background[None].repeat(5, 1, 1, 1))
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "copy.mp4").write_bytes(Path(DRIVERS[0]).read_bytes())
    (tmp_path / "copy.png").write_bytes(Path(ONE).read_bytes())
    (tmp_path / "torn.mp4").write_bytes(Path(DRIVERS[0]).read_bytes()[:3000])
    (tmp_path / "torn.png").write_bytes(Path(PORTRAIT).read_bytes()[:3000])
    write_image(tmp_path / "dot.png", np.zeros((1, 1, 3), np.uint8))
    return tmp_path


@pytest.mark.parametrize("arguments, says", [
    (["nowhere.png", "--drive", DRIVERS[0]], "nowhere.png"),
    ([ONE, "--drive", "nowhere.mp4"], "nowhere.mp4"),
    ([ONE, "--drive", "{}/text.mp4"], "text.mp4"),
    ([ONE, "--drive", "{}/empty.mp4"], "empty.mp4"),
    (["{}/wall.png", "--drive", DRIVERS[0]], "face"),
    ([ONE, "--drive", "{}/faceless.mp4"], "want a driver with a face"),
    ([ONE, "--drive", DRIVERS[0], "--drive", DRIVERS[1]], "got 2"),
    ([PORTRAIT, "--drive", DRIVERS[0], "--assign", "3"], "assign"),
    ([ONE, "--drive", DRIVERS[0], "--frames", "0"], "frames=0"),
    ([ONE, "--drive", DRIVERS[0], "--weights", "huge"], "huge"),
    ([ONE, "--drive", DRIVERS[0], "-o", "{}/folder.mp4"], "got the folder"),
    ([ONE, "--drive", DRIVERS[0], "-o", "{}/film.xyz"], ".mp4"),
    ([ONE, "--drive", DRIVERS[0], "-o", "/proc/nothing/film.mp4"], "/proc/nothing"),
    (["{}/text.mp4", "--drive", DRIVERS[0]], "text.mp4"),
    (["{}/folder.mp4", "--drive", DRIVERS[0]], "a folder"),
    (["{}/empty.mp4", "--drive", DRIVERS[0]], "empty.mp4"),
    ([PORTRAIT, "--drive", DRIVERS[0], "--drive", DRIVERS[1], "--assign", "1", "1"], "different person"),
    ([PORTRAIT, "--drive", DRIVERS[0], "--assign", "1", "2"], "different person"),
    ([PORTRAIT, "--drive", DRIVERS[0], "--assign", "0"], "different person"),
    ([PORTRAIT, "--names", "Anna", "--drive", "Anna=" + DRIVERS[0]], "name for each"),
    ([PORTRAIT, "--names", "Anna", "Ben", "--drive", "Anna=" + DRIVERS[0], "--drive", DRIVERS[1]], "NAME=VIDEO"),
    ([PORTRAIT, "--names", "Anna", "Ben", "--drive", "Anna=" + DRIVERS[0], "--drive", "Anna=" + DRIVERS[1]], "different name"),
    ([PORTRAIT, "--names", "Anna", "Anna", "--drive", "Anna=" + DRIVERS[0]], "different names"),
    ([PORTRAIT, "--names", "Anna", "Ben", "--drive", "Anna=" + DRIVERS[0], "--assign", "1"], "no assign"),
    ([PORTRAIT, "--names", "Anna", "Ben", "--drive", "Carl=" + DRIVERS[0]], "Carl="),
    ([ONE, "--drive", DRIVERS[0], "--mouth", "-1"], "mouth"),
    ([ONE, "--drive", DRIVERS[0], "--mouth", "1", "2"], "mouth"),
    ([PORTRAIT, "--drive", DRIVERS[0], "--emotion", "1", "1", "1"], "emotion"),
    ([ONE, "--drive", DRIVERS[0], "--sound", "1"], "--sound"),
    ([ONE, "--drive", DRIVERS[0], "--sound", "2"], "--sound"),
    ([ONE, "--drive", DRIVERS[0], "--steps", "0"], "steps=0"),
    ([ONE, "--drive", DRIVERS[0], "--draws", "0"], "draws=0"),
    ([ONE, "--drive", DRIVERS[0], "--looks", "3"], "looks=3"),
    ([ONE, "--drive", DRIVERS[0], "--detail", "2"], "detail=2"),
    ([ONE, "--drive", DRIVERS[0], "--enlarge", "0.5"], "enlarge=0.5"),
    ([ONE, "--drive", DRIVERS[0], "--window", "-1"], "window=-1"),
    ([ONE, "--drive", DRIVERS[0], "--interval", "0.9", "0.1"], "interval"),
    ([ONE, "--drive", DRIVERS[0], "--interval", "-1", "0.1"], "interval"),
    ([ONE, "--drive", DRIVERS[0], "--frames", "-3"], "frames=-3"),
    ([ONE, "--drive", DRIVERS[0], "--sheet", "{}/sheet.gif"], ".png"),
    ([ONE, "--drive", DRIVERS[0], "--sheet", "/proc/nothing/sheet.png"], "/proc/nothing"),
    ([ONE, "--drive", DRIVERS[0], "--weights", "{}"], "vae, encoder, dit and tokens"),
    ([ONE, "--drive", "{}/wall.png"], "wall.png"),
    ([ONE, "--drive", "{}/torn.mp4"], "torn.mp4"),
    (["{}/torn.png", "--drive", DRIVERS[0]], "torn.png"),
    (["{}/dot.png", "--drive", DRIVERS[0]], "face"),
    ([ONE, "--drive", DRIVERS[0], "--device", "cuda"], "cpu"),
    ([ONE, "--drive", DRIVERS[0], "--device", "gpu"], "gpu"),
    ([ONE, "--drive", DRIVERS[0], "--height", "1"], "got 1"),
    ([ONE, "--drive", DRIVERS[0], "--guidance", "-4"], "guidance=-4"),
    ([ONE, "--drive", ONE], "got the picture"),
    ([DRIVERS[0], "--drive", DRIVERS[0]], "got the film"),
    ([ONE, "--drive", "{}"], "got the folder"),
    (["{}", "--drive", DRIVERS[0]], "a folder"),
    ([ONE, "--drive", "Anna=" + DRIVERS[0]], "want --names"),
    ([ONE, "--drive", "{}/copy.mp4", "-o", "{}/copy.mp4"], "would be lost"),
    ([ONE, "--drive", "{}/copy.mp4", "-o", "{}/../{}/copy.mp4"], "would be lost"),
    (["{}/copy.png", "--drive", DRIVERS[0], "--sheet", "{}/copy.png"], "would be lost"),
    ([ONE, "--drive", DRIVERS[0], "-o", "{}/copy.mp4/film.mp4"], "not a folder"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(arguments, says, wrong, capfd):
    before = sorted(wrong.rglob("*"))
    arguments = [a.format(wrong, wrong.name) for a in arguments]
    arguments += [] if "-o" in arguments else ["-o", str(wrong / "out.mp4")]
    assert main([*arguments, "--quiet"]) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and says in error[0] and error[0].startswith("fantasy-animate: "), error
    assert sorted(wrong.rglob("*")) == before


@pytest.mark.parametrize("arguments, says", [
    ([], "required: --drive"),
    (["--driver", DRIVERS[0], "-o", "out.mp4"], "no option --driver: did you mean --drive?"),
    (["--drive", DRIVERS[0], "-o", "out.mp4", "--threads", "0"], "at least 1"),
    (["--drive", DRIVERS[0], "-o", "out.mp4", "--height", "-3"], "at least 0"),
    (["--drive", DRIVERS[0], "-o", "out.mp4", "--height", "tall"], "--height"),
])  # fmt: skip
def test_arguments_that_argparse_refuses_are_one_line(arguments, says, capfd):
    with pytest.raises(SystemExit) as stop:
        main([ONE, *arguments])
    error = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and says in error[0], error


def test_a_film_asked_longer_than_its_driver_says_so(tmp_path, capfd):
    film = tmp_path / "out.mp4"
    write_video(tmp_path / "short.mp4", read_video(DRIVERS[0], 4)[0])
    assert main([ONE, "--drive", str(tmp_path / "short.mp4"), "--frames", "9", "-o", str(film), "--quiet"]) == 0
    assert "4 frames, not 9" in capfd.readouterr().err
    assert read_video(film)[0].shape[1] == 256 and read_video(film)[0].shape[2] % 2 == 0


def test_command_writes_film_and_sheet(tmp_path, capfd):
    out, sheet = tmp_path / "new" / "film.mp4", tmp_path / "sheet.png"
    assert main([PORTRAIT, "--drive", DRIVERS[0], "--drive", DRIVERS[1], "-o", str(out), "--frames", "5", "--steps", "1", "--compare", "--sheet", str(sheet)]) == 0
    import av

    with av.open(str(out)) as container:
        assert container.streams.video[0].codec_context.name == "h264" and container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert "Generated" in container.metadata.get("comment", "")
    assert read_image(sheet).ndim == 3
    assert "denoising" in capfd.readouterr().err


SHARED = Path(__file__).parents[2] / "shared" / "real"


@pytest.mark.skipif(not SHARED.exists(), reason="real footage is not here")
def test_real_footage_drives_and_is_driven(tmp_path):
    assert main([ONE, "--drive", str(SHARED / "biden.mp4"), "-o", str(tmp_path / "a.mp4"), "--frames", "12", "--steps", "2", "--quiet"]) == 0
    assert main([str(SHARED / "two_person.png"), "--drive", DRIVERS[0], "--drive", DRIVERS[1], "-o", str(tmp_path / "b.mp4"), "--frames", "12", "--steps", "2", "--quiet"]) == 0
    assert [len(read_video(tmp_path / f"{k}.mp4")[0]) for k in "ab"] == [12, 12]


@torch.no_grad()
def test_a_film_decoded_in_pieces_is_the_film(pipeline):
    from fantasy_nb.animate import decode_film

    for latent_frames in (2, 5, 10):
        latents = torch.randn(1, 48, latent_frames, 4, 6, generator=torch.Generator().manual_seed(latent_frames)) * 0.5
        whole = ((pipeline.vae.decode(latents)[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255)[1:]
        film = decode_film(pipeline.vae, latents, 2)
        assert film.shape == (4 * (latent_frames - 1), 32, 48, 3) and np.abs(film.astype(float) - whole.numpy()).max() <= 1


def test_solvers_and_guidance_interval_reach_the_film(pipeline):
    films = {name: pipeline(PORTRAIT, DRIVERS, frames=4, steps=3, draws=1, show=False, solver=name).frames.astype(int) for name in ("euler", "heun", "multistep")}
    assert np.abs(films["euler"] - films["heun"]).max() > 0 and np.abs(films["euler"] - films["multistep"]).max() > 0
    everywhere = pipeline(PORTRAIT, DRIVERS, frames=4, steps=3, draws=1, guidance=3.0, show=False).frames
    nowhere = pipeline(PORTRAIT, DRIVERS, frames=4, steps=3, draws=1, guidance=3.0, interval=(0.0, 0.0), show=False).frames
    assert np.array_equal(nowhere, films["euler"].astype(np.uint8)) and not np.array_equal(everywhere, nowhere)


@pytest.mark.parametrize("token", [8, 16])
def test_every_look_shows_the_whole_picture_on_another_grid(token):
    picture, boxes = torch.arange(3 * 48 * 64, dtype=torch.float32).view(1, 3, 1, 48, 64), torch.tensor([[8.0, 10, 24, 30], [36, 10, 52, 30]])
    laid = lay_on_grids(picture, boxes, 4, token)
    assert [len(lay_on_grids(picture, boxes, n, token)) for n in (1, 2, 4)] == [1, 2, 4]
    starts = [(place[1].start, place[2].start) for _, _, place in laid]
    assert starts == [(0, 0), (token // 2, token // 2), (0, token // 2), (token // 2, 0)]
    for moved, owners, place in laid:
        h, w = moved.shape[-2:]
        assert torch.equal(moved[0, :, 0].permute(1, 2, 0)[None][place][0], picture[0, :, 0].permute(1, 2, 0))
        assert h % token == w % token == 0 and owners.shape == (2, h * w // token**2) and {1, 2} <= set(owners.unique().tolist()) <= {0, 1, 2}
    x, y = 44 + token // 2, 20 + token // 2  # the second person, moved with the picture
    assert laid[1][1][0].view(laid[1][0].shape[-2] // token, -1)[y // token, x // token] == 2


@pytest.mark.parametrize("token", [8, 16])
def test_an_enlarged_picture_lies_on_more_tokens(token):
    picture, boxes = torch.zeros(1, 3, 1, 48, 64), torch.tensor([[8.0, 10, 24, 30], [36, 10, 52, 30]])
    picture[:, :, 0, 14:26, 40:48] = 1.0  # the second person's face
    for (moved, owners, place), start in zip(lay_on_grids(picture, boxes, 2, token, 1.5), (0, token // 2)):
        h, w = (token * round(n * 1.5 / token) for n in (48, 64))
        assert place[1:] == (slice(start, start + h), slice(start, start + w)) and -1 <= moved.min() and moved.max() <= 1
        inside = moved[0, 0, 0][place[1:]]
        assert inside.shape == (h, w) and round(inside[:, w // 2 :].sum().item() / (h * w / 48 / 64)) in range(90, 103)  # 96 pixels are bright
        y, x = start + round(20 * h / 48), start + round(44 * w / 64)
        assert moved[0, 0, 0, y, x] > 0.9 and owners.shape == (2, moved.shape[-2] * moved.shape[-1] // token**2)
        assert owners[0].view(moved.shape[-2] // token, -1)[y // token, x // token] == 2
    (same, _, _), (other, _, _) = lay_on_grids(picture, boxes, 1, token)[0], lay_on_grids(picture, boxes, 1, token, 1.01)[0]
    assert torch.equal(same, picture) and torch.equal(other, picture)  # less than half a token is none
    with pytest.raises(ValueError, match=f"multiples of {token}, got .52, 64."):
        lay_on_grids(torch.zeros(1, 3, 1, 52, 64), boxes, 1, token, 1.5)


def test_a_film_from_a_larger_grid_has_the_size_of_the_portrait(pipeline):
    films = {times: pipeline(PORTRAIT, DRIVERS, frames=4, looks=1, enlarge=times, show=False).frames.astype(float) for times in (1.0, 1.25)}
    assert films[1.0].shape == films[1.25].shape
    off = [np.square(films[1.25][:, y : y + 40] - films[1.0][:, :40]).mean() for y in (0, 4)]
    assert 0 < off[0] < 0.5 * off[1]  # the same picture, in the same place
    both, windows = (pipeline(PORTRAIT, DRIVERS, frames=4, looks=2, enlarge=1.25, window=n, show=False).frames.astype(float) for n in (0, 1))
    assert both.shape == windows.shape == films[1.0].shape and 0 < np.square(both - films[1.25]).mean() < off[0] + np.square(both - films[1.0]).mean()
    grain = np.random.default_rng(0).choice([0.0, 255.0], (64, 104, 3)).astype(np.float32)
    assert 0 <= resize(grain, (64, 96)).min() and resize(grain, (64, 96)).max() <= 255  # narrower counts as smaller
    for wrong in (0.5, 5.0, float("nan")):
        with pytest.raises(ValueError, match="want enlarge between 1 and 4"):
            pipeline(PORTRAIT, DRIVERS, frames=4, enlarge=wrong, show=False)


def test_a_film_of_two_looks_is_the_mean_of_both_and_nearer_to_the_truth(pipeline, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import measure_animation as tool

    weights, errors = tool.Weights("tiny", "cpu"), []
    for people, k in ((1, 0), (1, 1), (2, 0), (2, 1)):
        clip = weights.clips(people, 9)[k]
        video, features, boxes = weights.read(clip)
        how = replace(weights.settings, looks=1, enlarge=1.0, detail=0.0)
        films = {n: pipeline.paint(video[:, :, :1], features, boxes, replace(how, looks=n)).astype(float) for n in (1, 2)}
        (one, _, _), (moved, _, place) = lay_on_grids(video[:, :, :1], boxes, 2, 8)
        other = pipeline.paint(moved, features, boxes + 4, how)[place]
        assert np.abs(films[2] - (films[1] + other) / 2).max() <= 0.5 and torch.equal(one, video[:, :, :1])
        errors.append([np.square(film - tool.true_frames(video)).mean() for film in films.values()])
    assert np.log(np.array(errors)).mean(0)[1] < np.log(np.array(errors)).mean(0)[0] - 0.02


def test_what_is_missed_of_the_portrait_moves_along_and_stays_away_from_what_it_never_showed():
    rng = np.random.default_rng(0)
    shapes = cv2.GaussianBlur(rng.uniform(0, 255, (64, 80, 3)), (0, 0), 4)
    soft = (40 + 170 * (shapes - shapes.min()) / (shapes.max() - shapes.min())).astype(np.uint8)
    sharp = (soft + cv2.GaussianBlur(rng.normal(0, 30, soft.shape), (0, 0), 0.8)).clip(0, 255).astype(np.uint8)
    film, true = (np.stack([np.roll(x, k, 1) for k in (0, 1, 3)]) for x in (soft, sharp))
    film[np.s_[2, 20:32, 30:42]] ^= 128  # something the portrait does not show
    box = torch.tensor([[20.0, 10, 60, 54]])
    made, inside = carry_detail(film, soft, sharp, box).astype(float), np.s_[8:-8, 8:-8]
    off = lambda x, k: np.sqrt(np.square(x[k][inside].astype(float) - true[k][inside]).mean())  # noqa: E731
    assert off(made, 0) < 1 and off(made, 1) < 0.6 * off(film, 1)  # 0: the portrait itself
    middle = np.s_[2, 24:28, 34:38]
    assert np.abs(made[middle] - film[middle]).mean() < 1
    assert np.array_equal(carry_detail(film, soft, sharp, box, share=0.0), film)
    half = carry_detail(film, soft, sharp, box, share=0.5).astype(float)
    assert np.abs(half - (film.astype(float) + made) / 2).max() <= 1


def test_a_film_that_differs_a_little_keeps_its_word_in_faces_and_half_of_it_around_them():
    grey = np.full((64, 80, 3), 100, np.uint8)
    made = carry_detail(grey[None] + np.uint8(12), grey, grey + np.uint8(20), torch.tensor([[20.0, 10, 60, 54]]))[0].astype(float)
    around, inside = np.exp(-((12 / 16) ** 2)), np.exp(-((12 / 8) ** 2))
    assert np.abs(made[:4] - (112 + around * (20 - 12 / 2))).max() <= 0.51
    assert np.abs(made[30:40, 35:45] - (112 + inside * 20)).max() <= 0.51
    told = []
    carry_detail(grey[None].repeat(3, 0), grey, grey, torch.tensor([[20.0, 10, 20, 54]]), watch=lambda *said: told.append(said))  # a box of no width
    assert told == [("decoding", k / 3) for k in (1, 2, 3)]


def test_films_with_the_portrait_s_detail_are_nearer_to_the_truth(pipeline, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import measure_animation as tool

    weights, errors = tool.Weights("tiny", "cpu"), []
    assert weights.settings.detail == 1.0
    for people, k, window in ((1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 2)):
        video, features, boxes = weights.read(weights.clips(people, 9)[k])
        films = [weights.film(video, features, boxes, replace(weights.settings, detail=share, looks=1, window=window)) for share in (0.0, 1.0)]
        still = weights.film(video, features[:, :1].expand(-1, 5, -1), boxes, replace(weights.settings, looks=2, window=window))
        errors.append([np.square(film.astype(float) - tool.true_frames(video)).mean() for film in films])
        assert np.abs(still.astype(float) - tool.to_pixels(video[:, :, :1])).mean() < 1.0  # its own moment is the portrait
    assert (np.log(np.array(errors)) @ [-1, 1] < -0.05).all() and (np.log(np.array(errors)) @ [-1, 1]).mean() < -0.12
    for wrong in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="want detail between 0 and 1"):
            pipeline(PORTRAIT, DRIVERS, frames=4, detail=wrong, show=False)


def test_a_watcher_hears_shares_that_rise_over_all_looks_and_draws(pipeline):
    told = []
    film = pipeline(PORTRAIT, DRIVERS, frames=4, steps=2, draws=2, looks=2, show=False, watch=lambda stage, share: told.append((stage, share)))
    for stage, count in (("denoising", 8), ("decoding", 2 + 4)):  # and the detail of four frames
        shares = [share for name, share in told if name == stage]
        assert len(shares) == count and shares == sorted(shares) and shares[-1] == 1.0 and len(set(shares)) == count
    assert len(film.frames) == 4
    with pytest.raises(ValueError, match="1, 2 or 4 looks, got looks=3"):
        pipeline(PORTRAIT, DRIVERS, frames=4, looks=3, show=False)


def test_frames_of_another_rate_than_the_first_driver_s_stay_in_time():
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
    for fps, shown in ((None, range(20)), (50.0, range(20)), (25.0, range(0, 20, 2)), (100.0, np.arange(40) // 2)):
        pictures, rate = load_driver((frames, 50.0), None, fps)
        assert pictures[:, 0, 0, 0].tolist() == list(shown) and rate == (fps or 50.0)
    assert len(load_driver((frames, 50.0), 4, 25.0)[0]) == 4 and load_driver((frames, 50.0), 4, 25.0)[0][3, 0, 0, 0] == 6


def test_a_window_of_one_latent_frame_overlaps_nothing(pipeline):
    film = pipeline(PORTRAIT, DRIVERS, frames=8, window=1, show=False).frames
    assert film.shape[0] == 8 and not np.array_equal(film, pipeline(PORTRAIT, DRIVERS, frames=8, window=2, show=False).frames)


def test_dials_turn_the_performance_and_not_the_portrait(pipeline):
    films = {s: pipeline(PORTRAIT, DRIVERS, frames=6, draws=1, overall=s, show=False).frames.astype(float) for s in (0.0, 0.5, 1.0)}
    assert np.array_equal(films[1.0], pipeline(PORTRAIT, DRIVERS, frames=6, draws=1, show=False).frames)
    motion = {s: np.abs(np.diff(f, axis=0)).mean() for s, f in films.items()}
    assert motion[0.0] < 1e-3 < motion[0.5] < motion[1.0], motion  # at rest nothing moves
    mouths = pipeline(PORTRAIT, DRIVERS, frames=6, draws=1, mouth=0.0, show=False).frames
    assert np.abs(mouths - films[1.0]).mean() > 0.1
    with pytest.raises(ValueError, match="of 0 or more"):
        pipeline(PORTRAIT, DRIVERS, frames=4, mouth=-1.0, show=False)


@pytest.mark.parametrize("wrong, said", [(dict(solver="rk4"), "solver"), (dict(interval=(0.8, 0.2)), "interval"), (dict(interval=(0.0, 2.0)), "interval"), (dict(steps=0), "step")])
def test_wrong_pipeline_options_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        PipelineConfig(**wrong)


@pytest.mark.parametrize("options", [["--solver", "rk4"], ["--interval", "0.8", "0.2"], ["--interval", "0.5"]])
def test_wrong_solver_options_are_one_line(options, tmp_path, capsys):
    try:
        code = main([PORTRAIT, "--drive", DRIVERS[0], "-o", str(tmp_path / "a.mp4"), *options, "--quiet"])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and len(error.splitlines()) == 1 and options[0][2:] in error and not list(tmp_path.iterdir())


@torch.no_grad()
def test_every_frame_by_itself_is_the_still_the_network_draws(pipeline):
    from fantasy_nb.animate import decode_film, denoise

    g = torch.Generator().manual_seed(3)
    portrait, features, owners = torch.randn(1, 48, 1, 8, 12, generator=g), torch.randn(2, 9, 554, generator=g), torch.randint(3, (2, 96), generator=g)
    config = replace(pipeline.settings, window=0, steps=1, guidance=1.0)
    film = denoise(pipeline.animator, config, portrait, features, owners, 5, False)
    assert film.shape == (1, 48, 8, 8, 12) and decode_film(pipeline.vae, film, 0).shape == (8, 64, 96, 3)
    noise = torch.randn(1, 48, 1, 8, 12, generator=torch.Generator().manual_seed(5))
    for k in (0, 7):  # what training's first stage asks of the network, one moment at a time
        still = pipeline.animator(noise, torch.ones(1), portrait, features[None, :, [0, k + 1]], owners[None, :1], stills=True)
        torch.testing.assert_close(film[:, :, k : k + 1], still, atol=2e-5, rtol=1e-4)
    from fantasy_nb.animate import frames_velocity

    x, t = noise.expand(-1, -1, 8, -1, -1), torch.tensor([0.7])
    whole, pieces = (frames_velocity(pipeline.animator, config, portrait, features, owners, n)(x, t) for n in (64, 3))
    torch.testing.assert_close(whole, pieces, atol=2e-5, rtol=1e-4)


def test_both_ways_of_making_a_film_have_its_length_and_differ(pipeline):
    films = [pipeline(PORTRAIT, DRIVERS, frames=6, draws=1, window=window, show=False).frames for window in (0, 2)]
    assert films[0].shape == films[1].shape and len(films[0]) == 6 and not np.array_equal(*films)
    with pytest.raises(ValueError, match="window larger than its overlap"):
        PipelineConfig(window=1, overlap=1)


def test_people_have_names_and_strengths_of_their_own(pipeline):
    plain = pipeline(PORTRAIT, [DRIVERS[0]], frames=4, assign=[2], show=False)
    named = pipeline(PORTRAIT, {"Ben": DRIVERS[0]}, frames=4, names=["Anna", "Ben"], show=False)
    assert named.people == [2] and np.array_equal(plain.frames, named.frames)
    both, width = pipeline(PORTRAIT, DRIVERS, frames=12, show=False).frames.astype(float), plain.frames.shape[2] // 2
    strong = [pipeline(PORTRAIT, DRIVERS, frames=12, names=["Anna", "Ben"], overall=dial, show=False).frames.astype(float) for dial in ({"Ben": 0.0}, [1.0, 0.0])]
    assert np.array_equal(*strong)
    left, right = (np.abs(strong[0] - both)[:, :, half].mean() for half in (slice(0, width), slice(width, None)))
    assert right > 4 * left, (left, right)  # only Ben is calmed
    with pytest.raises(ValueError, match="Carl"):
        pipeline(PORTRAIT, DRIVERS, frames=4, names=["Anna", "Ben"], mouth={"Carl": 1.0}, show=False)


def film_with_sound(path, hertz=440, rate=22050):
    import av

    frames, _ = read_video(DRIVERS[0], 20)
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=25), container.add_stream("pcm_s16le", rate=rate, layout="mono")
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        wave = av.AudioFrame.from_ndarray((np.sin(2 * np.pi * hertz * np.arange(2 * rate) / rate) * 20000).astype(np.int16)[None], format="s16", layout="mono")
        wave.rate, wave.pts = rate, 0
        container.mux(sound.encode(wave))
        container.mux(sound.encode())
    return path


def test_a_drivers_sound_is_kept_on_request(tmp_path):
    import av

    source = film_with_sound(tmp_path / "talks.mkv")
    assert main([ONE, "--drive", str(source), "--frames", "10", "--sound", "1", "-o", str(tmp_path / "out.mp4"), "--quiet"]) == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        wave = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)[0]
        assert container.streams.video[0].frames == 10
    assert abs(len(wave) / 48000 - 0.4) < 0.06  # as long as the pictures
    spectrum = np.abs(np.fft.rfft(wave[:16000]))
    assert abs(spectrum.argmax() * 3 - 440) < 6
    assert main([ONE, "--drive", str(source), "--frames", "4", "-o", str(tmp_path / "silent.mp4"), "--quiet"]) == 0
    with av.open(str(tmp_path / "silent.mp4")) as container:
        assert not container.streams.audio


def test_the_wall_behind_a_driver_is_not_heard(pipeline, tmp_path):
    film, _ = read_video(data_samples("driver_a.mp4"), 5)
    (track,) = track_faces(film, 1)
    size = max(film.shape[1:3])
    around = face_mask(track.landmarks[..., :2].numpy(), size, 0.06)[:, : film.shape[1], : film.shape[2], None].numpy()
    moved = np.where(around, film, 255 - film)
    assert (moved != film).mean() > 0.3
    assert pipeline.settings.face_only and torch.equal(pipeline.features(film, track), pipeline.features(moved, track))
    whole, unlit = (PortraitPipeline(pipeline.vae, pipeline.encoder, pipeline.animator, replace(pipeline.settings, **way)) for way in (dict(face_only=False, exposure=None), dict(exposure=None)))
    assert not torch.equal(whole.features(film, track), whole.features(moved, track))
    assert torch.equal(unlit.features(film, track), unlit.features(moved, track)) and not torch.equal(unlit.features(film, track), pipeline.features(film, track))
    pipeline.save_pretrained(tmp_path / "alone")
    assert PortraitPipeline.from_pretrained(tmp_path / "alone").settings == pipeline.settings
    with pytest.raises(ValueError, match="exposure between 0 and 1"):
        replace(pipeline.settings, exposure=1.0)


def test_a_pipeline_is_a_diffusers_pipeline(pipeline, tmp_path, capfd):
    from diffusers import DiffusionPipeline

    assert isinstance(pipeline, DiffusionPipeline) and isinstance(pipeline, PortraitPipeline)
    assert set(pipeline.components) == {"vae", "encoder", "animator"} and pipeline.components["vae"] is pipeline.vae
    quiet = PortraitPipeline.from_pretrained("tiny")
    quiet.set_progress_bar_config(disable=True)
    expected = pipeline(ONE, DRIVERS[0], frames=4, show=False).frames
    capfd.readouterr()
    assert np.array_equal(quiet(ONE, DRIVERS[0], frames=4).frames, expected) and "denoising" not in capfd.readouterr().err
    moved = []
    for name, part in quiet.components.items():
        part.to = lambda place, name=name: moved.append((name, str(place)))
    quiet.enable_model_cpu_offload(device="cpu")  # the same device stands in for a GPU: what counts is who is there when
    moved.clear()
    quiet(ONE, DRIVERS[0], frames=4)
    assert [name for name, _ in moved] == ["encoder"] * 2 + ["vae"] * 2 + ["animator"] * 2 + ["vae"] * 2


def test_frames_without_a_driver_face_are_held_and_reported(pipeline, tmp_path, capfd):
    frames, fps = read_video(DRIVERS[0], 12)
    frames[5:8] = 128
    write_video(tmp_path / "blinks.mp4", frames, fps)
    assert main([ONE, "--drive", str(tmp_path / "blinks.mp4"), "-o", str(tmp_path / "out.mp4"), "--quiet"]) == 0
    assert "held: [3] of 12" in capfd.readouterr().err
    assert len(read_video(tmp_path / "out.mp4")[0]) == 12


def test_the_measuring_tool_finds_films_between_floor_and_ceiling():
    "And prints who follows whom, read by another encoder than they listen to: two clips of two people, drivers swapped as well."
    tool = Path(__file__).parents[1] / "tools" / "measure_animation.py"
    run = subprocess.run([sys.executable, tool, "--weights", "tiny", "--clips", "0", "2", "0", "--frames", "25", "--parts", "pictures", "following", "--reader", data_samples("weights", "encoders", "tiny")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    still, film, best = (float(x) for x in re.search(r"portrait held ([\d.]+), film ([\d.]+), VAE ([\d.]+) dB", run.stdout).groups())
    assert still + 1 < film < best - 1
    mouth = next(line.split() for line in run.stdout.splitlines() if line.split()[:2] == ["encoder", "mouth_open"])
    own, _, other, _, _, swapped = map(float, mouth[2:])
    assert own > 0.5 and own > other + 0.3 and swapped > 0.3  # with the drivers swapped the new one is followed


def test_the_mean_of_many_drivers_is_heard_as_one_driver_is(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import measure_animation as tool

    weights, drawn = tool.Weights("tiny", "cpu"), tool.jittered_crops
    clip = weights.clips(1, 5)[0]
    monkeypatch.setattr(tool, "jittered_crops", lambda motion, size, seed, closer: clip.crops[0] if seed % 16 < 2 else drawn(motion, size, seed, closer))
    told = []
    for many in (2, 6):  # twice the clip's own driver; four others as well
        tool.ears(weights, {1: 1}, 5, many)
        told.append([float(x) for x in re.findall(r"([\d.]+) dB", capsys.readouterr().out)])
    assert told[0][0] == told[0][1] == told[1][0] != told[1][1]


def test_a_painter_who_hears_true_heads_is_better_than_one_who_hears_the_encoder(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import measure_animation as tool

    few = tool.painter_reader

    def hard_of_hearing(encoder):  # by two degrees of yaw
        read, off = few(encoder, 24)
        return lambda packed: read(packed) + 2 * (torch.arange(17) == tool.Expression.names().index("yaw")), off

    monkeypatch.setattr(tool, "painter_reader", hard_of_hearing)
    tool.painter(tool.Weights("tiny", "cpu"), {1: 1}, 5, 2)
    told = capsys.readouterr().out
    still, best = (float(x) for x in re.search(r"portrait held ([\d.]+), VAE ([\d.]+)", told).groups())
    heard, true, heads = (float(re.search(name + r" ([\d.]+) dB", told).group(1)) for name in (": as heard", "true heads, else as heard", "heads as heard, else true"))
    assert still < heard < true and heads < true and true > best - 3
