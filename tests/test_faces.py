import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fantasy_nb.core import default_device
from fantasy_nb.faces import (CROP_TEMPLATE, EMOTIONS, Expression, Identity, Scene, crop_template, face_landmarks, mask_boxes,
                              paint_background, pixel_grid, random_motion, render_crops, render_face, render_scene)


def psnr(a, b):
    return -10 * torch.log10(((a - b) ** 2).mean()).item()


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_exact_at_every_size(size):
    people, moods = Identity.sample(3, 4), Expression.sample(3, 5)
    direct, averaged = render_face(people, moods, size), F.avg_pool2d(render_face(people, moods, 4 * size), 4)
    assert direct.shape == (3, 3, size, size) and 0 <= direct.min() and direct.max() <= 1
    assert psnr(direct, averaged) > 37


def test_same_seed_same_people_whatever_the_batch():
    people, moods = Identity.sample(5, 1), Expression.sample(5, 2)
    together, alone = render_face(people, moods, 96), torch.cat([render_face(people[k], moods[k], 96) for k in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert torch.equal(render_face(Identity.sample(5, 1), Expression.sample(5, 2), 96), together)
    assert not torch.equal(render_face(Identity.sample(5, 3), moods, 96), together)


@pytest.mark.parametrize("name", Expression.names())
def test_every_motion_factor_moves_the_picture_and_every_person_alike(name):
    people = Identity.sample(4, 11)
    still, moved = (render_face(people, Expression.neutral(4, **{name: value}), 96) for value in (0.0, 20.0 if name in Expression.GROUPS["head"] else 0.9))
    assert ((still - moved).abs().amax((1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("name", Identity.names())
def test_every_identity_factor_shows_on_somebody(name):
    someone = Identity.sample(6, 12)
    low, high = (render_face(someone.replace(**{name: value}), Expression.neutral(6, smile=0.2), 96) for value in (0.02, 0.5 if "hue" in name else 0.98))
    assert (low - high).abs().amax() > 0.03


def test_a_loop_over_people_ends():
    people = Identity.sample(3, 0)
    assert [len(person) for person in people] == [1, 1, 1] and torch.equal(people[-1].light, people[2].light)
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"want one of 3, got {index}"):
            people[index]


def test_groups_cover_all_factors_once():
    names = [n for group in Expression.GROUPS.values() for n in group]
    assert sorted(names) == sorted(Expression.names()) and list(Expression.GROUPS) == ["head", "eyes", "emotion", "mouth"]


def test_sampled_factors_are_independent_and_emotions_exclusive():
    e = Expression.sample(4000, 0)
    r = np.corrcoef(np.stack([getattr(e, n).numpy() for n in ("yaw", "pitch", "roll", "gaze_x", "gaze_y", "blink_left", "mouth_open", "mouth_wide", "smile")]))
    assert np.abs(r - np.eye(9)).max() < 0.06
    assert ((torch.stack([getattr(e, n) for n in EMOTIONS]) > 0).sum(0) <= 1).all()
    assert set(e.emotion.tolist()) == set(range(7))


def test_crops_put_the_five_points_on_the_template():
    people, straight = Identity.sample(20, 3), Expression.neutral(20)
    points, t = face_landmarks(people, straight), CROP_TEMPLATE - CROP_TEMPLATE.mean(0)
    p = points - points.mean(1, keepdim=True)
    scale = (p * t).sum((1, 2)) / p.square().sum((1, 2))
    place = (torch.arange(192) + 0.5) / 192
    grid = torch.stack([place.expand(192, 192), place[:, None].expand(192, 192)], -1)
    back = (grid - CROP_TEMPLATE.mean(0)) / scale[:, None, None, None] + points.mean(1)[:, None, None]
    seen = F.grid_sample(render_face(people, straight, 256), back * 2 - 1, align_corners=False) * 2 - 1
    large, middle = render_crops(people, straight, 192), (..., slice(32, 128), slice(48, 144))
    off = lambda crops: (crops - seen)[middle].abs().mean()
    assert off(large) < 0.25 * min(off(large.roll(s, d)) for s in (-4, 4) for d in (-2, -1))
    crops = render_crops(people, straight, 64)
    assert crops.shape == (20, 3, 64, 64) and crops.min() >= -1 and crops.max() <= 1
    wide = render_crops(people, straight, 64, zoom=torch.full((20,), 1.2))
    assert (crops - wide).abs().mean() > 0.02


def test_a_closer_crop_is_the_middle_of_a_larger_one():
    assert torch.equal(crop_template(), CROP_TEMPLATE)
    people, straight, closer = Identity.sample(4, 3), Expression.neutral(4), 1.7
    large, near = render_crops(people, straight, 170), render_crops(people, straight, 100, closer=closer)
    left, top = (round(c * 170 * (1 - 1 / closer)) for c in (0.5, 0.306))  # the place that stays where it is
    assert (large[:, :, top : top + 100, left : left + 100] - near).abs().mean() < 0.02
    assert (large[:, :, :100, left : left + 100] - near).abs().mean() > 0.05


def test_landmarks_turn_with_the_head():
    turned = face_landmarks(Identity.sample(1, 0), Expression.neutral(3, yaw=torch.tensor([-30.0, 0, 30])))
    nose = turned[:, 2, 0] - turned[:, :2, 0].mean(1)
    assert nose[0] < nose[1] < nose[2]


@pytest.mark.parametrize("people", [1, 2, 3, 4, 5])
def test_scenes_have_boxes_and_owners_for_everyone(people):
    scene = Scene.sample(people, seed=people)
    frames, boxes, owners = render_scene(scene, [random_motion(5, k) for k in range(people)], (96, 160))
    assert frames.shape == (5, 3, 96, 160) and boxes.shape == (5, people, 4) and owners.shape == (5, 96, 160)
    assert set(owners.unique().tolist()) == set(range(people + 1))
    assert (boxes[..., 2] > boxes[..., 0]).all() and (boxes[..., 3] > boxes[..., 1]).all()
    centres = (boxes[..., 0] + boxes[..., 2]) / 2
    assert (centres.diff(dim=1) > 0).all()
    for k in range(people):  # the middle of a face belongs to its owner
        x, y = (boxes[0, k, :2] + boxes[0, k, 2:]).div(2).long().tolist()
        assert owners[0, y, x] == k + 1


def test_people_in_a_scene_move_on_their_own():
    scene, a, b, c = Scene.sample(2, 8), random_motion(4, 1), random_motion(4, 2), random_motion(4, 3)
    first, _, owners = render_scene(scene, [a, b], (96, 144))
    second, _, _ = render_scene(scene, [a, c], (96, 144))
    changed = (first - second).abs().amax(1) > 0.02
    assert changed[owners == 2].float().mean() > 0.1 and not changed[:, :, :40].any()


def test_motion_is_smooth_plausible_and_different_for_different_seeds():
    m = random_motion(500, 3)
    assert m.yaw.diff().abs().max() < 8 and m.mouth_open.min() == 0 and m.mouth_open.max() > 0.5 and m.blink.max() > 0.9
    others = [np.corrcoef(m.yaw, random_motion(500, s).yaw)[0, 1] for s in range(10, 20)]
    assert abs(np.mean(others)) < 0.2
    assert torch.equal(random_motion(20, 7).yaw, random_motion(20, 7).yaw)


def test_boxes_of_masks():
    mask = torch.zeros(2, 10, 12)
    mask[0, 3:7, 2:9] = 1
    assert mask_boxes(mask).tolist() == [[2, 3, 9, 7], [0, 0, 0, 0]]


@pytest.mark.parametrize("call", [
    lambda: Scene.sample(6, 0), lambda: Scene.sample(0, 0), lambda: render_face(Identity.sample(2, 0), Expression.neutral(3), 32),
    lambda: render_scene(Scene.sample(2, 0), [Expression.neutral(2)], (32, 32)), lambda: Expression.neutral(1, smirk=1.0),
    lambda: render_scene(Scene.sample(2, 0), [Expression.neutral(2), Expression.neutral(3)], (32, 32)),
])  # fmt: skip
def test_wrong_calls_say_what_was_wanted(call):
    with pytest.raises(ValueError, match="want .* got"):
        call()


def test_gradients_are_off_and_devices_follow_the_input():
    device = default_device()
    moods = Expression.neutral(1, yaw=torch.zeros(1, requires_grad=True)).to(device)
    out = render_face(Identity.sample(1, 0).to(device), moods, 32)
    assert not out.requires_grad and out.device.type == device.type


def test_mediapipe_finds_people_and_nobody_else():
    track_faces = pytest.importorskip("fantasy_nb.tracking").track_faces
    crowd = render_face(Identity.sample(60, 70), Expression.sample(60, 71), 256)
    assert np.mean([len(track_faces(p[None], 2)) == 1 for p in crowd]) >= 0.98
    walls = paint_background(Identity.sample(10, 9), *pixel_grid(256, 256))
    assert not any(track_faces(p[None], 2) for p in walls)


def test_drawing_stays_on_one_device(monkeypatch):
    "A GPU's stand-in: operations that mix the meta device with the CPU are refused there as well."
    import torch.fx.experimental._config as fx

    monkeypatch.setattr(fx, "meta_nonzero_assume_all_nonzero", True)
    moods, people = Expression.sample(2, 0).to("meta"), Identity.sample(1, 0)
    with pytest.raises(RuntimeError, match="not on the expected device"):
        moods.yaw + torch.zeros(2)
    for pictures in (render_face(people, moods, 16), render_crops(people, moods, 16, torch.zeros(2, 2), torch.ones(2))):
        assert pictures.device.type == "meta" and pictures.shape == (2, 3, 16, 16)
    frames, boxes, owners = render_scene(Scene.sample(2, 0), [moods, moods], (32, 64))
    assert {x.device.type for x in (frames, boxes, owners)} == {"meta"}
