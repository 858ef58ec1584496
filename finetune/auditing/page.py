"""The page of an audit: one HTML file of thumbnails, with a list of the paths of those ticked."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.auditing.findings import WORDING, Audit, Finding, Kind, Wording
from finetune.data.splits import Sample
from finetune.templates import image_uri, render
from models.images import ImageError
from models.preprocess import Preprocess

# Of each kind; the CSV has all. A page of them all would take a browser minutes.
_MAX_SHOWN = 60
_SIDE = 176
_THUMBNAIL = Preprocess(height=_SIDE, width=_SIDE, crop_fraction=1.0)
_QUALITY = 80
_SERIOUS = ("unreadable", "missing_class", "exact_leak", "near_leak")


@dataclass(frozen=True)
class _Section:
    """The findings of one kind."""

    kind: Kind
    wording: Wording
    findings: list[Finding]

    @property
    def is_serious(self) -> bool:
        return self.kind in _SERIOUS

    @property
    def name(self) -> str:
        return self.wording.one if len(self.findings) == 1 else self.wording.many


@dataclass(frozen=True)
class _Score:
    """The probe's score on a split with all images, and without leaks: None where none is left."""

    split: str
    whole: float
    clean: float | None
    has_leaks: bool


def write_page(audit: Audit, data: str) -> str:
    """The HTML of an audit of `--data`. It loads nothing from elsewhere."""
    leaking = {finding.split for finding in audit.leaks}
    return render(
        "auditing/page.html.j2",
        title=f"Audit of {data}",
        num_images=audit.num_images,
        num_findings=len(audit.findings),
        crop=audit.describe_crop() if audit.num_cropped else "",
        metric=audit.metric,
        scores=[
            _Score(split, whole, clean, split in leaking)
            for split, (whole, clean) in audit.scores.items()
        ],
        sections=[
            _Section(kind, WORDING[kind], audit.of_kind(kind))
            for kind, number in audit.count().items()
            if number
        ],
        max_shown=_MAX_SHOWN,
        thumbnail=_thumbnail,
        file_name=_file_name,
    )


def _thumbnail(sample: Sample) -> str | None:
    """A data URI; None where the image cannot be read."""
    try:
        return image_uri(_THUMBNAIL(sample.read()), "WEBP", _QUALITY)
    except (ImageError, OSError, ValueError):
        return None


def _file_name(key: str) -> str:
    return key.replace("\\", "/").rpartition("/")[2]
