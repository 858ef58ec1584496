"""What an audit found: findings by kind, in order of weight, and the score without leaks."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data.splits import Sample
from models.errors import GraftError
from models.sources import SplitName

Kind = Literal[
    "unreadable",
    "missing_class",
    "small_class",
    "wrong_extension",
    "narrow_range",
    "exact_leak",
    "near_leak",
    "exact_duplicate",
    "near_duplicate",
    "wrong_label",
    "outlier",
]


@dataclass(frozen=True)
class Wording:
    """A kind of finding for people: one and many of it in a sentence, a heading, and what to do."""

    one: str
    many: str
    heading: str
    advice: str


WORDING: dict[Kind, Wording] = {
    "unreadable": Wording(
        "unreadable image",
        "unreadable images",
        "Unreadable files",
        "They cannot be decoded, or only a part of them, and runs leave them out. Replace them, or "
        "delete them.",
    ),
    "missing_class": Wording(
        "class missing from a split",
        "classes missing from a split",
        "Classes missing from a split",
        "A class missing from a split cannot be trained or evaluated there. Add images, or let "
        "Graft draw the split.",
    ),
    "small_class": Wording(
        "small class",
        "small classes",
        "Classes with few images",
        "A class is learnt from a few dozen images. Add some, or merge classes.",
    ),
    "wrong_extension": Wording(
        "wrong extension",
        "wrong extensions",
        "Wrong extensions",
        "Graft goes by content and reads them all the same; other programs may not. Rename them.",
    ),
    "narrow_range": Wording(
        "image nearly black (--stretch)",
        "images nearly black (--stretch)",
        "Little of a 16-bit range used",
        "Data of 12 bits in files of 16 is nearly black. Say --stretch, with which training and "
        "service spread the values that an image uses over the whole range.",
    ),
    "exact_leak": Wording(
        "exact copy across splits",
        "exact copies across splits",
        "Exact copies across splits",
        "The same file in two splits: the score counts what was learnt by heart. Keep one of the "
        "two.",
    ),
    "near_leak": Wording(
        "near copy across splits",
        "near copies across splits",
        "Near copies across splits",
        "The same picture in two splits, encoded or resized: the score counts what was learnt by "
        "heart. Keep one of the two.",
    ),
    "exact_duplicate": Wording(
        "exact duplicate",
        "exact duplicates",
        "Exact duplicates within a split",
        "The same file twice weighs twice. Keep one; where the labels differ, one of them is "
        "wrong.",
    ),
    "near_duplicate": Wording(
        "near duplicate",
        "near duplicates",
        "Near duplicates within a split",
        "The same picture, encoded or resized. Keep the better one; where the labels differ, one "
        "of them is wrong.",
    ),
    "wrong_label": Wording(
        "label to check",
        "labels to check",
        "Labels that look wrong",
        "A model that did not see the image is confident of another class. The likeliest come "
        "first; move the file where you agree.",
    ),
    "outlier": Wording(
        "outlier",
        "outliers",
        "Outliers",
        "Unlike all other images of the data: screenshots, placeholders, pictures of something "
        "else. Delete what does not belong.",
    ),
}
LEAKS: tuple[Kind, ...] = ("exact_leak", "near_leak")


@dataclass(frozen=True)
class Finding:
    """One thing to look at. `sample` is None where it is about a class.

    `other` is what the sample is a copy of, with its split and label. `score` orders the findings
    of a kind: similarity of copies, how likely a label is wrong, distance of outliers.
    """

    kind: Kind
    split: SplitName
    label: str
    detail: str
    score: float | None = None
    sample: Sample | None = None
    other: tuple[SplitName, str, Sample] | None = None
    suggested: str | None = None


@dataclass(frozen=True)
class Audit:
    """Findings by kind and score, and the effect of the leaks on the score.

    `scores` are the probe's on each split that it did not train on: on all images, and without
    leaks (None if there is nothing else). `metric` is what they measure, in words. Of `num_cropped`
    images the crop cuts off a fifth of a side or more.
    """

    findings: tuple[Finding, ...]
    scores: Mapping[SplitName, tuple[float, float | None]]
    num_images: int
    metric: str = "accuracy"
    num_cropped: int = 0

    def of_kind(self, *kinds: Kind) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind in kinds]

    @property
    def leaks(self) -> list[Finding]:
        return self.of_kind(*LEAKS)

    def count(self) -> dict[Kind, int]:
        """How many of each kind, in order of weight."""
        return {kind: len(self.of_kind(kind)) for kind in WORDING}

    def refuse_leaks(self) -> None:
        """Raise GraftError if an image is in two splits."""
        leaks = self.leaks
        if leaks:
            shown = "\n".join(
                f"  {finding.sample.key}: {finding.detail}"
                for finding in leaks[:10]
                if finding.sample is not None
            )
            more = f"\n  and {len(leaks) - 10} more" if len(leaks) > 10 else ""
            raise GraftError(
                f"{_count(len(leaks), 'image leaks', 'images leak')} from one split to another:\n"
                f"{shown}{more}\n(--strict stops here; keep one of each two)"
            )

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json holds it."""
        scores = {
            split: {"all": whole, "without_leaks": clean}
            for split, (whole, clean) in self.scores.items()
        }
        return {
            "num_images": self.num_images,
            "num_cropped": self.num_cropped,
            "found": self.count(),
            self.metric.replace(" ", "_"): scores,
        }

    def to_csv(self) -> str:
        """`kind,split,path,label,detail,score`, a row for each finding."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("kind", "split", "path", "label", "detail", "score"))
        for finding in self.findings:
            place = "" if finding.sample is None else finding.sample.place
            score = "" if finding.score is None else f"{finding.score:.4f}"
            rows.writerow(
                (finding.kind, finding.split, place, finding.label, finding.detail, score)
            )
        return text.getvalue()

    @property
    def summary(self) -> str:
        """How many images, and how many of each kind of finding."""
        found = [
            _count(number, WORDING[kind].one, WORDING[kind].many)
            for kind, number in self.count().items()
            if number
        ]
        return f"{self.num_images:,} images: {', '.join(found) or 'no problems found'}"

    def to_lines(self) -> list[str]:
        """What a run logs: findings, small classes, and the effect of the leaks on the score."""
        lines = [f"audit of {self.summary}"]
        lines += [
            f"audit: {finding.detail}"
            for finding in self.of_kind("missing_class", "small_class")[:5]
        ]
        if self.num_cropped:
            lines.append(f"audit: {self.describe_crop()}")
        return lines + [f"audit: {line}" for line in self.describe_leaks()]

    def describe_crop(self) -> str:
        """Of how many images the crop cuts much off, and what to do."""
        of = "an image" if self.num_cropped == 1 else f"{self.num_cropped:,} images"
        return f"the crop cuts off 20 % or more of a side of {of}; see run.py --fit"

    def describe_leaks(self) -> list[str]:
        """Effect of the leaks on the probe's score, a line for each split with leaks."""
        lines = []
        for split, (whole, clean) in self.scores.items():
            num_leaks = sum(finding.split == split for finding in self.leaks)
            if num_leaks:
                without = "nothing else is left" if clean is None else f"{clean:.4f} without"
                lines.append(
                    f"the probe's {split} {self.metric} is {whole:.4f} "
                    f"with {_count(num_leaks, 'image', 'images')} of another split, {without}"
                )
        return lines


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
