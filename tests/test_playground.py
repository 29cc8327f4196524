"Chapter 14: every panel moved by its own controls, without a browser (tests/test_browser.py has one)."
import io
import time
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import fantasy_nb.playground as playground
from fantasy_nb.animate import Animation, PortraitPipeline, find_people
from fantasy_nb.core import data_samples, read_image, read_video
from fantasy_nb.faces import EMOTIONS, Expression
from fantasy_nb.playground import AnimatePanel, AttentionViewer, BoxCanvas, ExpressionMixer, RegionPainter, jpeg_bytes, keep_uploads, listen_in, mp4_bytes, notice, overheard, paint_mask, word_names
from fantasy_nb.tracking import measure_expression, track_faces


@pytest.fixture(scope="module")
def pipeline():
    return PortraitPipeline.from_pretrained("tiny")


def seen(widget) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(widget.value)))


def upload(name: str, content: bytes, kind: str) -> tuple:
    return ({"name": name, "type": kind, "size": len(content), "content": content, "last_modified": datetime.now()},)


# --- files for a browser


def test_pictures_and_films_survive():
    picture = read_image(data_samples("portrait_one.png"))
    assert np.abs(np.asarray(Image.open(io.BytesIO(jpeg_bytes(picture)))).astype(int) - picture).mean() < 3
    frames = read_video(data_samples("driver_a.mp4"), 5)[0]
    with av.open(io.BytesIO(mp4_bytes(frames, 12.5))) as film:
        assert film.streams.video[0].average_rate == 12.5 and len(list(film.decode(video=0))) == 5


def test_notices_are_escaped():
    assert "&lt;b&gt;" in notice("<b>", "error") and notice("") == ""


# --- the mixer


def test_a_slider_changes_its_person_and_nobody_else():
    mixer = ExpressionMixer(2, height=128)
    before = seen(mixer.picture).astype(int)
    mixer.sliders["mouth_open"].value = 1.0
    first = np.abs(seen(mixer.picture) - before).mean(-1)
    half = first.shape[1] // 2
    assert first[:, :half].max() > 60 and first[:, half + 20 :].max() < 30  # JPEG ripples reach a little beyond
    mixer.who.value = 1
    assert mixer.sliders["mouth_open"].value == 0  # the other person's sliders
    mixer.sliders["yaw"].value = 30.0
    assert mixer.moments[0].yaw == 0 and mixer.moments[1].yaw == 30 and mixer.moments[0].mouth_open == 1
    mixer.who.value = 0
    assert mixer.sliders["mouth_open"].value == 1 and mixer.moments[0].mouth_open == 1  # looking changes nothing
    mixer.rest.click()
    assert mixer.moments[0].mouth_open == 0 and mixer.moments[1].yaw == 30


def test_every_slider_changes_the_picture():
    mixer = ExpressionMixer(1, height=96)
    for name, slider in mixer.sliders.items():
        before = seen(mixer.picture).astype(int)
        slider.value = slider.max
        assert np.abs(seen(mixer.picture) - before).max() > 8, name
        mixer.rest.click()


def test_presets_set_one_emotion():
    mixer = ExpressionMixer(1, height=64)
    mixer.sliders["yaw"].value = 10.0
    before = mixer.picture.value
    for emotion in ("joy", "anger"):
        mixer.preset.value = emotion
        assert [name for name in EMOTIONS if mixer.sliders[name].value > 0] == [emotion] and mixer.moments[0].yaw == 10
    assert mixer.picture.value != before
    mixer.preset.value = "neutral"
    assert mixer.picture.value == before


def test_a_preset_can_be_chosen_again():
    mixer = ExpressionMixer(2, height=64)
    mixer.preset.value = "joy"
    assert mixer.preset.value == "joy"  # it stays to be seen
    for change in (lambda: setattr(mixer.who, "value", 1), mixer.rest.click, lambda: setattr(mixer.sliders["joy"], "value", 0.1)):
        change()
        joy = [float(m.joy) for m in mixer.moments]
        assert mixer.preset.value is None  # and goes without moving anybody
        mixer.preset.value = "joy"
        assert mixer.moments[mixer.who.value].joy == pytest.approx(0.9) and mixer.moments[0].joy == joy[0]


def test_a_recording_is_a_motion(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    mixer = ExpressionMixer(1, height=64)
    mixer.play.click()
    assert "want a recording" in mixer.said.value and not mixer.screen.children
    mixer.record.value = True
    for seconds, value in ((11.0, 1.0), (12.0, 0.5)):
        clock[0] = seconds
        mixer.sliders["mouth_open"].value = value
    clock[0] = 13.0
    mixer.record.value = False
    motion = mixer.motion(0, fps=10)
    assert len(motion) == 30
    assert motion.mouth_open[[0, 5, 10, 15, 20, 29]].tolist() == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.5])
    mixer.play.click()
    assert mixer.screen.children[0].value[4:8] == b"ftyp"


def test_a_recording_drives_as_the_tracker_sees(monkeypatch):
    mixer = ExpressionMixer(1, height=64)
    mixer.takes = [(float(k), [Expression.neutral(yaw=y)]) for k, y in enumerate((0.0, 25.0, -25.0))]
    frames, fps = mixer.driver(fps=5.0)
    said = measure_expression(track_faces(frames, 1)[0])["yaw"]
    assert frames.shape == (10, 256, 256, 3) and fps == 5.0
    assert np.corrcoef(said, mixer.motion(0, 5.0).yaw)[0, 1] > 0.97


# --- the region painter


def test_a_dragged_box_takes_its_tokens_along():
    painter = RegionPainter()
    people = len(painter.canvas.boxes)
    assert people == 3 and painter.mask.shape == (len(painter.owners), 3 * painter.tokens)
    for k in range(1, 4):  # a row of the mask hears its owner's columns
        rows = painter.mask[painter.owners == k]
        assert rows[:, (k - 1) * painter.tokens : k * painter.tokens].all() and rows.sum() == len(rows) * painter.tokens
    (x0, y0, x1, y1), *others = painter.canvas.boxes
    before, pictures = painter.owners.clone(), (painter.owned.value, painter.heard.value)
    painter.canvas.boxes = [[x0, y0 + 32, x1, y1 + 32], *others]
    assert (painter.owners != before).any() and painter.owned.value != pictures[0] and painter.heard.value != pictures[1]
    painter.reset.click()
    assert torch.equal(painter.owners, before) and painter.owned.value == pictures[0]


def test_the_released_mask_mixes_three_people():
    painter = RegionPainter()
    painter.rule.value = "release"
    hears = painter.mask.unflatten(1, (3, painter.tokens)).all(-1)
    for owner, want in enumerate(([1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1])):  # person 2 hears everybody but themselves
        assert (hears[painter.owners == owner].int() == torch.tensor(want)).all()


def test_overlap_and_a_face_without_a_token():
    painter = RegionPainter()
    one = int((painter.owners == 1).sum())
    painter.overlap.click()
    assert int((painter.owners == 1).sum()) < one  # the lower box lies in front
    (_, *others) = painter.canvas.boxes
    painter.canvas.boxes = [[16, 16, 30, 30], [17, 17, 29, 31], others[1]]
    assert "too small or too hidden" in painter.said.value and "b42318" in painter.said.value
    painter.canvas.boxes = [[30, 30, 10, 10], *others]
    assert "want boxes x1 y1 x2 y2" in painter.said.value


def test_the_mask_as_a_picture():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, :3] = mask[2, 3:] = True
    picture = paint_mask(mask, torch.tensor([0, 1, 2, 0]), 2, 40)
    assert picture.shape == (40, 12, 3)
    assert (picture[15, 2] == [0xE6, 0x32, 0x32]).all() and (picture[25, 10] == [0x32, 0x64, 0xF0]).all() and (picture[5, 2] == 245).all()


def test_the_canvas_has_a_name_for_those_who_cannot_see_it():
    assert "aria-label" in BoxCanvas._esm and "keydown" in BoxCanvas._esm


# --- listening in


@pytest.mark.parametrize("enlarge", [1.0, 1.36])
def test_attention_is_that_of_the_memory(pipeline, monkeypatch, enlarge):
    monkeypatch.setattr(pipeline, "settings", replace(pipeline.settings, enlarge=enlarge))
    weights, made, (down, across) = listen_in(pipeline, data_samples("portrait_one.png"), data_samples("driver_a.mp4"), frame=3, steps=2)
    blocks, words = len(pipeline.animator.dit.blocks), len(word_names(pipeline.animator.tokens.config))
    assert weights.shape == (2, blocks, down * across, words)
    assert [8 * round(n * enlarge / 8) for n in made.shape[:2]] == [8 * down, 8 * across] and made.shape[0] % 8 == 0
    total = weights.sum(-1)
    assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all() and (total == 0).any() and (total > 0).any()  # a face token's weights are one, the background's none


def test_overheard_changes_nothing_and_is_gone_afterwards(pipeline):
    film, fps = read_video(data_samples("driver_a.mp4"), 2)
    run = lambda: pipeline(data_samples("portrait_one.png"), (film, fps), show=False).frames
    plain = run()
    with overheard(pipeline.animator.dit) as kept:
        heard = run()
    memory = pipeline.animator.dit.blocks[0].cross_attention.memories["expression"]
    assert np.array_equal(plain, heard) and kept and "forward" not in vars(memory)
    query, tokens = torch.randn(1, 3, memory.heads, 32), torch.randn(1, 1, 5, pipeline.animator.tokens.config.width)
    key, value = memory.keys_values(tokens)
    mask = torch.tensor([[[[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]]], dtype=torch.bool)
    guard = memory.guard(key, mask, 1.0, (1, 1, 3))
    with overheard(pipeline.animator.dit) as kept:
        answer = memory(query, key, value, guard)
    values = value[0].mean(1, keepdim=True).expand_as(value[0])  # the same value in every head: then mean weights give the answer
    alike = memory(query, key, values[None], guard)
    assert answer.shape == alike.shape
    torch.testing.assert_close(alike[0].mean(1), kept[0][0] @ values[:, 0], rtol=1e-4, atol=1e-4)


def test_the_viewer_follows_its_sliders(pipeline):
    viewer = AttentionViewer(pipeline, data_samples("portrait_one.png"), data_samples("driver_a.mp4"), steps=2)
    pictures = [viewer.picture.value]
    for control, value in ((viewer.group, "mouth (learnable)"), (viewer.block, 4), (viewer.step, 2), (viewer.frame, 20)):
        control.value = value
        pictures.append(viewer.picture.value)
    assert len(set(pictures)) == len(pictures)
    with pytest.raises(ValueError, match="want a frame from 0 to"):
        listen_in(pipeline, data_samples("portrait_one.png"), data_samples("driver_a.mp4"), frame=1000)


def test_the_viewer_says_where_no_face_is_seen(pipeline):
    frames = read_video(data_samples("driver_a.mp4"), 2)[0]
    frames[1] = 0
    viewer = AttentionViewer(pipeline, data_samples("portrait_one.png"), (frames, 25.0), steps=1)
    picture = viewer.picture.value
    viewer.frame.value = 1
    said = viewer.said.value
    assert "frame 1: want a driver with a face" in said and "b42318" in said and viewer.picture.layout.display == "none"
    viewer.block.value = 2
    assert viewer.said.value == said  # nothing to look at
    viewer.block.value = 1
    viewer.frame.value = 0
    assert viewer.picture.value == picture and viewer.picture.layout.display is None and "b42318" not in viewer.said.value


# --- the panel that animates


@pytest.fixture
def panel(pipeline):
    return AnimatePanel(pipeline, frames=5)


def test_a_film_is_what_the_pipeline_makes(panel, pipeline):
    assert len(panel.rows.children) == 2
    panel.rows.children[1].overall.value = 0.5
    panel.seed.value = 3
    panel.start()
    made = panel.wait()
    want = pipeline(data_samples("portrait_two.png"), [data_samples("driver_a.mp4"), data_samples("driver_b.mp4")], frames=5, seed=3, overall=[1.0, 0.5], show=False)
    assert np.array_equal(made.frames, want.frames)
    assert panel.screen.children[0].value[4:8] == b"ftyp" and panel.screen.children[1].data == panel.screen.children[0].value and "5 frames" in panel.said.value
    assert not panel.go.disabled and panel.cancel.disabled and panel.bar.value == 0


def test_assignment_and_nobody(panel):
    panel.rows.children[0].driver.value = "nobody"
    asked = panel.settings()
    assert asked["assign"] == [2] and asked["drivers"] == [data_samples("driver_b.mp4")]
    panel.rows.children[1].driver.value = "nobody"
    panel.start()
    assert panel.wait() is None and "want a driver for at least one person" in panel.said.value


def test_progress_and_cancel(panel, monkeypatch):
    stages, look = [], panel.watch

    def watch(stage, share):
        stages.append((stage, panel.bar.value))
        if stage == "denoising":
            panel.cancel.click()
        look(stage, share)

    monkeypatch.setattr(panel, "watch", watch)
    panel.start()
    assert panel.wait() is None and "cancelled" in panel.said.value
    assert stages == [("tracking drivers", 0.0), ("tracking drivers", 0.0), ("denoising", 0.25)] and not panel.screen.children
    monkeypatch.setattr(panel, "watch", look)
    panel.start()
    assert panel.wait() is not None  # the next one works


@pytest.mark.parametrize("value", [upload("../mine.mp4", b"film", "video/mp4"), {"../mine.mp4": {"metadata": {}, "content": b"film"}}], ids=["ipywidgets 8", "ipywidgets 7"])
def test_uploads_of_both_ipywidgets_are_kept(value, tmp_path):
    [path] = keep_uploads(SimpleNamespace(value=value), tmp_path)
    assert path == tmp_path / "mine.mp4" and path.read_bytes() == b"film"


def test_uploads(panel):
    driver = data_samples("driver_c.mp4").read_bytes()
    panel.add_driver.value = upload("../mine.mp4", driver, "video/mp4")
    assert panel.rows.children[0].driver.value == "mine.mp4" and panel.drivers["mine.mp4"].parent.parent == playground.Path(panel.folder.name)
    assert panel.rows.children[1].driver.value == "sample: driver b"  # kept
    panel.add_portrait.value = upload("three.png", data_samples("portrait_three.png").read_bytes(), "image/png")
    assert panel.portrait.value == "three.png" and len(panel.rows.children) == 3
    for add, content, words in ((panel.add_driver, b"just a note", "notes.mp4: cannot read it"), (panel.add_driver, b"", "notes.mp4"), (panel.add_portrait, b"just a note", "notes.mp4")):
        add.value = upload("notes.mp4", content, "video/mp4")
        assert words in panel.said.value and "b42318" in panel.said.value and panel.folder.name not in panel.said.value
        assert "notes.mp4" not in panel.drivers and "notes.mp4" not in panel.portraits
        add.value = ()
    wall = np.full((64, 64, 3), 128, np.uint8)
    panel.add_portrait.value = upload("wall.jpg", jpeg_bytes(wall), "image/jpeg")
    assert "want a portrait with a face" in panel.said.value and panel.portrait.value == "three.png"


def test_uploads_outlive_results_and_refusals(panel):
    driver = data_samples("driver_c.mp4").read_bytes()
    panel.add_driver.value = upload("film.mp4", driver, "video/mp4")  # a film that was kept has this name
    panel.animation = Animation(np.zeros((2, 32, 32, 3), np.uint8), 25.0, [])
    panel.present(1.0)
    assert panel.screen.children[1].data and panel.drivers["film.mp4"].read_bytes() == driver
    panel.add_driver.value = upload("film.mp4", b"just a note", "video/mp4")
    assert "film.mp4: cannot read it" in panel.said.value and panel.drivers["film.mp4"].read_bytes() == driver
    for name in ("one", "three"):  # a better file of the same name takes its place
        panel.add_portrait.value = upload("mine.png", data_samples(f"portrait_{name}.png").read_bytes(), "image/png")
    assert len(panel.rows.children) == 3


def test_a_recording_becomes_a_driver(panel):
    mixer = ExpressionMixer(1, height=64)
    mixer.takes = [(0.0, [Expression.neutral()]), (0.3, [Expression.neutral(mouth_open=1.0)])]
    panel.add_motion(mixer)
    assert panel.rows.children[0].driver.value == "recording"
    panel.start()
    assert len(panel.wait().frames) == 5


def test_people_in_the_samples_are_found():
    assert [len(find_people(read_image(data_samples(f"portrait_{n}.png")))) for n in ("one", "two", "three")] == [1, 2, 3]
