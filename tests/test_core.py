"""Chapter 00: frames come back from a file as they went in, and what cannot be read says so."""
import os
import random
import warnings
import wave
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import nn

from fantasy_nb import core

SHARED = Path(__file__).parents[2] / "shared"
EIGHT = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 0, -1), (0, -1, -1, 0)]


def clip(frames=12, h=64, w=96):
    "Smooth moving colours, every frame and every corner different: (f 3 h w) in [0, 1]."
    f, y, x = torch.meshgrid(torch.arange(frames) / frames, torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin(6 * x + 6 * f), 0.2 + 0.6 * y * (1 - f), 0.5 + 0.4 * torch.cos(5 * y + 3 * x)], 1)


def psnr(a, b):
    return 10 * np.log10(255**2 / ((a.astype(float) - b.astype(float)) ** 2).mean())


def matrix(a, b, c, d):
    return (np.array([a, b, 0, c, d, 0, 0, 0, 16384]) * 65536).astype("<i4").tobytes()


def flagged(source, target, abcd):
    "Copy an .mp4 with another display matrix in its track header."
    data = bytearray(Path(source).read_bytes())
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = np.frombuffer(matrix(*abcd), "<i4").astype(">i4").tobytes()
    Path(target).write_bytes(data)
    return target


def write_timed(path, frames, times):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "10", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(frames, times):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(time * 1000), Fraction(1, 1000)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


# --- seeds, devices, zero


def test_seed_everything_repeats_all_three_streams_and_the_private_one():
    def draw():
        generator = core.seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator).item()

    first = draw()
    assert first == draw()
    core.seed_everything(8)
    assert random.random() != first[0]
    assert core.seed_everything(2**40 + 1).initial_seed() == 2**40 + 1  # larger than NumPy takes


def test_default_device_computes():
    assert torch.ones(2, device=core.default_device()).sum().item() == 2


def test_zero_is_silent_but_learns():
    layer = core.zero_(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    assert not layer(x).any()
    layer(x).sum().backward()
    assert layer.weight.grad.abs().min() > 0


# --- frames


def test_as_frames_dresses():
    x = clip(3)
    frames = core.as_frames(x)
    assert frames.dtype == np.uint8 and frames.shape == (3, 64, 96, 3)
    np.testing.assert_allclose(frames / 255, x.permute(0, 2, 3, 1), atol=0.5 / 255 + 1e-6)
    for same in (frames, torch.from_numpy(frames), list(frames), x.numpy(), list(x), x.double(), x.clone().requires_grad_()):
        np.testing.assert_array_equal(core.as_frames(same), frames)
    assert core.as_frames(x[0]).shape == core.as_frames(frames[0]).shape == (1, 64, 96, 3)
    assert core.as_frames(x[:, :1]).shape == (3, 64, 96, 3)


def test_as_frames_clamps_a_little_and_refuses_a_lot():
    assert core.as_frames(torch.full((3, 4, 4), 1.02)).max() == 255  # a plain cast gives 4
    assert core.as_frames(torch.full((3, 4, 4), -0.02)).max() == 0
    for bad in (clip() * 2 - 1.2, torch.full((3, 4, 4), float("nan")), clip() * 255):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            core.as_frames(bad)
    for bad in (torch.zeros(2, 5, 4, 4), torch.zeros(4, 4), np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.int64)):
        with pytest.raises(ValueError, match="got"):
            core.as_frames(bad)


# --- there and back


@pytest.mark.parametrize("ending", [".mp4", ".mov", ".mkv"])
def test_round_trip(tmp_path, ending):
    x = clip()
    frames, fps = core.read_video(core.write_video(tmp_path / f"clip{ending}", x, 24))
    assert frames.shape == (12, 64, 96, 3) and frames.dtype == np.uint8 and fps == 24
    assert psnr(frames, core.as_frames(x)) > 38
    assert min(psnr(a, b) for a, b in zip(frames, core.as_frames(x))) > 36


def test_channel_order(tmp_path):
    for channel in range(3):
        x = torch.zeros(3, 3, 32, 32)
        x[:, channel] = 0.8
        frames, _ = core.read_video(core.write_video(tmp_path / "one.mp4", x))
        assert frames.mean((0, 1, 2)).argmax() == channel
        np.testing.assert_allclose(frames[1, 16, 16], x[1, :, 16, 16] * 255, atol=4)


@pytest.mark.parametrize("fps", [25, 30000 / 1001, 24000 / 1001, 12.5, 8, 60])
def test_frame_rate_is_kept_exactly(tmp_path, fps):
    path = core.write_video(tmp_path / "clip.mp4", clip(), fps)
    frames, read = core.read_video(path)
    assert read == fps and len(frames) == 12
    with core.open_video(path) as (_, stream):
        assert stream.average_rate == Fraction(fps).limit_denominator(1001)


def test_the_beginning_of_a_file_that_pauses_later_keeps_its_own_rate(tmp_path):
    steady, jitter = np.arange(50) / 25, 0.004 * np.sin(np.arange(50))
    assert core.true_rate(steady, 25.0) == (25.0, True) and core.true_rate(steady + jitter, 25.0) == (25.0, True)
    assert core.true_rate(steady, 15.0) == (25.0, False) and core.true_rate(steady, 24.0) == (25.0, False)  # the header says the mean of a file that pauses
    assert core.true_rate([0.0], 30.0) == (30.0, True)


def test_frames_without_times_keep_the_file_s_rate_and_cannot_be_skipped(tmp_path, monkeypatch):
    path = core.write_video(tmp_path / "clip.mp4", clip(24), 30)

    class Timeless:
        "What FFmpeg gives of a raw stream: no frame has a time."

        def __init__(self, container):
            self.container = container

        def seek(self, *where, **options):
            self.container.seek(*where, **options)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                frame.pts = None
                yield frame

    opened = core.open_video

    @contextmanager
    def without_times(path):
        with opened(path) as (container, stream):
            yield Timeless(container), stream

    monkeypatch.setattr(core, "open_video", without_times)
    assert len(core.read_video(path)[0]) == 24 and len(core.read_video(path, fps=15.0)[0]) == 12
    with pytest.raises(ValueError, match="want a file whose frames have times to start 0.2 s into it"):
        core.read_video(path, start=0.2)


def test_only_one_picture_fits_into_a_file(tmp_path):
    with pytest.raises(ValueError, match="want one picture to write, got 3"):
        core.write_image(tmp_path / "film.png", np.zeros((3, 8, 8, 3), np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("h, w", [(63, 95), (64, 95), (63, 96)])
def test_odd_sizes_are_padded_by_the_edge_and_said(tmp_path, h, w):
    x = core.as_frames(clip(4, h, w))
    with pytest.warns(UserWarning, match=f"{w}x{h} padded to 96x64"):
        path = core.write_video(tmp_path / "odd.mp4", x)
    frames, _ = core.read_video(path)
    assert frames.shape == (4, 64, 96, 3)
    assert psnr(frames[:, :h, :w], x) > 36
    with pytest.warns(UserWarning, match="padded to 96x64"):
        padded = core.pad_even(x)
    np.testing.assert_array_equal(padded, x[:, np.arange(64).clip(max=h - 1)][:, :, np.arange(96).clip(max=w - 1)])


def test_even_sizes_are_silent(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        core.write_video(tmp_path / "even.mp4", clip(2))


def test_a_browser_plays_it(tmp_path):
    path = core.write_video(tmp_path / "clip.mp4", clip(), metadata={"comment": "generated by a test"})
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # index first
    with core.open_video(path) as (container, stream):
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert container.metadata["comment"] == "generated by a test"
        assert stream.codec_context.colorspace == 6  # labelled


def test_metadata_can_be_left_out_and_crf_counts(tmp_path):
    sizes = [core.write_video(tmp_path / f"{crf}.mp4", clip(), crf=crf).stat().st_size for crf in (5, 40)]
    assert sizes[0] > 2 * sizes[1]


# --- orientation


def test_the_eight_matrices_are_a_group():
    picture = np.arange(2 * 3 * 3).reshape(2, 3, 3).astype(np.uint8)
    seen = {core.upright(picture, matrix(*abcd)).tobytes() for abcd in EIGHT}
    assert len(seen) == 8
    np.testing.assert_array_equal(core.upright(picture, matrix(0, 1, -1, 0)), np.rot90(picture, -1))  # clockwise
    np.testing.assert_array_equal(core.upright(picture, matrix(-1, 0, 0, 1)), picture[:, ::-1])
    assert core.upright(picture, None) is picture
    for a, b, c, d in EIGHT:  # x' = a x + c y, y' = b x + d y; negative numbers count from the far edge
        turned = core.upright(picture, matrix(a, b, c, d))
        for y, x in np.ndindex(2, 3):
            np.testing.assert_array_equal(turned[b * x + d * y - (b + d < 0), a * x + c * y - (a + c < 0)], picture[y, x])


@pytest.mark.parametrize("abcd", EIGHT)
def test_rotation_flag_is_honoured(tmp_path, abcd):
    x = core.as_frames(clip(3))
    path = flagged(core.write_video(tmp_path / "clip.mp4", x), tmp_path / "flag.mp4", abcd)
    frames, _ = core.read_video(path)
    expected = np.stack([core.upright(frame, matrix(*abcd)) for frame in x])
    assert frames.shape == expected.shape and psnr(frames, expected) > 36


def test_display_matrix_without_side_data():
    class Frame:  # PyAV raises where a frame carries a kind of side data that it has no name for
        rotation = -90

        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    picture = np.arange(18).reshape(2, 3, 3).astype(np.uint8)
    np.testing.assert_array_equal(core.upright(picture, core.display_matrix(Frame())), np.rot90(picture, -1))


# --- time


def test_even_grid_by_hand():
    assert core.on_even_grid([0, 1, 2, 3], 1).tolist() == [0, 1, 2, 3]
    assert core.on_even_grid([5, 6, 9, 10], 1).tolist() == [0, 1, 1, 1, 2, 3]  # a gap is waited out
    assert core.on_even_grid(np.arange(6) / 30, 15).tolist() == [0, 2, 4]
    assert core.on_even_grid([0, 1, 2], 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert core.on_even_grid([3.0], 25).tolist() == [0]
    jitter = np.arange(50) / 25 + np.random.default_rng(0).uniform(-0.01, 0.01, 50)
    assert core.on_even_grid(jitter, 25).tolist() == list(range(50))


def test_dropped_frames_are_waited_out(tmp_path):
    x = core.as_frames(clip(25))
    present = [i for i in range(25) if i not in (6, 7, 8, 15)]
    frames, fps = core.read_video(write_timed(tmp_path / "gaps.mp4", x[present], np.array(present) / 25))
    assert fps == 25 and len(frames) == 25
    assert min(psnr(frames[i], x[i]) for i in present) > 34
    assert psnr(frames[7], x[5]) > 34


def test_resampling_and_limits(tmp_path):
    path = core.write_video(tmp_path / "clip.mp4", clip(30), 30)
    whole, _ = core.read_video(path)
    half, fps = core.read_video(path, fps=15)
    assert fps == 15
    np.testing.assert_array_equal(half, whole[::2])
    assert len(core.read_video(path, fps=25)[0]) == 25
    assert len(core.read_video(path, fps=60)[0]) == 60
    for limit in (1, 4, 29, 30, 99):
        np.testing.assert_array_equal(core.read_video(path, max_frames=limit)[0], whole[:limit])
        np.testing.assert_array_equal(core.read_video(path, max_frames=limit, fps=60)[0], whole.repeat(2, 0)[:limit])
    for bad in ({"max_frames": 0}, {"fps": 0}, {"fps": -1.0}):
        with pytest.raises(ValueError, match="want max_frames"):
            core.read_video(path, **bad)


# --- what cannot be


def test_unreadable_files_are_one_clear_error(tmp_path):
    good = core.write_video(tmp_path / "good.mp4", clip()).read_bytes()
    bad = {"notes.mp4": b"dear diary\n" * 100, "empty.mp4": b"", "cut.mp4": good[:900], "noise.mp4": np.random.default_rng(0).bytes(5000)}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as caught:
            core.read_video(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file: .*typo.mp4"):
        core.read_video(tmp_path / "typo.mp4")
    with pytest.raises(ValueError, match="as a video"):
        core.read_video(tmp_path)


def test_sound_without_pictures(tmp_path):
    path = tmp_path / "sound.mp4"
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(16000))
    with pytest.raises(ValueError, match="no video in"):
        core.read_video(path)


def test_nothing_half_written(tmp_path):
    path = core.write_video(tmp_path / "clip.mp4", clip())
    before = path.read_bytes()
    for bad in (torch.zeros(0, 3, 8, 8), clip() * 9):
        with pytest.raises(ValueError):
            core.write_video(path, bad)
    with pytest.raises(ValueError, match="fps > 0"):
        core.write_video(path, clip(), 0)
    with pytest.raises(RuntimeError), core.atomic(path) as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_unwritable_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        core.write_video(tmp_path / "nowhere" / "clip.mp4", clip())
    with pytest.raises(ValueError, match="ending"):
        core.write_video(tmp_path / "clip.txt", clip())
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(OSError, match="cannot write .*taken.mp4"):
        core.write_video(tmp_path / "taken.mp4", clip())
    assert os.listdir(tmp_path) == ["taken.mp4"]


# --- pictures


def test_images_there_and_back(tmp_path):
    x = clip(1)
    image = core.read_image(core.write_image(tmp_path / "image.png", x[0]))
    np.testing.assert_array_equal(image, core.as_frames(x)[0])


def test_images_stand_upright_on_white(tmp_path):
    from PIL import Image

    picture = core.as_frames(clip(1))[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(core.read_image(tmp_path / "turned.png"), np.rot90(picture, -1))
    Image.fromarray(np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])).save(tmp_path / "clear.png")
    assert (core.read_image(tmp_path / "clear.png") == 255).all()
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    assert core.read_image(tmp_path / "grey.png").shape == picture.shape


def test_unreadable_images(tmp_path):
    (tmp_path / "notes.png").write_text("dear diary")
    with pytest.raises(ValueError, match="notes.png as a picture"):
        core.read_image(tmp_path / "notes.png")
    core.write_image(tmp_path / "whole.png", torch.rand(3, 64, 64))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match="cut.png as a picture"):
        core.read_image(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match="no such file"):
        core.read_image(tmp_path / "typo.png")


# --- looking


def test_tile_frames():
    x = core.as_frames(clip(5, 8, 10))
    sheet = core.tile_frames(x, columns=3, gap=2)
    assert sheet.shape == (2 * 10 - 2, 3 * 12 - 2, 3)
    np.testing.assert_array_equal(sheet[10:18, 12:22], x[4])
    assert (sheet[10:18, 24:] == 255).all() and (sheet[8:10] == 255).all()
    assert core.tile_frames(x, columns=9).shape == (8, 5 * 12 - 2, 3)


@pytest.fixture
def pyplot():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # agg shows nothing
        yield plt
    plt.close("all")


def test_show_frames(pyplot):
    core.show_frames(clip(5), titles=list("abcde"), columns=3, caption="five")
    figure = pyplot.gcf()
    assert [ax.get_title() for ax in figure.axes] == [*"abcde", ""]
    assert figure._supxlabel.get_text() == "five"
    np.testing.assert_array_equal(figure.axes[4].images[0].get_array(), core.as_frames(clip(5))[4])


def test_draw_tensor(pyplot):
    core.draw_tensor(torch.tensor([[1.0, -2.0, float("-inf")]], requires_grad=True), "t", ("rows", "columns"), (["r"], list("abc")))
    (ax,) = pyplot.gcf().axes
    assert ax.get_title() == "t" and [t.get_text() for t in ax.texts] == ["1", "-2", "-inf"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    for other in (torch.ones(4, dtype=torch.bool), np.arange(6).reshape(2, 3), torch.zeros(60, 50), torch.ones(2, 2, dtype=torch.bfloat16)):
        core.draw_tensor(other)


def test_show_clip_plays_inside_the_page(monkeypatch, tmp_path):
    import base64
    import re

    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    core.show_clip(clip(4, 33, 47), fps=10, width=200, caption="c")
    html = shown[0].data
    assert 'width="200"' in html and "<figcaption>c</figcaption>" in html and "autoplay loop muted" in html
    (tmp_path / "inline.mp4").write_bytes(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1]))
    frames, fps = core.read_video(tmp_path / "inline.mp4")
    assert frames.shape == (4, 34, 48, 3) and fps == 10


# --- samples and real files


def test_data_samples():
    assert core.data_samples("a", "b") == core.data_samples() / "a" / "b"
    assert core.data_samples().is_dir()


@pytest.mark.skipif(not (SHARED / "real").exists(), reason="no ../shared")
def test_real_videos():
    frames, fps = core.read_video(SHARED / "real" / "biden.mp4", max_frames=300)
    assert frames.shape == (218, 432, 432, 3) and fps == 25
    frames, fps = core.read_video(SHARED / "real" / "two_person.mp4")
    assert frames.shape == (146, 720, 1280, 3) and fps == 23


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_in_processes_bring_every_result_or_their_error(processes):
    from fantasy_nb.core import in_processes

    assert sorted(in_processes(pow, [(2, k) for k in range(6)], processes)) == [1, 2, 4, 8, 16, 32]
    assert list(in_processes(pow, [], processes)) == []
    with pytest.raises(ZeroDivisionError):
        list(in_processes(divmod, [(1, 1), (1, 0), (2, 1)], processes))
