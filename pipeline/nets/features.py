"""A net as an encoder: its maps at every resolution in place of logits, as detection and segmentation want them."""

from typing import Any

from timm.models._features import FeatureHooks, FeatureInfo
from torch import Tensor, nn


class FeatureMaps(nn.Module):
    """Pictures [B, C, H, W] to a list of maps [B, channels, h, w], one a level of resolution, the finest first.

    A map is the last of its size, as the next layer sees it; the last map is what forward_features gives. For nets of
    this folder it is what timm's `features_only` is for timm's. The net stays whole, as `net`: weights are loaded into
    that, and what comes after its features does not run.

    Args:
        net: One of this folder's; its `feature_info` says where the maps are.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        levels: Any = net.feature_info
        self.net = net
        self.pretrained_cfg = net.pretrained_cfg
        self.feature_info = FeatureInfo(levels, tuple(range(len(levels))))
        """timm's: `channels()` and `reduction()` give a list, an entry a map."""
        self._hooks = FeatureHooks(levels[:-1], net.named_modules())

    def forward(self, x: Tensor) -> list[Tensor]:
        net: Any = self.net
        last: Tensor = net.forward_features(x)
        return [*self._hooks.get_output(last.device).values(), last]
