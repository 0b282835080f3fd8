"""The site's pages fit a phone, as a browser lays them out."""

import json
import re
from pathlib import Path

import pytest

from tests.browser import driven, needs_browser, pages

SITE = Path(__file__).parents[2] / "site"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SITE.exists(), reason="needs the site: make test-site")]

# In a frame as wide as a phone: pages that are wider, and pictures that are too small to read.
MEASURE = """
const frame = document.body.appendChild(document.createElement("iframe"));
frame.style.width = "390px";
const found = { wide: [], small: [], pictures: 0 };
for (const name of PAGES) {
  await new Promise((loaded) => { frame.onload = loaded; frame.src = name; });
  const root = frame.contentDocument.documentElement;
  if (root.scrollWidth > 390) found.wide.push(name);
  for (const picture of root.querySelectorAll("article img")) {
    found.pictures += 1;
    if (picture.clientWidth < 600) found.small.push(picture.src);
  }
}
document.body.dataset.found = JSON.stringify(found);
done();
"""


@needs_browser
def test_no_page_is_wider_than_a_phone_and_its_pictures_can_be_read():
    wide = SITE / "driven-wide.html"
    wide.write_text('<body><div style="width: 500px">wider</div><article><img width="100"></article>')
    try:
        names = [str(page.relative_to(SITE)) for page in (*pages(SITE), wide)]
        shown, _ = driven(SITE, "404.html", MEASURE.replace("PAGES", json.dumps(names)))
    finally:
        wide.unlink()
    found = json.loads(re.search(r'data-found="(.*?)"', shown)[1].replace("&quot;", '"'))
    assert found["wide"] == [wide.name]
    assert len(found["small"]) == 1
    assert found["pictures"] > 10
