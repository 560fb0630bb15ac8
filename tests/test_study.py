"""Groups of experiments: what is asked for is what each run trains with, and what is written is what came out.

DVC is a stand-in that writes what the chain writes; tests/test_chain.py has the real one.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import config, experiment, nets, parameters, paths, study, tracking
from pipeline.analysis import study_report
from pipeline.errors import UserError
from pipeline.training import weights
from pipeline.training.weights import ModelCard

ROOT = Path(__file__).parents[1]
FILE = """
title: Two nets
source: nobody, 2026
question: Which is better?
measure: test_error
seeds: [0, 1, 2]
settings: {data.name: digits, model.in_chans: 1}
sizes:
  small: {train.phases: {only: {epochs: 2, trainable: all, lr: 0.01, scheduler: constant}}}
  full: {train.batch_size: 128}
variants:
  lenet: {settings: {model.name: scratch/lenet5}}
  resnet: {settings: {model.name: scratch/resnet20}}
pairs: [[resnet, lenet]]
"""
ERRORS = {"scratch/lenet5": 0.3, "scratch/resnet20": 0.1}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with params.yaml, a study, a document for it and nothing trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(tracking.PARENT, raising=False)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in ("data/pictures", "models", "experiments/tiny", "docs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/no-weights").touch()
    (tmp_path / "experiments/tiny/study.yaml").write_text(FILE)
    (tmp_path / "docs/experiments.md").write_text("Before.\n<!-- tiny: begin -->\nold\n<!-- tiny: end -->\nAfter.\n")
    subprocess.run(["git", "init", "--quiet"], check=True)
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    return tmp_path


class Chain:
    """Stands in for DVC: notes what it is called with, and writes what train and evaluate write.

    As DVC's cache does, it trains nothing twice: a repetition has the first one's run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[list[str], parameters.Config, str]] = []
        self.cache: dict[tuple[str, int], str] = {}

    def __call__(self, arguments: list[str]) -> int:
        wanted = config.load()
        self.calls.append((arguments, wanted, os.environ[tracking.PARENT]))
        name, seed = wanted.model.name, wanted.train.seed
        net = nets.build(name, num_classes=10, in_chans=1)
        card = ModelCard(
            name=name,
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
        weights.save_model(paths.trained(name) / "model.safetensors", net, card)
        Path("dvc.lock").write_text("changed")
        paths.CURVES.write_text(f"epoch,train/top1\n1,0.5\n2,{0.9 - seed / 100}\n")
        if (name, seed) not in self.cache:
            spool = self.folder / "spool"
            trained = tracking.Run.start(experiment="thaw", name=f"{name}-{seed}", tags={}, spool=spool)
            trained.finish("FINISHED")
            self.cache[name, seed] = trained.id
        test = {"top1_error": ERRORS[name] + seed / 100}
        run = {"id": self.cache[name, seed], "train_minutes": 1.5}
        paths.METRICS.write_text(json.dumps({"test": test, "run": run}))
        return 0


@pytest.fixture
def chain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    made = Chain(folder)
    monkeypatch.setattr(experiment, "dvc", made)
    return made


def test_each_variant_is_trained_with_each_seed_and_nothing_is_left_changed(chain: Chain) -> None:
    before = (chain.folder / "params.yaml").read_bytes()
    study.run("tiny", size="small")
    assert [(w.model.name, w.train.seed) for _, w, _ in chain.calls] == [
        (name, seed) for seed in range(3) for name in ("scratch/lenet5", "scratch/resnet20")
    ]
    for arguments, wanted, _ in chain.calls:
        assert arguments[:3] == ["exp", "run", "evaluate"]
        assert list(wanted.train.phases) == ["only"]  # the file's phases are replaced, not added to
        assert wanted.data.name == "digits"
    assert len({arguments[-1] for arguments, _, _ in chain.calls}) == 6
    assert (chain.folder / "params.yaml").read_bytes() == before
    assert not (chain.folder / "dvc.lock").exists()
    assert not paths.METRICS.exists()


def test_results_are_written_with_their_verdict_and_the_rest_of_the_page_stays(chain: Chain) -> None:
    study.run("tiny", size="small")
    page = (chain.folder / "docs/experiments.md").read_text()
    assert page.startswith("Before.\n<!-- tiny: begin -->\nWhich is better?")
    assert page.endswith("<!-- tiny: end -->\nAfter.\n")
    assert "old" not in page
    assert "| lenet | 61,706 | 11.00 ± 1.00 | 31.00 ± 1.00 |" in page
    assert "| resnet | 269,434 | 11.00 ± 1.00 | 11.00 ± 1.00 |" in page
    assert "**resnet** better than **lenet**: test error -20.00 points (95 % interval -22.27 to -17.73)" in page
    assert "| `train.batch_size` | as in params.yaml | `128` |" in page
    assert (chain.folder / "docs/images/experiments/tiny.png").stat().st_size > 1000
    published = study.published("tiny")
    assert [(r.variant, r.seed, r.test_error) for r in published][:2] == [("lenet", 0, 30.0), ("resnet", 0, 10.0)]


def test_all_runs_are_children_of_one_parent_that_another_start_takes_up(chain: Chain) -> None:
    study.run("tiny", size="small")
    study.run("tiny", size="small")
    rows = tracking.runs("thaw")
    (parent,) = (row for row in rows if "study" in row.tags)
    assert {called for _, _, called in chain.calls} == {parent.id}
    assert {row.id for row in rows if row.tags.get("mlflow.parentRunId") == parent.id} == set(chain.cache.values())
    assert len(rows) == 1 + 6
    assert parent.status == "FINISHED"
    assert parent.tags["study"] == "tiny"
    assert parent.metrics["resnet/test_error"] == pytest.approx(11.0)
    assert parent.params["data.name"] == "digits"


def test_a_parent_is_taken_up_as_long_as_the_runs_follow_from_the_same_parameters(chain: Chain) -> None:
    study.run("tiny", size="small")
    config.write(overrides={"model.name": "densenet121", "train.workers": 1})  # what each variant sets, and no result's
    study.run("tiny", size="small", variants=["lenet"])
    assert len({called for _, _, called in chain.calls}) == 1
    config.write(overrides={"train.weight_decay": 0.5})
    study.run("tiny", size="small", variants=["lenet"])
    assert len({called for _, _, called in chain.calls}) == 2


def test_runs_that_another_study_made_stand_under_the_second_s_parent_too(chain: Chain) -> None:
    study.run("tiny", size="small")
    other = chain.folder / "experiments/other"
    other.mkdir()
    (other / "study.yaml").write_text(FILE)
    page = chain.folder / "docs/experiments.md"
    page.write_text(f"{page.read_text()}<!-- other: begin -->\n<!-- other: end -->\n")
    for _ in range(2):
        study.run("other", size="small")
    rows = tracking.runs("thaw")
    (parent,) = (row for row in rows if row.tags.get("study") == "other")
    copies = [row for row in rows if row.tags.get("mlflow.parentRunId") == parent.id]
    assert sorted(row.tags["copy_of"] for row in copies) == sorted(chain.cache.values())
    assert {row.status for row in copies} == {"FINISHED"}
    (resnet_0,) = (row for row in copies if row.name == "other-small-resnet-0")
    assert resnet_0.metrics["test/top1"] == pytest.approx(0.9)


def test_a_training_that_fails_ends_the_study_as_failed(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "dvc", lambda _: 255)
    with pytest.raises(SystemExit) as stopped:
        study.run("tiny", size="small")
    assert stopped.value.code == 1
    assert [row.status for row in tracking.runs("thaw")] == ["FAILED"]
    assert (chain.folder / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_a_child_carries_its_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tracking.Run.start(experiment="thaw", name="parent", tags={}, spool=folder / "a")
    monkeypatch.setenv(tracking.PARENT, parent.id)
    tracking.Run.start(experiment="thaw", name="child", tags={"a": "b"}, spool=folder / "b")
    child, _ = tracking.runs("thaw")
    assert child.tags["mlflow.parentRunId"] == parent.id
    assert child.tags["a"] == "b"


def test_some_variants_alone_write_no_results(chain: Chain) -> None:
    study.run("tiny", size="small", variants=["resnet"])
    assert len(chain.calls) == 3
    assert not list((chain.folder / "experiments/tiny").glob("results*"))
    assert "old" in (chain.folder / "docs/experiments.md").read_text()


def test_the_full_size_leaves_the_page_alone(chain: Chain) -> None:
    study.run("tiny", size="full")
    assert all(wanted.train.batch_size == 128 for _, wanted, _ in chain.calls)
    assert "old" in (chain.folder / "docs/experiments.md").read_text()
    assert (chain.folder / "experiments/tiny/plot-full.png").exists()
    assert "61,706" in (chain.folder / "experiments/tiny/table-full.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title:", "titel:", r"^experiments/tiny/study\.yaml: title: Field required"),
        ("[0, 1, 2]", "[0, 1]", r"study\.yaml: seeds: name at least 3"),
        (
            "  small: {",
            "  little: {",
            r"^experiments/tiny/study\.yaml: sizes\.little\.\[key\]: Input should be 'small'",
        ),
        ("  full: {train.batch_size: 128}", "", r"study\.yaml: sizes: must be small and full"),
        ("[[resnet, lenet]]", "[[resnet, lenett]]", r"pairs: lenett: no such variant; did you mean lenet"),
        ("scratch/lenet5", "scratch/lenet", r"study\.yaml: lenet: scratch/lenet: no such net; did you mean"),
        ("train.batch_size", "train.batchsize", r"study\.yaml: lenet: train\.batchsize: no such parameter"),
        (
            "data.name: digits",
            "data.name: digits, augment.px: 16",
            r"study\.yaml: lenet: scratch/lenet5 takes .* 32 px",
        ),
        ("title: Two nets", "title: {", r"study\.yaml:\d+: not valid YAML"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(chain: Chain, old: str, new: str, message: str) -> None:
    (chain.folder / "experiments/tiny/study.yaml").write_text(FILE.replace(old, new))
    with pytest.raises(UserError, match=message):
        study.run("tiny", size="full")
    assert not chain.calls


@pytest.mark.usefixtures("chain")
def test_an_unknown_study_or_variant_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^tinny: no such study; did you mean tiny\?"):
        study.run("tinny", size="small")
    with pytest.raises(UserError, match=r"^lenet5: no such variant; did you mean lenet"):
        study.run("tiny", size="small", variants=["lenet5"])
    with pytest.raises(UserError, match=r"results-small\.json: no results yet; run it: make study NAME=tiny"):
        study.published("tiny")


def test_a_page_without_a_place_for_the_study_says_what_to_add(chain: Chain) -> None:
    (chain.folder / "docs/experiments.md").write_text("nothing\n")
    with pytest.raises(UserError, match="has no lines <!-- tiny: begin --> and <!-- tiny: end -->; add them"):
        study.run("tiny", size="small")
    assert (chain.folder / "experiments/tiny/results-small.json").exists()  # hours of training are not lost for it


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("name", study.names())
def test_shipped_studies_set_parameters_that_there_are(name: str, size: study.Size) -> None:
    shipped = study.read(name)
    for variant in shipped.variants:
        wanted = config.load(overrides=shipped.overrides(variant, seed=0, size=size))
        if nets.is_scratch(wanted.model.name):
            with torch.device("meta"):
                net: Any = nets.build(wanted.model.name, num_classes=10, in_chans=wanted.model.in_chans)
            assert nets.min_px(net) <= wanted.px


@pytest.mark.parametrize("name", study.names())
def test_the_page_s_section_is_of_the_results_that_are_shipped(name: str) -> None:
    shipped, results = study.read(name), study.published(name)
    assert {(r.variant, r.seed) for r in results} == {(v, s) for v in shipped.variants for s in shipped.seeds}
    page = (ROOT / "docs/experiments.md").read_text()
    drawn = [study_report.PICTURES / f"{name}.png"]
    if results[0].gradients:
        drawn.append(study_report.PICTURES / f"{name}-gradients.png")
    assert all((ROOT / path).exists() for path in drawn)
    assert study_report.section(name, shipped, results, drawn) in page
