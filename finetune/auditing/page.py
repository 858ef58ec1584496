"""An audit as one page of thumbnails that a person can act on: nothing is loaded from anywhere, ticked files are listed for copying."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from finetune.auditing.findings import WORDING, Audit, Finding, Kind
from finetune.data.splits import Sample
from models.preprocess import ImageError, Preprocess

# Of a kind; the CSV has all. A page of them all would take a browser minutes.
_NUM_SHOWN = 60
_SIDE = 176
_THUMBNAIL = Preprocess(height=_SIDE, width=_SIDE, crop_fraction=1.0)
_QUALITY = 80
_SERIOUS = ("unreadable", "missing_class", "exact_leak", "near_leak")


def write_page(audit: Audit, data: str) -> str:
    """The HTML of an audit of `--data`."""
    counts = {kind: number for kind, number in audit.count().items() if number}
    tiles = "".join(_tile(kind, number) for kind, number in counts.items())
    sections = "".join(_section(audit, kind) for kind in counts)
    nothing = (
        ""
        if counts
        else '<p class="none">Nothing to complain of: every image was read, and none stood out.</p>'
    )
    return _PAGE.format(
        style=_STYLE,
        script=_SCRIPT,
        title=escape(f"Audit of {data}"),
        num_images=f"{audit.num_images:,}",
        num_findings=f"{len(audit.findings):,}",
        scores="".join(_score(audit, split) for split in audit.scores),
        tiles=tiles,
        sections=sections or nothing,
    )


def _tile(kind: Kind, number: int) -> str:
    wording = WORDING[kind]
    serious = " serious" if kind in _SERIOUS else ""
    return f'<a class="tile{serious}" href="#{kind}"><b>{number:,}</b> {escape(wording.one if number == 1 else wording.many)}</a>'


def _score(audit: Audit, split: str) -> str:
    whole, clean = next(scores for name, scores in audit.scores.items() if name == split)
    text = f"The probe's {split} {audit.metric} is <b>{whole:.1%}</b>"
    if any(finding.split == split for finding in audit.leaks):
        text += (
            ", with nothing but images of other splits"
            if clean is None
            else f", and <b>{clean:.1%}</b> without the leaks"
        )
    return f"<p>{text}.</p>"


def _section(audit: Audit, kind: Kind) -> str:
    findings, wording = audit.of_kind(kind), WORDING[kind]
    shown = "".join(_card(finding) for finding in findings[:_NUM_SHOWN])
    more = len(findings) - _NUM_SHOWN
    rest = f'<p class="more">and {more:,} more in the CSV beside this page</p>' if more > 0 else ""
    return (
        f'<section id="{kind}"><h2>{escape(wording.heading)} <span>{len(findings):,}</span></h2>'
        f'<p class="advice">{escape(wording.advice)}</p><div class="cards">{shown}</div>{rest}</section>'
    )


def _card(finding: Finding) -> str:
    detail = f'<p class="detail">{escape(_printable(finding.detail))}</p>'
    if finding.sample is None:
        return f'<article class="card words"><p class="label">{escape(finding.label)}</p>{detail}</article>'
    pictures = _picture(finding.sample, finding.split, finding.label, finding.suggested)
    if finding.other is not None:
        split, label, sample = finding.other
        # Without the detail, which says in words what the second picture shows.
        detail = '<p class="detail differ">the labels differ</p>' if label != finding.label else ""
        pictures += _picture(sample, split, label, None)
    score = (
        ""
        if finding.score is None
        else f'<span class="score" title="score">{finding.score:.3f}</span>'
    )
    wide = " pair" if finding.other is not None else ""
    return f'<article class="card{wide}"><div class="pictures">{pictures}</div><div class="under">{detail}{score}</div></article>'


def _picture(sample: Sample, split: str, label: str, suggested: str | None) -> str:
    key = escape(_printable(sample.key))
    place = escape(_printable(sample.place))
    name = escape(_printable(sample.key.replace("\\", "/").rpartition("/")[2]))
    uri = _thumbnail(sample)
    image = (
        '<span class="blank">cannot be shown</span>'
        if uri is None
        else f'<img src="{uri}" alt="" loading="lazy">'
    )
    rather = "" if suggested is None else f' <span class="rather">→ {escape(suggested)}</span>'
    return (
        f'<label class="picture" title="{key}"><input type="checkbox" value="{place}">{image}'
        f'<span class="caption"><span class="split {split}">{split}</span> <b>{escape(label)}</b>{rather}</span>'
        f'<span class="name">{name}</span></label>'
    )


def _thumbnail(sample: Sample) -> str | None:
    """A data URI; None where the image cannot be read."""
    try:
        crop = _THUMBNAIL(sample.read())
    except (ImageError, OSError, ValueError):
        return None
    encoded = io.BytesIO()
    Image.fromarray(crop).save(encoded, "WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _printable(text: str) -> str:
    """Without the halves of surrogate pairs that stand for bytes which are no text."""
    return text.encode("utf-8", "replace").decode()


_STYLE = """
:root { color-scheme: light dark; --ground: #f5f7fa; --card: #fff; --ink: #1f2933; --faint: #66727f; --line: #dfe4ea; --accent: #0b69a3;
  --serious: #b83227; --train: #3d7a4f; --val: #0b69a3; --test: #7a4f9a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --card: #1d232a; --ink: #e4e9ee; --faint: #93a0ad; --line: #313a44;
  --accent: #58b0e6; --serious: #ef7c70; --train: #6fbf87; --val: #58b0e6; --test: #bb8fdb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main, header > div { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding: 32px 0 8px; }
h1 { margin: 0; font-size: 26px; letter-spacing: -.01em; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--faint); }
header b { color: var(--ink); }
.tiles { display: flex; flex-wrap: wrap; gap: 8px; margin: 20px 0 0; }
.tile { padding: 6px 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--card); color: var(--ink);
  text-decoration: none; }
.tile:hover { border-color: var(--accent); }
.tile b { color: var(--accent); font-variant-numeric: tabular-nums; }
.tile.serious b { color: var(--serious); }
section { padding: 28px 0 4px; scroll-margin-top: 8px; }
h2 { margin: 0; font-size: 19px; }
h2 span { color: var(--faint); font-weight: 400; }
.advice, .more, .none { margin: 2px 0 14px; color: var(--faint); max-width: 75ch; }
.more { margin-top: 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(178px, 1fr)); gap: 12px; }
.card { display: flex; flex-direction: column; padding: 8px; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
.card.pair { grid-column: span 2; }
.card.words { grid-column: span 2; padding: 12px 14px; }
.card.words .label { margin: 0; font-weight: 600; }
.pictures { display: flex; gap: 8px; }
.picture { position: relative; flex: 1 1 0; min-width: 0; cursor: pointer; }
.picture img, .blank { display: block; width: 100%; aspect-ratio: 1; border-radius: 6px; object-fit: cover; background: var(--ground); }
.blank { display: grid; place-items: center; color: var(--faint); font-size: 13px; }
.picture input { position: absolute; top: 7px; left: 7px; width: 18px; height: 18px; margin: 0; accent-color: var(--accent); }
.picture:has(input:checked) img, .picture:has(input:checked) .blank { outline: 3px solid var(--accent); outline-offset: -1px; }
.picture:has(input:focus-visible) img { outline: 3px dashed var(--accent); }
.caption { display: block; margin-top: 6px; overflow-wrap: anywhere; line-height: 1.35; }
.split { font-size: 11px; padding: 0 6px; border-radius: 9px; border: 1px solid currentColor; }
.split.train { color: var(--train); } .split.val { color: var(--val); } .split.test { color: var(--test); }
.rather { color: var(--serious); }
.name { display: block; color: var(--faint); font: 12px/1.4 ui-monospace, monospace; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.under { display: flex; gap: 8px; justify-content: space-between; align-items: baseline; margin-top: auto; padding-top: 4px; }
.detail { margin: 0; color: var(--faint); font-size: 12px; line-height: 1.4; overflow-wrap: anywhere; }
.detail.differ { color: var(--serious); }
.score { margin-left: auto; color: var(--faint); font-size: 12px; font-variant-numeric: tabular-nums; }
footer { position: sticky; bottom: 0; margin-top: 32px; padding: 10px 24px; background: var(--card); border-top: 1px solid var(--line); }
footer > div { display: flex; gap: 12px; align-items: center; max-width: 1192px; margin: 0 auto; }
footer textarea { flex: 1; height: 34px; padding: 6px 8px; border: 1px solid var(--line); border-radius: 6px; background: var(--ground);
  color: var(--ink); font: 12px/1.5 ui-monospace, monospace; resize: vertical; }
footer button { padding: 6px 14px; border: 0; border-radius: 6px; background: var(--accent); color: var(--card); font: inherit;
  cursor: pointer; }
footer button:disabled { opacity: .4; cursor: default; }
@media (max-width: 520px) { .card.pair, .card.words { grid-column: auto; } .cards { grid-template-columns: 1fr; } }
@media print { footer, .picture input { display: none; } }
"""

# One picture may be in several sections: ticked in one, it is ticked in all.
_SCRIPT = """
const ticked = new Set(), list = document.querySelector("textarea"), copy = document.querySelector("button");
const count = document.querySelector("#count"), boxes = [...document.querySelectorAll("input[type=checkbox]")];
function show() {
  list.value = [...ticked].join("\\n");
  count.textContent = ticked.size + " ticked";
  copy.disabled = !ticked.size;
}
for (const box of boxes) box.addEventListener("change", () => {
  if (box.checked) ticked.add(box.value); else ticked.delete(box.value);
  for (const other of boxes) if (other.value === box.value) other.checked = box.checked;
  show();
});
copy.addEventListener("click", () => { list.select(); document.execCommand("copy"); count.textContent = "copied"; });
for (const box of boxes) box.checked = false;
show();
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><div>
<h1>{title}</h1>
<p>{num_images} images, {num_findings} findings. Tick what you want to move or delete; the paths gather below.</p>
{scores}
<nav class="tiles">{tiles}</nav>
</div></header>
<main>{sections}</main>
<footer><div>
<span id="count"></span><textarea readonly aria-label="paths of ticked images"></textarea><button disabled>Copy paths</button>
</div></footer>
<script>{script}</script>
</body>
</html>
"""
