"""params.yaml is read whole, and every mistake is answered in one line that says where and what is right."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config, parameters
from pipeline.errors import UserError

PARAMS = Path(__file__).parents[1] / "params.yaml"


def _edited(tmp_path: Path, old: str, new: str) -> Path:
    text = PARAMS.read_text()
    assert text.count(old) >= 1, old
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_shipped_file_has_every_parameter() -> None:
    loaded = config.load(PARAMS)
    for name, section in parameters.Config.model_fields.items():
        assert section.annotation is not None
        assert getattr(loaded, name).model_fields_set == set(section.annotation.model_fields), name


def test_every_parameter_is_documented() -> None:
    for model in (*[f.annotation for f in parameters.Config.model_fields.values()], parameters.PhaseParams):
        assert model is not None
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  batch_size: 64", "  batchsize: 64", "train.batchsize: no such parameter; did you mean batch_size?"),
        ("  name: tf_", "  nmae: tf_", "model.nmae: no such parameter; did you mean name?"),
        ("train:\n", "trian:\n", "trian: no such parameter; did you mean train"),
        ("horizontal_flip:", "horizontal_flp:", "no such transform; did you mean horizontal_flip?"),
        ("{p: 0.5}", "{pp: 0.5}", "train.transforms.horizontal_flip.pp: no such argument; did you mean p?"),
        ("{p: 0.5}", "{p: 1.5}", "less than or equal to 1, got 1.5"),
        ("trainable: head ", "trainable: heads ", "'heads' is not head, last:N, from:MODULE, params:NAME or all; did"),
        ("precision: 32-true", "precision: bf16-mixd", "did you mean bf16-mixed"),
        ("px: auto", "px: 128", "train.px: 128 is larger than augment.px, 64"),
        ("copies: 0", "copies: 2", "augment.copies: copies need an entry in augment.transforms"),
        ("pretrained: auto", "pretrained: atuo", "'atuo' is not 'auto'; did you mean auto?"),
        ("epochs: 1 ", "epochs: 0 ", "train.phases.frozen.epochs: input should be greater than or equal to 1, got 0"),
        ("  lr: 3.0e-3 ", "  lr: .nan ", "train.lr: input should be"),
        ("      epochs: 1 ", "      lr: -1.0 ", "train.phases.frozen.lr: input should be greater than 0, got -1.0"),
        ("  scheduler: onecycle ", "  scheduler: onecyle ", "did you mean onecycle?"),
        (
            "      epochs: 1 ",
            "      lr: fnd ",
            "train.phases.frozen.lr: 'fnd' is not 'auto' or 'find'; did you mean find?",
        ),
        (
            "    finetune:",
            "    Finetune:",
            "Finetune: 'Finetune' cannot be a phase's name: small letters, digits and _",
        ),
        ("      epochs: 1 ", "      px: 128 ", "train.phases.frozen.px: 128 is larger than augment.px, 64; raise that"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_right_name(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = _edited(tmp_path, old, new)
    with pytest.raises(UserError) as caught:
        config.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert expected in message
    text = path.read_text().splitlines()
    line = int(message.removeprefix(f"{path}:").split(":")[0])
    key = new.split(":")[0].strip(" {") if ":" in new else new
    # the line shown is the line of the mistake
    assert key in text[line - 1] or new.strip() in text[line - 1]


def test_a_float_in_exponent_notation_is_a_float(tmp_path: Path) -> None:
    assert config.load(_edited(tmp_path, "lr: 3.0e-3", "lr: 1e-3")).train.lr == 1e-3


def test_phases_may_be_the_name_of_a_schedule() -> None:
    assert config.load(PARAMS, overrides={"train.phases": "bitfit"}).train.phases == "bitfit"
    with pytest.raises(UserError, match=r"train.phases: 'gradual' is not 'linear_probe', .* or 'bitfit'"):
        config.load(PARAMS, overrides={"train.phases": "gradual"})
    with pytest.raises(UserError, match=r"phases is a single value; `python -m pipeline schedule --yaml` writes"):
        config.load(PARAMS, overrides={"train.phases": "bitfit", "train.phases.frozen.epochs": 2})


def test_a_phase_has_steps_or_epochs() -> None:
    with pytest.raises(
        UserError, match=r"^train\.phases\.frozen\.steps: 5 steps and 1 epochs cannot both be; leave one"
    ):
        config.load(PARAMS, overrides={"train.phases.frozen.steps": 5})
    config.load(PARAMS, overrides={"train.phases.finetune.steps": 5})


def test_what_stands_under_a_phases_wrong_name_is_not_spoken_of() -> None:
    with pytest.raises(UserError, match=r"^train\.phases\.Finetune: 'Finetune' cannot be a phase's name: .*first$"):
        config.load(PARAMS, overrides={"train.phases.Finetune.lr": 1})


def test_no_default_is_null() -> None:
    assert None not in config.flat(config.load(PARAMS)).values()


def test_broken_yaml_and_a_missing_file_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        config.load(_edited(tmp_path, "px: 64 ", "px: [64 "))
    with pytest.raises(UserError, match="no such file"):
        config.load(tmp_path / "nowhere.yaml")


def test_overrides_are_checked_like_the_file() -> None:
    loaded = config.load(PARAMS, overrides=config.parse_settings(["train.batch_size=32", "train.transforms={}"]))
    assert (loaded.train.batch_size, loaded.train.transforms) == (32, {})
    with pytest.raises(UserError, match=r"^train.batchsize: no such parameter; did you mean batch_size\?$"):
        config.load(PARAMS, overrides={"train.batchsize": 32})
    with pytest.raises(UserError, match=r"^trian: no such parameter; did you mean train"):
        config.load(PARAMS, overrides={"trian.batch_size": 32})
    with pytest.raises(UserError, match=r"expected section\.key=value"):
        config.parse_settings(["train.batch_size"])
    with pytest.raises(UserError, match=r"^train\.batch_size=\[1: not valid YAML"):
        config.parse_settings(["train.batch_size=[1"])


def test_reading_the_configuration_is_light() -> None:
    code = (
        "import sys; from pipeline import config; config.load(); "
        "print([m for m in ('torch', 'mlflow', 'timm', 'albumentations', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PARAMS.parent, check=True)
    assert done.stdout.strip() == "[]"
