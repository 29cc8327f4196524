"Chapter 03: the implicit expression encoder and its agreement with the release."
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_tokens import SHARED, by_rule, needs_shared, raw

from fantasy_nb.expression import FEATURE_WIDTHS, ExpressionConfig, ExpressionEncoder, Features

WEIGHTS = Path(__file__).parents[1] / "data_samples/weights/tiny/encoder"


def released_keys():
    return json.loads((SHARED / "reference/official_keys.json").read_text())["fan_encoder"]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return ExpressionEncoder(ExpressionConfig.tiny()).eval()


@needs_shared
def test_release_names_and_shapes():
    with torch.device("meta"):
        state = ExpressionEncoder(ExpressionConfig.pd_fgc()).release_state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == released_keys()


@needs_shared
def test_release_golden():
    golden = load_file(SHARED / "reference/golden.safetensors")["encoder.features"]
    encoder = ExpressionEncoder(ExpressionConfig.pd_fgc()).eval()
    counts = {k: v for k, v in encoder.release_state_dict().items() if not v.is_floating_point()}
    encoder.load_release_state_dict({name: by_rule(name, shape) for name, shape in released_keys().items() if name not in counts} | counts)
    with torch.no_grad():
        features = encoder(raw("crops", (2, 3, 224, 224)).clamp(-1, 1)).pack()
    for ours, theirs in zip(features.split(list(FEATURE_WIDTHS.values()), -1), golden.split(list(FEATURE_WIDTHS.values()), -1)):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_release_names_are_one_to_one(tiny):
    state = tiny.release_state_dict()
    assert len(state) == len(tiny.state_dict())
    other = ExpressionEncoder(ExpressionConfig.tiny()).eval()
    other.load_release_state_dict(state)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(tiny(x).pack(), other(x).pack())
    with pytest.raises(RuntimeError, match="surplus"):
        other.load_release_state_dict(state | {"surplus": torch.zeros(1)})


def test_features_pack_and_unpack():
    x = torch.randn(2, 5, 554)
    features = Features.unpack(x)
    assert [getattr(features, n).shape[-1] for n in ("head", "eyes", "emotion", "mouth")] == [6, 6, 30, 512]
    assert torch.equal(features.pack(), x) and torch.equal(features.head, x[..., :6]) and torch.equal(features.mouth, x[..., 42:])
    with pytest.raises(ValueError, match="want 554 features.*got 10"):
        Features.unpack(torch.zeros(1, 10))


@torch.no_grad()
def test_shapes_sizes_and_batches(tiny):
    clips = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    many = tiny(clips)
    assert many.head.shape == (2, 3, 6) and many.mouth.shape == (2, 3, 512) and many.pack().shape == (2, 3, 554)
    assert torch.allclose(many.pack()[1, 2], tiny(clips[1, 2:]).pack()[0], atol=1e-5)
    big = torch.nn.functional.interpolate(clips[0], size=224, mode="bilinear")
    assert tiny(big).pack().shape == (3, 554)


def test_errors_say_what_was_wanted(tiny):
    for bad in (torch.zeros(2, 1, 64, 64), torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"want float crops"):
            tiny(bad)
    with pytest.raises(FileNotFoundError, match="config.json"):
        ExpressionEncoder.from_pretrained("/nowhere")


@torch.no_grad()
def test_save_and_load(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "encoder")
    again = ExpressionEncoder.from_pretrained(tmp_path / "encoder")
    assert again.config == tiny.config and not again.training
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    a, b = tiny(x).pack(), again(x).pack()
    assert a.dtype == b.dtype == torch.float32 and (a - b).norm() / a.norm() < 1e-2
