"""Options that have no effect on a run: the one place that decides it, before any work.

A contradiction, such as `--ema 0.9` without gradient epochs, is refused by `finetune/config.py`.
What is here is harmless, but not what its user expects: it is a warning. So is a limit on pixels
that is not the service's.
"""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import fields

from finetune.auditing.inspection import holds_wide_images
from finetune.config import BackboneOptions, Options, SharedOptions, flag_of
from finetune.data.splits import Splits
from finetune.training.settings import TrainingSettings
from models.images import MAX_PIXELS, MAX_PIXELS_VARIABLE, read_max_pixels
from models.named import is_custom

logger = logging.getLogger("graft.options")

# Of what gradient epochs use, that which a run without them uses, too.
_USED_WITHOUT_EPOCHS = {
    "freeze",
    "balance",
    "augment",
    "views",
    "seed",
    "device",
    "precision",
    "workers",
    "cache",
    "repository",
}
# What only a run with gradient epochs uses: the epochs themselves, and the choice after them.
EPOCH_OPTIONS = frozenset(
    {field.name for field in fields(TrainingSettings)} & Options.model_fields.keys()
    | {"publish", "preflight"}
) - frozenset(_USED_WITHOUT_EPOCHS)
SPLIT_OPTIONS = frozenset({"val_fraction", "new_split"})
_TRAIN_MORE = "say --freeze until:NAME or none"


def find_unused(options: SharedOptions) -> dict[str, str]:
    """The options that have no effect beside the others, given or not: name → reason, way out."""
    unused: dict[str, str] = {}
    if not options.cache:
        unused |= dict.fromkeys(
            ("cache_dir", "cache_gb"), "--no-cache keeps nothing; leave one of them out"
        )
    if not options.data.startswith("torchvision:"):
        unused["data_root"] = "only --data torchvision:NAME keeps files there; leave it out"
    if isinstance(options, BackboneOptions) and (
        options.weights is not None or is_custom(options.backbone)
    ):
        whose = "--weights says" if options.weights is not None else "a module of yours decides"
        unused["pretrained"] = f"{whose} where the weights come from; leave it out"
    if isinstance(options, Options):
        unused |= _find_unused_in_training(options)
    return unused


def _find_unused_in_training(options: Options) -> dict[str, str]:
    unused: dict[str, str] = {}
    if options.freeze == "backbone":
        unused |= dict.fromkeys(
            EPOCH_OPTIONS, f"--freeze backbone has no gradient epochs; {_TRAIN_MORE}"
        )
        if options.views == 1:
            unused["augment"] = (
                f"--freeze backbone augments only --views 2 and more; say that, or {_TRAIN_MORE}"
            )
    if options.augment == "none":
        unused["views"] = "--augment none draws no views; say --augment light or flip"
    return unused


def warn_if_unused(options: SharedOptions) -> None:
    """Log a warning for every option that was given and has no effect."""
    for name in difflib.get_close_matches(MAX_PIXELS_VARIABLE, os.environ, cutoff=0.85):
        if name != MAX_PIXELS_VARIABLE:
            logger.warning("%s has no effect: did you mean %s?", name, MAX_PIXELS_VARIABLE)
    _warn(options, find_unused(options))


def warn_if_split_is_given(options: SharedOptions) -> None:
    """Log a warning for options that draw a split, for data that have splits of their own."""
    reason = f"{options.data} has a val split of its own; leave it out"
    _warn(options, dict.fromkeys(sorted(SPLIT_OPTIONS), reason))


def warn_if_split_is_kept(options: SharedOptions) -> None:
    """Log a warning for options that draw a split, for images that an earlier run has split."""
    reason = "images stay where an earlier run had them; --new-split draws anew"
    _warn(options, {"val_fraction": reason})


def warn_if_nothing_is_stretched(options: SharedOptions, splits: Splits) -> None:
    """Log a warning for `--stretch` where no image has more than 8 bits a channel."""
    if options.stretch and not holds_wide_images(splits):
        reason = f"no image of {options.data} has more than 8 bits a channel; leave it out"
        _warn(options, {"stretch": reason})


def warn_if_service_takes_less() -> None:
    """Log a warning where GRAFT_MAX_PIXELS lets this run take more than the service's default."""
    limit = read_max_pixels()
    if limit > MAX_PIXELS:
        logger.warning(
            "GRAFT_MAX_PIXELS=%d: this run takes images of over %.1f megapixels, which the service "
            "refuses unless it is started with this variable too",
            limit,
            MAX_PIXELS / 1e6,
        )


def _warn(options: SharedOptions, unused: dict[str, str]) -> None:
    for name in type(options).model_fields:
        if name in unused and _is_given(options, name):
            logger.warning("%s has no effect: %s", _as_typed(options, name), unused[name])


def _is_given(options: SharedOptions, name: str) -> bool:
    """Typed as a flag or, where a file has all options, other than the default."""
    if options.config is None:
        return name in options.model_fields_set
    return bool(getattr(options, name) != type(options).model_fields[name].default)


def _as_typed(options: SharedOptions, name: str) -> str:
    value = getattr(options, name)
    if isinstance(value, bool):
        return flag_of(name) if value else flag_of(f"no_{name}")
    return f"{flag_of(name)} {value:g}" if isinstance(value, float) else f"{flag_of(name)} {value}"
