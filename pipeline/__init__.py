"""Thaw: labelled pictures and a backbone's name in, a fine-tuned classifier to trust out.

A guided tour, in reading order:

    stages/     download, weights, augment, train, evaluate: what `dvc repro` runs, each an outline
    config.py   every knob of params.yaml, typed and checked
    data/       the catalogue of datasets, the split, the packed store, the transforms, the batches
    nets/       networks written from scratch; `build(name)` is the one door to them and to timm's
    training/   the phases of freezing and thawing, the LightningModule, the weights
    analysis/   figures, plots, the report, the comparison of runs, the summary of a net
    study.py    groups of experiments over several seeds
    tracking.py MLflow
"""
