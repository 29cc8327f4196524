"Chapter 02: tracks that neither swap nor slip, crops on the template, expressions that can be read."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fantasy_nb import tracking
from fantasy_nb.core import as_frames, read_image, read_video
from fantasy_nb.faces import Expression, Identity, Scene, face_landmarks, random_motion, render_crops, render_face, render_scene
from fantasy_nb.tracking import TEMPLATE, FaceTrack, Person, align_crop, face_mask, fill, five_points, link, measure_expression, track_faces, umeyama

REAL = Path(__file__).parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real footage here")


@pytest.fixture(scope="module")
def astronaut():
    data = pytest.importorskip("skimage.data")
    return data.astronaut()


@pytest.fixture(scope="module")
def astronaut_track(astronaut):
    (track,) = track_faces(astronaut[None], 5)
    return track


def fake_track(landmarks, size=(200, 300)):
    boxes = torch.cat([landmarks[..., :2].amin(-2), landmarks[..., :2].amax(-2)], -1)
    return FaceTrack(boxes, landmarks, torch.ones(len(landmarks), dtype=torch.bool), size)


@pytest.fixture(scope="module")
def crossing():
    "Two people who walk past each other, the second in front; their true centres (f 2)."
    f, h, w = 24, 112, 224
    frames, lefts = np.full((f, h, w, 3), (70, 84, 92), np.uint8), np.stack([np.linspace(-6, 118, f), np.linspace(118, -6, f)]).round().astype(int)
    for k in range(2):
        scene = Scene(Identity.sample(2, seed=21)[k], torch.tensor([[0.5, -0.1 + 0.1 * k, 0.8 + 0.1 * k]]))
        pictures, _, owners = render_scene(scene, [random_motion(f, seed=30 + k)], (h, h))
        for i, picture in enumerate(as_frames(pictures)):
            columns = np.arange(w) - lefts[k, i]
            inside = (columns >= 0) & (columns < h)
            mask = (owners[i].numpy() > 0)[:, columns[inside], None]
            frames[i][:, inside] = np.where(mask, picture[:, columns[inside]], frames[i][:, inside])
    return frames, lefts.T + h / 2


def follows(track, x):
    "Mean distance in x from a true path, over the frames seen."
    middle = (track.boxes[:, 0] + track.boxes[:, 2]) / 2
    return float((middle - torch.from_numpy(x)).abs()[track.present].mean())


@pytest.mark.parametrize("covered", [(0, 0), (9, 15)])
def test_crossing_people_are_not_swapped_and_no_frame_is_lost(crossing, covered):
    frames, paths = crossing
    frames = frames.copy()
    frames[slice(*covered)] = 40
    tracks = track_faces(frames, 2)
    assert [len(track) for track in tracks] == [len(frames)] * 2
    assert not any(track.present[slice(*covered)].any() for track in tracks)
    errors = np.array([[follows(track, paths[:, k]) for k in range(2)] for track in tracks])
    best = errors.argmin(1)
    assert sorted(best) == [0, 1] and errors.min(1).max() < 14, errors
    assert all(torch.isfinite(track.landmarks).all() for track in tracks)
    assert all(track.present[0] and track.present[-1] for track in tracks)


def test_gaps_are_marked_and_bridged():
    frames = as_frames(render_face(Identity.sample(1, 3), Expression.neutral(9, yaw=torch.linspace(-16, 16, 9)), 128)).copy()
    frames[[0, 4, 5]] = 90
    (track,) = track_faces(frames, 3, fps=25)
    assert track.gaps() == [(0, 1), (4, 6)] and track.fps == 25
    torch.testing.assert_close(track.landmarks[0], track.landmarks[1])
    torch.testing.assert_close(track.landmarks[4], track.landmarks[3] * 2 / 3 + track.landmarks[6] / 3, atol=1e-3, rtol=0)
    yaw = measure_expression(track)["yaw"]
    assert (yaw[1:].diff() > 0).all()  # in time: the turn goes on evenly through the gap


def test_fill_holds_ends_and_interpolates():
    assert fill([2, 4], np.array([1.0, 3.0]), 7).tolist() == [1, 1, 1, 2, 3, 3, 3]
    assert fill([1], np.array([[5.0, 6.0]]), 3).tolist() == [[5, 6]] * 3


def test_tracks_come_left_to_right_and_max_people_keeps_the_largest():
    scene = Scene.sample(3, seed=5)
    frames, boxes, _ = render_scene(scene, [random_motion(3, k) for k in range(3)], (128, 288))
    tracks = track_faces(frames, 3)
    middles = [float((t.boxes[:, 0] + t.boxes[:, 2]).median() / 2) for t in tracks]
    true = ((boxes[0, :, 0] + boxes[0, :, 2]) / 2).tolist()
    assert len(tracks) == 3 and np.abs(np.array(middles) - true).max() < 12
    scene = replace(scene, place=torch.tensor([[0.17, -0.1, 0.7], [0.5, -0.1, 0.75], [0.83, -0.1, 1.0]]))
    for k, mirror in enumerate((False, True)):  # the largest on the right, then on the left
        frames = as_frames(render_scene(scene, [random_motion(3, k) for k in range(3)], (128, 288))[0])
        (largest,) = track_faces(frames[:, :, ::-1] if mirror else frames, 1)
        middle = float((largest.boxes[:, 0] + largest.boxes[:, 2]).median() / 2)
        assert abs(middle - (48 if mirror else 240)) < 20, middle


def person_of(*frames, width=20.0, x=0.0):
    mesh = np.zeros((478, 3), np.float32)
    mesh[:, 0] = np.linspace(x, x + width, 478)
    person = Person()
    for frame in frames:
        person.see(frame, mesh, np.zeros(9, np.float32), True)
    return person


def test_short_spurious_tracks_are_dropped_and_the_longest_kept(monkeypatch):
    people = [person_of(*range(30)), person_of(4, 5), person_of(*range(20), x=50.0)]
    monkeypatch.setattr(tracking, "find_meshes", lambda *a: [])
    monkeypatch.setattr(tracking, "link", lambda *a: people)
    clip = np.zeros((30, 32, 96, 3), np.uint8)
    assert [int(t.present.sum()) for t in track_faces(clip, 5)] == [30, 20]
    assert [int(t.present.sum()) for t in track_faces(clip, 1)] == [30]


def test_assignment_is_joint_not_greedy(monkeypatch):
    "The mesh nearest to both people goes to the one who has no other."
    monkeypatch.setattr(tracking, "look_of", lambda frame, mesh: np.zeros(9, np.float32))
    mesh = lambda x: person_of(0, x=x).meshes[0]
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    first, second = link(frames, [np.stack([mesh(0.0), mesh(14.0)]), np.stack([mesh(12.0), mesh(27.0)])])
    assert [m[0, 0] for m in first.meshes] == [0, 12] and [m[0, 0] for m in second.meshes] == [14, 27]


def test_one_mesh_per_face_and_two_looks_agree():
    a = person_of(0).meshes[0] + [0, 0, 0]
    a[:, 1] = np.random.default_rng(0).uniform(0, 20, 478)
    meshes = np.stack([a, a + 2, a * 0.3 + 6, a + 40])
    assert tracking.one_mesh_per_face(meshes)[:, 0, 0].tolist() == [40, 2]  # the nearer ones
    assert tracking.settled(meshes, meshes + 0.2) and not tracking.settled(meshes, meshes + 5) and not tracking.settled(meshes, meshes[:2])


def test_umeyama_is_exact_and_never_mirrors():
    g = torch.Generator().manual_seed(0)
    for d in (2, 3):
        x = torch.randn(6, 5, d, generator=g, dtype=torch.float64)
        R, _ = torch.linalg.qr(torch.randn(6, d, d, generator=g, dtype=torch.float64))
        R = R * torch.linalg.det(R)[:, None, None] if d == 3 else R * torch.stack([torch.linalg.det(R), torch.ones(6)], -1)[:, None]
        y = 1.7 * x @ R.mT + 3
        torch.testing.assert_close(umeyama(x, y)[..., :d], 1.7 * R)
        assert (torch.linalg.det(umeyama(x, x * torch.tensor([-1.0] + [1.0] * (d - 1)))[..., :d]) >= 0).all()


def test_umeyama_equals_the_library(astronaut_track):
    transform = pytest.importorskip("skimage.transform")
    x, y = five_points(astronaut_track)[0].double(), TEMPLATE.double() * 224
    library = transform.estimate_transform("similarity", x.numpy(), y.numpy()).params[:2]
    np.testing.assert_allclose(umeyama(x, y).numpy(), library, rtol=1e-6, atol=1e-6)


def test_alignment_puts_exact_points_on_the_template():
    landmarks = torch.zeros(1, 478, 3)
    turn = torch.tensor([[0.9, -0.4], [0.4, 0.9]])
    landmarks[:, tracking.FIVE, :2] = TEMPLATE * 80 @ turn.T + torch.tensor([60.0, 20.0])
    x, y = five_points(landmarks).double(), TEMPLATE.double().expand(1, 5, 2)
    cR, t = umeyama(x, y)[..., :2], umeyama(x, y)[..., 2:]
    assert ((x @ cR.mT + t.mT) - y).abs().max() < 1e-4 / 224


def test_crops_show_a_mark_where_the_template_wants_it():
    "White dots at the five points land on the template, to the pixel; half-pixel conventions included."
    size, template = 96, TEMPLATE * 96
    landmarks, frame = torch.zeros(1, 478, 3), np.zeros((1, 200, 300, 3), np.uint8)
    points = template * 1.5 + torch.tensor([70.0, 30.0])
    landmarks[0, tracking.FIVE, :2] = points
    yy, xx = np.mgrid[:200, :300] + 0.5
    for px, py in points.tolist():
        frame[0][(xx - px) ** 2 + (yy - py) ** 2 < 9] = 255
    crop = align_crop(frame, fake_track(landmarks), size)[0, 0].numpy() + 1
    yy, xx = np.mgrid[:size, :size] + 0.5
    for px, py in template.tolist():
        near = crop * ((xx - px) ** 2 + (yy - py) ** 2 < 36)
        assert abs((near * xx).sum() / near.sum() - px) < 0.15 and abs((near * yy).sum() / near.sum() - py) < 0.15


def test_keep_roll_keeps_the_picture_upright():
    x = TEMPLATE.double() * 100
    turn = torch.tensor([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    matrix = umeyama(x @ turn.T + 7, x, keep_roll=True)
    torch.testing.assert_close(matrix[:, :2], torch.eye(2).double() * np.cos(0.4))
    torch.testing.assert_close((x @ turn.T + 7).mean(0) @ matrix[:, :2].T + matrix[:, 2], x.mean(0))


@pytest.mark.parametrize("closer", [1.0, 1.7])
def test_true_points_give_the_renderers_own_crops(closer):
    "`render_crops` draws what `align_crop(keep_roll=True)` cuts out, given the true five points."
    who, what = Identity.sample(1, 4), Expression.neutral(2, yaw=torch.tensor([-15.0, 10.0]), roll=torch.tensor([12.0, -6.0]))
    landmarks = torch.zeros(2, 478, 3)
    landmarks[:, tracking.FIVE, :2] = face_landmarks(who, what) * 256
    cut = align_crop(render_face(who, what, 256), fake_track(landmarks, (256, 256)), 96, True, closer)
    drawn = render_crops(who, what, 96, closer=closer)
    middle = (..., slice(16, 64), slice(24, 72))
    assert (cut[middle] - drawn[middle]).abs().mean() < 0.05


def test_astronaut(astronaut, astronaut_track):
    track = astronaut_track
    assert track.landmarks.shape == (1, 478, 3) and track.present.all() and track.size == (512, 512)
    x, y = ((track.boxes[0, :2] + track.boxes[0, 2:]) / 2).tolist()
    assert 200 < x < 250 and 90 < y < 150
    crop = align_crop(astronaut[None], track)
    assert crop.shape == (1, 3, 224, 224) and -1 <= crop.min() < crop.max() <= 1
    measured = measure_expression(track)
    assert abs(measured["yaw"]) < 10 and measured["smile"] > 0.5 and measured["blink"] < 0.5


def test_a_face_too_small_for_the_mesh_alone(astronaut):
    cv2 = pytest.importorskip("cv2")
    wall = np.full((720, 1280, 3), (96, 110, 120), np.uint8)
    wall[420:676, 900:1156] = cv2.resize(astronaut, (256, 256), interpolation=cv2.INTER_AREA)
    assert len(tracking.mesh_view(wall[None], (0, 0, 1280, 720), 1)[0]) == 0
    (track,) = track_faces(wall[None], 2)
    assert 980 < float(track.boxes[0, 0]) < 1000 + 60 and 440 < float(track.boxes[0, 1]) < 520


def test_measures_follow_the_true_factor():
    who, values = Identity.sample(1, 7), {"yaw": 30.0, "pitch": 15.0, "roll": 18.0, "mouth_open": 1.0, "smile": 1.0, "gaze_x": 1.0}
    for name, most in values.items():
        true = torch.linspace(-most if most > 1 or name == "gaze_x" else 0, most, 5)
        clip = render_face(who, Expression.neutral(5, **{name: true}), 160)
        (track,) = track_faces(clip, 1)
        measured = measure_expression(track)[name]
        assert np.corrcoef(measured, true)[0, 1] > 0.95, name
        slope = float(np.polyfit(true, measured, 1)[0])
        assert 0.6 < slope < 1.4, (name, slope)


def test_nobody_there_and_bad_input():
    assert track_faces(np.full((2, 96, 96, 3), 128, np.uint8), 2) == []
    for bad in (np.zeros((2, 3, 8, 8), np.uint8), np.zeros((4, 4)), torch.zeros(2, 5, 8, 8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError):
            track_faces(bad, 1)
    with pytest.raises(ValueError, match="max_people"):
        track_faces(np.zeros((1, 8, 8, 3), np.uint8), 0)


def test_align_crop_wants_the_tracks_own_frames(astronaut, astronaut_track):
    with pytest.raises(ValueError, match="1 frames of 512x512"):
        align_crop(np.stack([astronaut] * 2), astronaut_track)


def test_a_crop_of_the_face_alone_does_not_see_the_wall(astronaut, astronaut_track):
    points = astronaut_track.landmarks[..., :2].numpy()
    around = face_mask(points, 512, margin=0.025)[0].numpy()
    assert face_mask(points, 512, margin=0)[0].sum() < around.sum() < 0.2 * around.size
    moved = np.where(around[..., None], astronaut, 255 - astronaut)
    plain, other = (align_crop(picture[None], astronaut_track, 128, True, 1.7) for picture in (astronaut, moved))
    alone, same = (align_crop(picture[None], astronaut_track, 128, True, 1.7, face_only=True) for picture in (astronaut, moved))
    kept = (alone != 0).any(1, keepdim=True).expand_as(alone)
    assert not torch.equal(plain, other) and torch.equal(alone, same)
    assert torch.equal(alone[kept], plain[kept]) and 0.5 < kept.float().mean() < 0.9 and not alone[~kept].any()


def test_exposure_makes_dusk_day(astronaut, astronaut_track):
    cut = lambda picture, **options: align_crop(picture[None], astronaut_track, 96, True, 1.7, **options)  # noqa: E731
    kept = (cut(astronaut, face_only=True) != 0).any(1)
    bright = lambda crop: (crop.mean(1)[kept].median() + 1) / 2  # noqa: E731
    dusk = (astronaut * 0.3).astype(np.uint8)
    assert bright(cut(dusk)) < 0.2
    for picture in (astronaut, dusk):
        assert abs(bright(cut(picture, exposure=0.4)) - 0.4) < 0.02
    alone = cut(dusk, **tracking.FACE_ALONE)
    assert torch.equal(alone[:, :, 0, 0], torch.zeros(1, 3)) and abs(bright(alone) - 0.4) < 0.02
    black = np.zeros_like(astronaut)
    assert torch.equal(cut(black, exposure=0.4), cut(black))  # nothing to brighten
    crop, nothing = cut(dusk), torch.zeros(1, 96, 96, dtype=torch.bool)
    assert torch.allclose(tracking.expose(crop, nothing, 0.4), crop, atol=1e-6)  # no face in it: as it was
    faded = FaceTrack(*(torch.cat([part] * 4) for part in (astronaut_track.boxes, astronaut_track.landmarks)), torch.tensor([True, False, False, False]), astronaut_track.size)
    film = align_crop(np.stack([astronaut, black, black, black]), faded, 96, True, 1.7, exposure=0.4)
    assert abs(bright(film[:1]) - 0.4) < 0.02  # frames without a face say nothing about the light
    for wrong in (0, 1, -2, 3):
        with pytest.raises(ValueError, match="brightness between 0 and 1"):
            cut(astronaut, exposure=wrong)


def test_backend_says_what_is_missing(tmp_path, monkeypatch):
    clip = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(FileNotFoundError, match="no FaceLandmarker file"):
        track_faces(clip, 1, backend=tmp_path / "face_landmarker.task")
    file = tmp_path / "text.task"
    file.write_text("no bundle")
    with pytest.raises(ValueError, match="FaceLandmarker"):
        track_faces(clip, 1, backend=file)
    import mediapipe

    monkeypatch.delattr(mediapipe, "tasks", raising=False)
    with pytest.raises(ValueError, match="tasks"):
        track_faces(clip, 1, backend=file)
    monkeypatch.delattr(mediapipe, "solutions")
    with pytest.raises(ValueError, match="0.10.21"):
        track_faces(clip, 1)


def test_slices_and_repr(astronaut_track):
    track = FaceTrack(*(x.repeat(6, *[1] * (x.ndim - 1)) for x in (astronaut_track.boxes, astronaut_track.landmarks, astronaut_track.present)), (512, 512), 25)
    assert len(track[1:4]) == 3 and len(track[2]) == 1 and len(track[track.present]) == 6 and track[1:4].fps == 25
    assert "seen in 6 of 6 frames" in repr(track)


def test_mediapipe_is_loaded_only_when_asked():
    import subprocess
    import sys

    code = "import sys, fantasy_nb.tracking; sys.exit('mediapipe' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs_real
def test_real_one_person():
    frames, fps = read_video(REAL / "biden.mp4")
    (track,) = track_faces(frames, 1, fps=fps)
    assert len(track) == 218 and track.present.all()


@needs_real
def test_real_two_people_are_not_swapped():
    frames, _ = read_video(REAL / "two_person.mp4")
    left, right = track_faces(frames, 2)
    assert len(left) == len(right) == 146 and left.present.all() and right.present.all()
    assert (left.boxes[:, 2] < right.boxes[:, 0]).all()  # they never change places in this film
    assert max((t.boxes[1:] - t.boxes[:-1]).abs().max() for t in (left, right)) < 60


@needs_real
def test_real_portrait_of_two():
    tracks = track_faces(read_image(REAL / "two_person.png")[None], 5)
    assert len(tracks) == 2 and tracks[0].boxes[0, 2] < tracks[1].boxes[0, 0]
