"""Default splits name real units and leave no group empty."""

import pytest
import torch

from lct_fast import models


@pytest.mark.parametrize("name", models.names())
def test_splits_name_units_in_order(name: str) -> None:
    with torch.device("meta"):
        net = models.build(name, 10)
    order = [unit for unit, _ in net.named_modules()]
    for groups in range(2, 9):
        splits = models.default_splits(name, groups)
        if splits is not None:
            assert len(splits) == groups - 1
            positions = [order.index(unit) for unit in splits]
            # order[0] is the network itself, order[1] its first unit: no empty first group.
            assert positions == sorted(set(positions))
            assert positions[0] > 1


def test_splits_of_the_papers() -> None:
    assert models.default_splits("lct_vgg", 4) == ["conv3", "conv6", "conv9"]
    assert models.default_splits("preact_resnet101", 4) == ["layer3", "layer3.8", "layer3.16"]
    assert models.default_splits("preact_resnet50", 4) == ["layer2", "layer3", "layer4"]
    assert models.default_splits("dgl_cnn", 6) == ["conv2", "conv3", "conv4", "conv5", "conv6"]


def test_splits_where_no_paper_says() -> None:
    assert models.default_splits("wide_resnet", 4) is None
    assert models.default_splits("lct_vgg", 3) is None
    assert models.default_splits("mlp", 1) == []


def test_splits_take_a_whole_spec_and_hand_out_copies() -> None:
    splits = models.default_splits("lct_vgg:width=0.25", 2)
    assert splits == ["conv6"]
    splits.append("head")
    assert models.default_splits("lct_vgg", 2) == ["conv6"]


def test_splits_of_an_unknown_model() -> None:
    with pytest.raises(ValueError, match="unknown model 'vgg': choose one of dgl_cnn"):
        models.default_splits("vgg", 2)
