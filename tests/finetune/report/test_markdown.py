"""Names of others are text in a table of Markdown, whatever they hold."""

from __future__ import annotations

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from finetune.report.markdown import tabulate_markdown
from tests.support.pages import ParsedPage

NAMES = (
    "a|b",
    "<script>alert(1)</script>",
    "*x* _y_ tf_efficientnet_lite0",
    "`code`",
    "back\\slash",
    "[link](http://example.com)",
    "Ünï 猫 \"'",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_cell_of_text(name: str) -> None:
    table = tabulate_markdown(("class", "images"), [(name, "1"), ("two\nlines", "2")])
    page = ParsedPage(markdown_to_safe_html(table))
    assert page.tags.count("td") == 4
    assert not {"script", "a", "code", "em", "strong"} & set(page.tags)
    cells = [text for text in page.text if text.strip()]
    assert cells == ["class", "images", name, "1", "two lines", "2"]
