"Chapter 12: every metric against a known value or another implementation; cases, methods, rows, tables, the command."
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fantasy_nb.exprbench as exprbench
from fantasy_nb.core import data_samples, read_image, write_image, write_video
from fantasy_nb.exprbench import (ABLATIONS, BOUNDS, GAZE_DEGREES, RULES, Benchmark, EncoderFeatures, Ruler, Studio, another_actor, another_driver, as_markdown, by_film, evaluate, face_errors, following, frechet_distance, heard, judge,
                                  larger, leakage, main, make_methods, mean_and_interval, perceptual_distance, picture_errors, read_rows, results_table, ruler_error, unchanged, write_results)
from fantasy_nb.animate import Animation, PortraitPipeline
from fantasy_nb.data import SceneClips
from fantasy_nb.expression import GROUPS, Features
from fantasy_nb.faces import Expression, Identity, render_crops
from fantasy_nb.train import PICTURES, Animator, as_heard, carries_expression, encode_clips
from fantasy_nb.tracking import measure_expression, track_faces

SMALL = dict(clips=1, seeds=(0,), frames=9)


@pytest.fixture(scope="module")
def case():
    return Benchmark.multi(clips=1).case(2, 0, 0)


@pytest.fixture(scope="module")
def tracks(case):
    return track_faces(larger(case.film[1:]), 2)


@pytest.fixture(scope="module")
def look():
    return EncoderFeatures()


@pytest.fixture(scope="module")
def ruler():
    return Ruler(count=300)


# --- pictures


def test_psnr_and_ssim_by_hand():
    truth = np.random.default_rng(0).integers(20, 230, (3, 24, 32, 3), np.uint8)
    assert picture_errors(truth, truth) == {"psnr": 100.0, "ssim": 1.0}
    assert picture_errors(truth + 5, truth)["psnr"] == pytest.approx(20 * np.log10(255 / 5), abs=1e-6)
    a, b = (np.full((1, 16, 16, 3), v, np.uint8) for v in (100, 120))  # flat pictures: only the means count
    assert picture_errors(a, b)["ssim"] == pytest.approx((2 * 100 * 120 + 6.5025) / (100**2 + 120**2 + 6.5025), abs=1e-4)


def test_perceptual_distance_of_known_features():
    left, right = np.zeros((2, 4, 4, 3), np.uint8), np.ones((2, 4, 4, 3), np.uint8)
    features = lambda film: torch.tensor([[1.0, 0.0], [0.0, 1.0]])[film[:, 0, 0, 0].astype(int)][:, :, None, None] * 7  # at right angles, any length
    assert perceptual_distance(left, left, features) == 0
    assert perceptual_distance(left, right, features) == pytest.approx(2)


def test_perceptual_distance_sees_faces(case, look):
    truth = case.film[1:9]
    noisy = np.clip(truth + np.random.default_rng(0).normal(0, 20, truth.shape), 0, 255).astype(np.uint8)
    assert perceptual_distance(truth, truth, look) == 0
    assert perceptual_distance(noisy, truth, look) > perceptual_distance((0.9 * truth).astype(np.uint8), truth, look) > 0


def test_frechet_distance_of_known_clouds():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance 1, exactly
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + torch.tensor([3.0, 0, 4])) == pytest.approx(25, abs=1e-6)
    assert frechet_distance(x, 3 * x) == pytest.approx(3 * (1 - 3) ** 2, abs=1e-6)  # sum of (s1 - s2)^2
    with pytest.raises(ValueError, match="want two samples or more of each, got 1 and 4000"):
        frechet_distance(x[:1], x)


# --- faces


def test_every_error_of_a_film_with_itself_is_zero(case, tracks, ruler):
    film = larger(case.film[1:])
    assert all(value == 0 for value in face_errors(film, tracks[0], film, tracks[0]).values())
    assert ruler_error(ruler, film, tracks[0], film, tracks[0]) == 0


def test_known_changes_have_known_errors(case, tracks, monkeypatch):
    film, track = larger(case.film[1:]), tracks[0]
    moved = replace(track, landmarks=track.landmarks + torch.tensor([3.0, 4.0, 0.0]), boxes=track.boxes + torch.tensor([3.0, 4.0, 3.0, 4.0]))
    height = (track.boxes[:, 3] - track.boxes[:, 1]).mean().item()
    errors = face_errors(film, moved, film, track)
    assert errors["lmd"] == pytest.approx(5000 / height, rel=1e-5)
    assert errors["aed"] < 1e-3 and errors["apd"] < 1e-3 and errors["identity"] < 1e-3  # nobody did anything else
    brighter = np.clip(film.astype(int) + 10, 0, 255).astype(np.uint8)
    assert face_errors(brighter, track, film, track)["colour"] == pytest.approx(10, abs=0.6)
    said = measure_expression(track)
    shifted = dict(yaw=said["yaw"] + 9, gaze_x=said["gaze_x"] + 0.4, smile=said["smile"] - 0.6)
    monkeypatch.setattr(exprbench, "measure_expression", lambda t: said if t is track else said | shifted)
    errors = face_errors(film, moved, film, track)
    assert errors["apd"] == pytest.approx(1000 * np.deg2rad(9) / 3, rel=1e-4)
    assert errors["gaze"] == pytest.approx(GAZE_DEGREES * 0.2, rel=1e-4)
    assert errors["aed"] == pytest.approx(100 * 0.6 / len(exprbench.EXPRESSION_MEASURES), rel=1e-4)


def test_identity_tells_people_apart(case, tracks):
    film = larger(case.film[1:])
    halves = [(tracks[k][:12], tracks[k][12:]) for k in (0, 1)]
    same = [face_errors(film[:12], a, film[12:], b)["identity"] for a, b in halves]
    other = face_errors(film[:12], halves[0][0], film[12:], halves[1][1])["identity"]
    assert max(same) < other


def test_the_ruler_reads_true_films(ruler):
    "On five unseen people the reading follows the true factor."
    pairs = {name: ([], []) for name in ("mouth_open", "blink_left")}
    for index in range(5):
        one = Benchmark.single(clips=1).case(1, 5, index)
        film = larger(one.film[1:])
        read = ruler(film, track_faces(film, 1)[0])
        for name, (seen, true) in pairs.items():
            curve = getattr(one.motions[0], name)[1:]
            seen.append(read[name] - read[name].mean())
            true.append(curve - curve.mean())
    for name, (seen, true) in pairs.items():
        assert np.corrcoef(torch.cat(seen), torch.cat(true))[0, 1] > 0.75, name


# --- leakage


def test_leakage_of_known_mixtures():
    film, changed, rest = np.zeros((4, 8, 16, 3)), np.zeros((4, 8, 16, 3)), np.ones((4, 8, 16), bool)
    own, other = np.s_[:, :, :8], np.s_[:, :, 8:]
    assert leakage(film, changed, own, [other]) == 0  # nothing moves
    changed[own] = 10
    assert leakage(film, changed, own, [other]) == 0
    changed[other] = 3
    assert leakage(film, changed, own, [other]) == pytest.approx(0.3)
    assert leakage(film, changed, own, [other, np.s_[:, :4, 8:]]) == pytest.approx(0.3)
    assert leakage(film, changed, own, []) == 0
    rest[:, :, 8:12], changed[:, :, 8:12] = False, 200  # hair of the first swings into the second's box: not counted
    assert leakage(film, changed, own, [other], rest) == pytest.approx(0.3)


def test_following_is_the_mean_correlation_of_what_moves():
    motion = Expression.sample(50, 0)
    true = {name: getattr(motion, name) for name in exprbench.RULED}
    assert following(true, motion) == pytest.approx(1)
    assert following({name: 3 - 0.1 * x for name, x in true.items()}, motion) == pytest.approx(-1)
    assert following({name: 0 * x for name, x in true.items()}, motion) == 0  # a face that does nothing
    noisy = true | {"smile": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    want = (5 + np.corrcoef(noisy["smile"], motion.smile)[0, 1]) / 6
    assert following(noisy, motion) == pytest.approx(want, abs=1e-5)
    still = motion[[0] * 50]
    assert following(true, still) is None


def test_another_actor_changes_the_driver_and_nothing_else(case):
    other = another_actor(case, 1)
    assert torch.equal(other.crops[0], case.crops[0]) and not torch.equal(other.crops[1], case.crops[1])
    assert other.motions is case.motions and other.film is case.film


def test_the_actor_s_share_of_known_films(case):
    "A film that shows who drives a third as strongly as what is performed."
    turned = another_driver(case, 0)

    def film(asked):
        other = 0 if torch.equal(asked.crops[0], case.crops[0]) else 30 if asked is turned else 10
        return np.full_like(case.film[1:], 100 + other)

    got = exprbench.interventions(case, turned, film, film(case))
    assert got["actor"] == pytest.approx(1 / 3) and got["leakage"] == pytest.approx(1)  # and it shows it everywhere
    still = exprbench.interventions(case, turned, lambda asked: case.film[1:], case.film[1:])
    assert still == {"leakage": 0.0, "actor": None}


def test_true_films_do_not_leak(case):
    turned = another_driver(case, 1)
    rest = unchanged(case.film, turned.film)[1:]
    assert turned.motions[0] is case.motions[0] and torch.equal(turned.motions[1].yaw[1:], case.motions[1].yaw[1:].flip(0))
    assert 0.3 < rest[case.face(0)].mean() < 1  # hair and boxes overlap, most of the face does not
    assert np.array_equal(case.film[0], turned.film[0])  # the same portrait
    assert torch.equal(case.crops[0], turned.crops[0]) and not torch.equal(case.crops[1], turned.crops[1])
    back = another_driver(turned, 1)
    assert np.array_equal(back.film, case.film) and torch.equal(back.crops, case.crops)


# --- cases and methods


def test_cases_are_the_same_every_time_and_all_different():
    one, two = Benchmark.multi(**SMALL), Benchmark.multi(**SMALL)
    cases = list(one)
    assert len(cases) == len(one) == 2 and [c.people for c in cases] == [2, 3]
    assert all(np.array_equal(a.film, b.film) and torch.equal(a.crops, b.crops) for a, b in zip(cases, two))
    more = Benchmark.single(clips=2, seeds=(0, 1), frames=9)
    films = [c.film for c in more]
    assert len(films) == 4 and len({f.tobytes() for f in films}) == 4
    cross, own = Benchmark.single(**SMALL).case(1, 0, 0), Benchmark.single(**SMALL, own=True).case(1, 0, 0)
    assert np.array_equal(cross.film, own.film) and not torch.equal(cross.crops, own.crops)
    for wrong, said in (({"people": (0,)}, "1 to 5 people"), ({"frames": 24}, "want 4n.1 frames, 5 or more, got frames=24"), ({"frames": 1}, "got frames=1")):
        with pytest.raises(ValueError, match=said):
            Benchmark(**wrong)


def test_rules_for_three():
    owners, keep = torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 1, dtype=torch.bool)
    assert torch.equal(heard(owners, 3, 1, keep, "full")[0, 1:], torch.eye(3, dtype=torch.bool))
    assert heard(owners, 3, 1, keep, "no-mask").all()
    assert heard(owners, 3, 1, keep, "release")[0].int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]


@torch.no_grad()
def test_equation_four_to_the_letter():
    from fantasy_nb.regions import ExpressionAttention

    memory = ExpressionAttention(8, 16, 2)
    for p in memory.parameters():
        p.normal_()
    tokens, query = torch.randn(1, 2, 6, 8), torch.randn(1, 2 * 3, 2, 8)
    key, value = memory.keys_values(tokens)
    mask = torch.rand(1, 2, 3, 6) < 0.5
    mask[0, 0, 0], mask[0, 1, 2] = False, True  # a token that hears nobody, one that hears all
    got = exprbench.multiplied(memory, query, key, value, memory.guard(key, mask, 1.0, (1, 2, 3)))
    for t in range(2):
        for n in range(3):
            for head in range(2):
                logits = torch.stack([mask[0, t, n, e] * (query[0, 3 * t + n, head] @ key[t, e, head]) / 8**0.5 for e in range(6)])
                want = sum(w * value[t, e, head] for e, w in enumerate(logits.softmax(0))) * mask[0, t, n].any()
                torch.testing.assert_close(got[0, 3 * t + n, head], want, rtol=1e-4, atol=1e-5)


def test_rules_order_as_the_masks_say():
    "With one set of weights and the same noise: no mask leaks most, the right one least; for three people the release's leaks, too."
    case = Benchmark.multi(clips=1).case(3, 0, 1)
    turned, leaks = another_driver(case, 0), {}
    for rule in RULES:
        film = Studio("tiny", rule).film
        leaks[rule] = leakage(film(case), film(turned), case.face(0), [case.face(1), case.face(2)], unchanged(case.film, turned.film)[1:])
    assert leaks["full"] < 0.1 < leaks["release"] < leaks["no-mask"]
    assert leaks["full"] < leaks["eq4"] < leaks["release"]
    two = Benchmark.multi(clips=1).case(2, 0, 0)
    right, theirs = (Studio("tiny", rule).film(two) for rule in ("full", "release"))
    assert all(np.array_equal(right[two.face(k)], theirs[two.face(k)]) for k in (0, 1))  # for two people theirs is right
    with pytest.raises(ValueError, match="want a rule out of full"):
        Studio("tiny", "mask")


def test_a_rule_is_gone_after_the_film(case):
    studio = Studio("tiny", "eq4")
    studio.film(replace(case, crops=case.crops[:, :9], film=case.film[:9], boxes=case.boxes[:9]))
    assert "listen" not in vars(studio.animator) and "forward" not in vars(studio.animator.dit.blocks[0].cross_attention.memories["expression"])


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="want methods out of full, no-mask, eq4, release, still, vae, got magic"):
        make_methods(["full", "magic"], {"default": "tiny"})


def test_bounds_are_bounds_with_weights_for_every_seed(monkeypatch, case):
    studios = []
    monkeypatch.setattr(exprbench, "Studio", type("Fake", (), {"__init__": lambda self, folder, rule="full": studios.append((folder, rule)), "film": lambda self, case: "film", "reconstruction": lambda self, case: "true"}))
    made = make_methods(["still", "vae", "no-mask"], {"default": "x-{seed}"})
    assert np.array_equal(made["still"](case), np.repeat(case.film[:1], 24, 0)) and not studios
    assert made["vae"](case) == "true" and made["no-mask"](replace(case, seed=2)) == "film" and studios == [("x-0", "full"), ("x-2", "no-mask")]


# --- ablations


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "Three scenes (of two, one, two people), their mirror images, features and landmarks."
    pipeline, folder = PortraitPipeline.from_pretrained("tiny"), tmp_path_factory.mktemp("scenes")
    encode_clips(SceneClips(as_heard(PICTURES["tiny"]["stills"][0], pipeline.encoder)), 3, folder, pipeline.vae, pipeline.encoder, exprbench.encode_both, show=False)
    return folder


def test_the_ablations_hear_crops_of_the_encoder_s_kind_and_keep_to_their_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import ablate

    drawn, trained = [], []
    monkeypatch.setattr(ablate, "encode_clips", lambda clips, *rest: drawn.append(clips.config))
    monkeypatch.setattr(ablate, "train_ablation", lambda base, cache, ablation, out, seed, steps: trained.append(seed) or out.mkdir() or (out / "log.csv").write_text("loss\n.5\n"))

    def run(*changed):
        monkeypatch.setattr(sys, "argv", ["ablate", "--out", str(tmp_path), "--names", "full", "--seeds", "3", *changed])
        ablate.main()

    run()
    assert (drawn[0].crop, drawn[0].closer) == (96, 1.7) and trained == [3]
    base, said = data_samples("weights", "tiny"), capsys.readouterr().out
    assert f"--seeds 3 --methods full,still,vae --weights default={base} full={tmp_path}/full-{{seed}}" in said
    (tmp_path / "full-3" / "pipeline.json").touch()
    run()  # done already
    for name in ("--steps", "--scenes"):
        with pytest.raises(SystemExit, match=f"{name[2:]}.*name another --out"):
            run(name, "20")
    assert trained == [3] and len(drawn) == 2


def test_landmarks_take_the_features_places():
    order = [k for group in GROUPS for k in exprbench.MARKS[group]]
    assert len(order) == len(set(order)) == 277 and max(order) < 478
    marks = torch.arange(478).repeat(2, 3, 1)[..., None] + torch.tensor([0.0, 0.5])
    features = Features.unpack(exprbench.landmark_features(marks))
    assert features.head[0, 0].tolist() == [1, 1.5, 10, 10.5, 152, 152.5] and features.mouth.shape == (2, 3, 512)


def test_landmarks_are_where_the_face_is():
    who, motion = Identity.sample(1, 5), Expression.neutral(3, yaw=torch.tensor([0.0, 20.0, -20.0]))
    crops = ((render_crops(who.repeat(3), motion, 64) + 1) * 127.5).round().to(torch.uint8)
    marks = exprbench.landmarks_of(crops)
    nose = marks[:, 1, 0]
    assert marks.shape == (3, 478, 2) and nose[2] < nose[0] < nose[1]  # the tip goes where the head turns
    filled = exprbench.landmarks_of(torch.cat([0 * crops[:1], crops[:1], 0 * crops[:1]]))
    assert torch.equal(filled[0], filled[1]) and torch.equal(filled[2], filled[1])  # no face: as in the crop before, or the first found
    with pytest.raises(ValueError, match="finds no face in any of 2 crops"):
        exprbench.landmarks_of(0 * crops[:2])


def test_a_new_adapter_says_nothing_and_keeps_the_base(scenes):
    base = Animator.from_pretrained(data_samples("weights", "tiny"))
    made = exprbench.new_adapter(data_samples("weights", "tiny"), ABLATIONS["all-learnable"], 0)
    assert made.tokens.config.tokens_per_frame == 32
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in made.state_dict().items() if not carries_expression(k))
    batch = exprbench.lessons(scenes, ABLATIONS["full"])[0].stack([0])
    x, portrait = batch["latents"][:, :, 1:2], batch["latents"][:, :, :1]
    answers = [made(x, torch.ones(1), portrait, z * batch["features"][:, :, :2], batch["owners"], stills=True) for z in (1.0, -3.0)]
    assert torch.equal(*answers)


def test_lessons_leave_out_what_they_must(scenes):
    full, scale = exprbench.lessons(scenes, ABLATIONS["full"])
    alone, _ = exprbench.lessons(scenes, ABLATIONS["one-person"])
    assert scale is None and {shape[-3] for shape in full.groups} == {1, 2} and {shape[-3] for shape in alone.groups} == {1}
    marks, scale = exprbench.lessons(scenes, ABLATIONS["landmarks"])
    every = torch.cat([clip["features"].float().flatten(0, 1) for clip in marks.clips.values()])
    assert every.mean(0).abs().max() < 0.02 and (every.std(0) - 1).abs().max() < 0.02 and scale["mean"].shape == (554,)
    assert not torch.equal(marks.clips[0]["features"], full.clips[0]["features"]) and torch.equal(marks.clips[0]["latents"], full.clips[0]["latents"])


@pytest.mark.parametrize("name", ["landmarks", "no-mask", "no-learnable"])
def test_an_ablation_trains_the_adapter_alone(name, scenes, tmp_path, case):
    base = data_samples("weights", "tiny")
    exprbench.train_ablation(base, scenes, ABLATIONS[name], tmp_path / "x-0", steps=2, show=False)
    before, after = exprbench.new_adapter(base, ABLATIONS[name], 0).state_dict(), Animator.from_pretrained(tmp_path / "x-0").state_dict()
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert changed and all(carries_expression(k) for k in changed)
    method = make_methods(["x"], {"default": "tiny", "x": str(tmp_path / "x-{seed}")})["x"]
    short = replace(case, crops=case.crops[:, :5], film=case.film[:5], boxes=case.boxes[:5])
    film = method(short)
    assert film.shape == (4, *case.film.shape[1:]) and np.array_equal(film, Studio(tmp_path / "x-0").film(short))
    assert (Studio(tmp_path / "x-0").scale is not None) == (name == "landmarks")
    with pytest.raises(FileNotFoundError):
        method(replace(short, seed=1))


# --- rows and tables


def test_floor_and_ceiling(case, look):
    methods = make_methods(["still", "vae"], {"default": "tiny"})
    rows = evaluate(methods, [case], look, show=False)
    table = {(c["method"], c["metric"]): c["mean"] for c in results_table(rows)}
    assert table["vae", "psnr"] > table["still", "psnr"] + 5
    assert table["vae", "apd"] < table["still", "apd"]
    assert table["still", "leakage"] == 0 and ("vae", "leakage") not in table
    assert table["vae", "lost"] == 0


def test_a_lost_face_is_counted(case):
    rows = judge(np.zeros_like(case.film[1:]), case, None)
    assert [row["lost"] for row in rows] == [1.0, 1.0] and "aed" not in rows[0] and "psnr" in rows[0]


def test_intervals_cover_as_often_as_they_say():
    g, covered = np.random.default_rng(0), 0
    for k in range(300):
        mean, low, high = mean_and_interval(g.normal(1.0, 2.0, 40), 400, k)
        assert low <= mean <= high
        covered += low <= 1.0 <= high
    assert 0.89 < covered / 300 < 0.98


def test_table_by_hand():
    rows = [{"method": m, "case": c, "people": 2, "seed": 0, "person": p, "aed": v} for m, c, p, v in (("a", "x", 1, 1.0), ("a", "x", 2, 3.0), ("a", "y", 1, 4.0), ("b", "x", 1, 5.0), ("b", "y", 1, 5.0))]
    assert by_film(rows, "a", 2, "aed") == {"x": 2.0, "y": 4.0}
    (a, b) = results_table(rows, ["aed"])
    assert (a["mean"], a["films"], b["mean"], b["low"], b["high"]) == (3.0, 2, 5.0, 5.0, 5.0)
    assert [c["mean"] for c in results_table(rows, ["aed"], against="b")] == [-2.0, 0.0]
    text = as_markdown([a, b])
    assert text.splitlines()[0] == "| people | method | aed (1e-2) |" and "| 2 | b | 5 [5, 5] |" in text


# --- the command


def test_command_resumes_and_refuses(tmp_path, capsys):
    out = tmp_path / "bench"
    arguments = ["--set", "single", "--methods", "still,vae", "--clips", "1", "--seeds", "0", "--frames", "9", "--out", str(out), "--quiet"]
    assert main(arguments) == 0
    rows = read_rows(out / "rows.csv")
    assert {row["method"] for row in rows} == {"still", "vae"} and all((out / name).stat().st_size for name in ("table.md", "table.csv", "plot.png"))
    assert "| 1 | vae |" in capsys.readouterr().out
    before = (out / "rows.csv").read_text()
    assert main(arguments) == 0 and (out / "rows.csv").read_text() == before  # nothing made twice
    assert main([*arguments[:3], "full,still,vae", *arguments[4:]]) == 0  # one method more
    assert len(read_rows(out / "rows.csv")) == len(rows) + 1
    for wrong, said in ((["--clips", "2"], "holds other results: {'clips': (1, 2)}"), (["--methods", "magic"], "want methods out of"), (["--weights", "nowhere"], "no weights 'nowhere'"), (["--frames", "13"], "holds other results")):
        assert main([*arguments, *wrong]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert main([*arguments, "--frames", "8", "--out", str(tmp_path / "eight")]) == 2
    assert "want 4n+1 frames" in capsys.readouterr().err
    noted = json.loads((out / "bench.json").read_text())
    assert noted["clips"] == 1 and [how["detail"] for how in noted["settings"]["default"]] == [1]
    noted["settings"]["default"][0]["detail"] = 0.0  # as if its rows were of the same weights, used in another way
    (out / "bench.json").write_text(json.dumps(noted))
    assert main(arguments) == 2 and "holds other results: {'settings'" in capsys.readouterr().err


def test_a_slip_of_the_pen_leaves_nothing_behind(tmp_path, capsys):
    out = tmp_path / "out"
    for wrong, said in (
        (["--frames", "24"], "want 4n+1 frames"),
        (["--clips", "0"], "want clips and seeds"),
        (["--folder", str(tmp_path / "nowhere")], "want pictures in"),
        (["--folder", str(tmp_path), "--set", "single", "--own", "--weights", "x=tiny"], "got --set, --own, --weights x=tiny as well"),
        (["--weights", "mini=mini", "--methods", "mini,still"], "want weights for faces of one size"),
    ):
        assert main([*wrong, "--out", str(out), "--quiet"]) == 2 and said in capsys.readouterr().err and not out.exists()
    exprbench.settle(out, {"clips": 1})
    exprbench.settle(out, {"clips": 2})  # no rows yet: no results to mix
    (out / "rows.csv").touch()
    with pytest.raises(ValueError, match="holds other results"):
        exprbench.settle(out, {"clips": 1})


def test_the_ruler_is_the_same_whatever_is_judged():
    import inspect

    assert "Ruler()" in inspect.getsource(exprbench.run_bench) and inspect.signature(Ruler).parameters["size"].default == 96


def test_a_driven_person_is_judged_in_their_own_place(tmp_path, monkeypatch):
    "Two people, the right one's face larger, a driver for the left one."
    for kind, name in (("portraits", "two.png"), ("drivers", "a.mp4")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).touch()
    picture, pairs = np.zeros((256, 256, 3), np.uint8), []
    monkeypatch.setattr(exprbench, "read_image", lambda path: picture)
    monkeypatch.setattr(exprbench, "track_faces", lambda film, people: ["left", "right"][:2] if people > 1 else ["right"])  # the largest, from left to right
    monkeypatch.setattr(exprbench, "face_errors", lambda film, track, *_: pairs.append(track) or dict.fromkeys(("aed", "apd", "gaze"), 0.0))
    monkeypatch.setattr(exprbench, "face_shape", lambda track: torch.full((1, 3, 2), float(track == "left")))
    monkeypatch.setattr(exprbench, "skin_colour", lambda film, track: torch.full((1, 3), float(track == "left")))
    made = Animation(picture[None], 25.0, ["driver"], [picture[None]], [1])
    (row,) = exprbench.real_rows(lambda *_, **__: made, tmp_path, 4, show=False)
    assert pairs == ["left"] and row["person"] == 1 and row["lost"] == row["identity"] == row["colour"] == 0


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    benchmark, path, calls = Benchmark.single(clips=2, seeds=(0,), frames=9), tmp_path / "rows.csv", []

    def method(case):
        calls.append(case.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.repeat(case.film[:1], len(case.film) - 1, 0)

    keep = lambda rows: exprbench.append_rows(path, rows)
    with pytest.raises(KeyboardInterrupt):
        evaluate({"still": method}, benchmark, leak=False, keep=keep, show=False)
    done = {(row["method"], row["case"]) for row in read_rows(path)}
    assert len(done) == 1
    evaluate({"still": method}, benchmark, leak=False, done=done, keep=keep, show=False)
    assert len(calls) == 3 and len(read_rows(path)) == 2


def test_a_folder_of_real_pictures(tmp_path, capsys):
    for kind in ("portraits", "drivers"):
        (tmp_path / kind).mkdir()
    write_image(tmp_path / "portraits" / "one.png", read_image(data_samples("portrait_one.png")))
    assert main(["--folder", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "found 1 and 0" in capsys.readouterr().err
    film = Benchmark.single(**SMALL, height=128, crop=128).case(1, 0, 0).film
    write_video(tmp_path / "drivers" / "a.mp4", film, 25)
    assert main(["--folder", str(tmp_path), "--frames", "8", "--out", str(tmp_path / "new"), "--quiet"]) == 0
    (row,) = read_rows(tmp_path / "new" / "rows.csv")
    assert row["case"] == "one a" and row["aed"] > 0 and row["identity"] > 0 and row["psnr"] is None


def test_results_are_written(tmp_path):
    rows = [{"method": m, "case": str(k), "people": 2, "seed": 0, "person": 1, "psnr": 20.0 + k, "leakage": 0.1 * k} for m in ("a", "b") for k in range(3)]
    write_results(rows, tmp_path)
    table = list(csv.DictReader(open(tmp_path / "table.csv")))
    assert len(table) == 4 and float(table[0]["mean"]) == 21.0
    assert set(BOUNDS) == {"still", "vae"} and Path(tmp_path / "plot.png").stat().st_size > 5000


def test_seeds_count_as_seeds():
    values = {f"2-{seed}-{k}": 10 * seed + k for seed in range(3) for k in range(4)}
    mean, low, high, seeds = exprbench.over_seeds(values)
    assert mean == pytest.approx(11.5) and seeds == pytest.approx([1.5, 11.5, 21.5])
    narrow = mean_and_interval(list(values.values()))
    assert high - low > 1.5 * (narrow[2] - narrow[1])  # three seeds say less than twelve films would
    alike = exprbench.over_seeds({f"2-{seed}-{k}": 1.0 for seed in range(3) for k in range(4)})
    assert alike[:3] == (1, 1, 1)
    rows = [{"method": m, "case": f"2-{s}-{k}", "people": 2, "seed": s, "person": 1, "psnr": 20.0 + k - 2 * (m == "b")} for m in ("full", "b") for s in range(3) for k in range(2)]
    (cell,) = exprbench.ablation_table(rows, ("psnr", "apd"))
    assert cell["method"] == "b" and cell["mean"] == -2 and cell["seeds"] == [-2, -2, -2]
