"""Ablations: each choice is switched off by itself, and judged against the full set-up seed by seed.

DVC is a stand-in that writes what the chain writes.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from pipeline import ablation, config, experiment, nets, parameters, paths, tracking
from pipeline.errors import UserError
from pipeline.study import Result
from pipeline.training import weights
from pipeline.training.weights import ModelCard

ROOT = Path(__file__).parents[1]
NET = "scratch/lenet5"
OFF = ["train.mixup=0", "train.label_smoothing=0", "train.transforms={}"]
SETTINGS = {
    "data.name": "digits",
    "augment.px": 32,
    "model.name": NET,
    "model.in_chans": 1,
    "train.mixup": 0.2,
    "train.label_smoothing": 0.1,
}
LUCK = (0.0, 3.0, 7.0)
"""Percent that a seed adds to every set-up's error."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty tracking store, since it takes seconds to make one."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.ensure_store()
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with params.yaml and nothing trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(tracking.PARENT, raising=False)
    shutil.copy(database, tmp_path / "mlflow.db")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in ("data/pictures", "models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/no-weights").touch()
    config.write(overrides=SETTINGS)
    subprocess.run(["git", "init", "--quiet"], check=True)
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    return tmp_path


class Chain:
    """Stands in for DVC: notes what it is called with, and writes what train and evaluate write.

    Without mixup the error is 2 percent points higher, give or take 0.1; without label smoothing it is as it was, give
    or take 1; without transforms it is 0.5 lower with every seed.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, parameters.Config, str]] = []

    def __call__(self, arguments: list[str]) -> int:
        wanted = config.load()
        assert arguments[:3] == ["exp", "run", "evaluate"]
        label = arguments[arguments.index("--name") + 1]
        self.calls.append((label, wanted, os.environ[tracking.PARENT]))
        seed = wanted.train.seed
        error = 10 + LUCK[seed]
        error += 0 if wanted.train.mixup else 2 + (0.1, 0, -0.1)[seed]
        error += 0 if wanted.train.label_smoothing else (1, -1, 0.5)[seed]
        error -= 0 if wanted.train.transforms else 0.5
        trained = paths.trained(NET)
        if not trained.exists():
            weights.save_model(trained / "model.safetensors", nets.build(NET, num_classes=10, in_chans=1), CARD)
        paths.CURVES.write_text("epoch,train/top1\n1,0.5\n2,0.75\n")
        run = {"id": f"{len(self.calls):032x}", "train_minutes": 1.5}
        paths.METRICS.write_text(json.dumps({"test": {"top1_error": error / 100}, "run": run}))
        return 0


CARD = ModelCard(
    name=NET,
    in_chans=1,
    stem="default",
    classes=tuple("0123456789"),
    px=32,
    pack_px=32,
    mean=(0.5,),
    std=(0.5,),
    start="random",
    start_source="",
    fast_dev_run=False,
)


@pytest.fixture
def chain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:  # noqa: ARG001, comes before
    made = Chain()
    monkeypatch.setattr(experiment, "dvc", made)
    # The runs that the stand-in names are in no store.
    monkeypatch.setattr(tracking.Run, "include", lambda *_, **__: None)
    return made


def _results(errors: dict[str, list[float]]) -> list[Result]:
    facts: dict[str, Any] = {"parameters": 1, "train_error": 1.0, "minutes": 1.0, "run": "", "experiment": ""}
    return [
        Result(variant=variant, seed=seed, test_error=error, gradients={}, **facts)
        for variant, values in errors.items()
        for seed, error in enumerate(values)
    ]


def test_each_choice_is_switched_off_by_itself_with_each_seed(chain: Chain, folder: Path) -> None:
    before = (folder / "params.yaml").read_bytes()
    ablation.run(OFF, seeds=[0, 2], name="tiny")
    trained = [
        (wanted.train.seed, wanted.train.mixup, wanted.train.label_smoothing, bool(wanted.train.transforms))
        for _, wanted, _ in chain.calls
    ]
    # params.yaml's own set-up and seed at the end, for models/NET to hold afterwards
    assert trained == [
        (seed, *choices)
        for seed in (2, 0)
        for choices in ((0, 0.1, True), (0.2, 0, True), (0.2, 0.1, False), (0.2, 0.1, True))
    ]
    assert (folder / "params.yaml").read_bytes() == before
    assert not paths.METRICS.exists()
    for label, _, _ in chain.calls:  # a name that git takes for a reference, and so DVC for an experiment
        subprocess.run(["git", "check-ref-format", f"refs/exps/{label}"], check=True)
    assert [label for label, *_ in chain.calls[:2]] == [
        "tiny-without-train.mixup-2",
        "tiny-without-train.label_smoothing-2",
    ]


def test_differences_are_paired_by_seed_and_judged_for_their_number(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation.run(OFF, seeds=[0, 1, 2], name="tiny")
    assert len(chain.calls) == 12
    found = json.loads(Path("models/ablations/tiny/results.json").read_text())
    rows = {row["variant"]: row for row in found["variants"]}
    assert found["seeds"] == [1, 2, 0]
    assert rows["full"]["errors"] == [13.0, 17.0, 10.0]
    assert rows["full"]["effect"] is None
    expected = stats.ttest_1samp(rows["full"]["errors"], 0).confidence_interval(0.95)
    assert (rows["full"]["low"], rows["full"]["high"]) == pytest.approx((expected.low, expected.high))
    mixup = rows["without train.mixup"]
    test = stats.ttest_rel(mixup["errors"], rows["full"]["errors"])
    difference = mixup["effect"]["difference"]
    assert difference["mean"] == pytest.approx(2)
    assert (difference["low"], difference["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-6)
    assert mixup["effect"]["p"] == pytest.approx(2 * test.pvalue, rel=1e-6)  # the second smallest of three
    verdicts = [row["effect"]["verdict"] for row in found["variants"][1:]]
    assert verdicts == ["higher", "can't tell", "lower"]
    printed = capsys.readouterr().out
    assert "| without train.mixup | 15.33 | 6.86 to 23.81 | +2.00 | +1.75 to +2.25 | 0.002 | higher |" in printed
    assert "Comparisons made: 3." in printed
    assert "without train.transforms: every seed shows the same difference" in printed
    assert printed.split("\n\n")[0].splitlines()[-1] in Path("models/ablations/tiny/table.md").read_text()
    assert Path("models/ablations/tiny/plot.png").stat().st_size > 1000


def test_what_one_comparison_would_tell_ten_may_not() -> None:
    base = config.load(ROOT / "params.yaml", overrides=SETTINGS)
    full = [10.0, 13.0, 17.0]
    weak = [11.0, 14.3, 17.9]  # p is 0.01 alone
    unlike = [[10.0 + shift, 13.0 - shift, 17.0] for shift in range(1, 10)]

    def verdict(others: int) -> str:
        study = ablation.plan(base, ["train.mixup=0"], seeds=[0, 1, 2])
        names = ["without train.mixup", *(f"without {number}" for number in range(others))]
        variants = dict.fromkeys(("full", *names), study.variants["full"])
        study = study.model_copy(update={"variants": variants, "pairs": [(name, "full") for name in names]})
        errors = dict(zip(("full", *names), (full, weak, *unlike), strict=False))
        effect = ablation.judge(study, _results(errors))[1].effect
        assert effect is not None
        assert 0.005 < effect.difference.p < 0.05
        return effect.verdict

    assert verdict(others=0) == "higher"
    assert verdict(others=9) == "can't tell"


def test_table_plot_and_figures_are_on_the_parent_run_that_another_start_takes_up(chain: Chain) -> None:
    for _ in range(2):
        ablation.run(OFF, seeds=[0, 1, 2])
    (parent,) = tracking.runs("thaw")
    assert {called for *_, called in chain.calls} == {parent.id}
    assert (parent.name, parent.status) == ("ablation-scratch-lenet5", "FINISHED")
    assert parent.tags[tracking.SERVES] == "ablation"
    assert parent.params["seeds"] == "[1, 2, 0]"
    assert parent.metrics["without train.mixup/difference"] == pytest.approx(2)
    assert parent.metrics["full/test_error"] == pytest.approx(40 / 3, abs=1e-4)
    kept = {path.name for path in Path("mlartifacts").rglob("*") if path.is_file()}
    assert kept == {"table.md", "results.json", "plot.png"}


def test_other_parameters_make_another_parent(chain: Chain) -> None:
    ablation.run(OFF[:1], seeds=[0, 1], name="tiny")
    config.write(overrides={"train.workers": 1})
    ablation.run(OFF[:1], seeds=[0, 1], name="tiny")
    assert len({called for *_, called in chain.calls}) == 1
    config.write(overrides={"train.mixup": 0.4})
    ablation.run(OFF[:1], seeds=[0, 1], name="tiny")
    assert len({called for *_, called in chain.calls}) == 2


@pytest.mark.parametrize(
    ("off", "seeds", "message"),
    [
        (["train.mixup=0.2"], [0, 1], r"^train\.mixup is 0\.2 already: nothing to switch off$"),
        (["train.mixup=0", "train.cutmix=0.0"], [0, 1], r"^train\.cutmix is 0\.0 already"),
        (["train.mixupp=0"], [0, 1], r"^train\.mixupp: no such parameter; did you mean mixup\?$"),
        (["train.mixup=-1"], [0, 1], r"^train\.mixup: input should be greater than or equal to 0"),
        (["train.mixup"], [0, 1], r"^train\.mixup: expected section\.key=value"),
        (["train.mixup=0", "train.mixup=0.1"], [0, 1], r"^--off: train\.mixup: named 2 times"),
        (["train.seed=1"], [0, 1], r"^train\.seed: is no choice to switch off: all variants have the same seeds"),
        (["train.workers=4"], [0, 1], r"^train\.workers: is no choice to switch off"),
        (["data.name=mnist"], [0, 1], r"^data\.name: is no choice to switch off"),
        ([], [0, 1], r"^--off: name what to switch off"),
        (["train.mixup=0"], [0], r"^--seeds: name at least 2"),
        (["train.mixup=0"], [0, 0], r"^--seeds: 0: named 2 times"),
        (["train.mixup=0"], [0, -1], r"^params\.yaml: without train\.mixup: train\.seed: input should be greater"),
        (["model.name=scratch/lenet"], [0, 1], r"^params\.yaml: without model\.name: scratch/lenet: no such net; did"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    chain: Chain, off: list[str], seeds: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ablation.run(off, seeds=seeds)
    assert not chain.calls
    assert tracking.runs() == []


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize("name", ["../up", "a/b", "a..b", "a b", ".a"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^--name .*: use letters"):
        ablation.run(OFF, seeds=[0, 1], name=name)


def test_a_seed_that_is_not_the_files_leaves_another_model_and_says_so(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation.run(OFF[:1], seeds=[1, 2], name="tiny")
    last = chain.calls[-1][1].train
    assert (last.seed, last.mixup) == (2, 0.2)
    assert "models/scratch/lenet5/train is of seed 2 now; `dvc repro` brings back" in capsys.readouterr().out


def test_a_trial_says_that_it_means_nothing(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    config.write(overrides={"train.fast_dev_run": True})
    ablation.run(OFF[:1], seeds=[0, 1], name="tiny")
    assert len(chain.calls) == 4
    assert "A TRIAL of one batch of everything: the figures mean nothing." in capsys.readouterr().out
