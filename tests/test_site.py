"""The site builds without a warning or a network, and what it shows can be read: formulas, tables, links, pictures."""

import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import equireg

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DOCS = Path(__file__).parent.parent / "docs"
ROOT = DOCS.parent
MATHML = "{http://www.w3.org/1998/Math/MathML}"


def sphinx(source, target):
    """A build that refuses the network and takes warnings, references without a target among them, for errors."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('the build asked for the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from sphinx.cmd.build import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, "-q", "-W", "--keep-going", "-n", "-c", str(DOCS), str(source), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(call, capture_output=True, text=True, env=environment)  # noqa: S603


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    for package in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        pytest.importorskip(package, reason="needs the docs extra")
    folder = tmp_path_factory.mktemp("site")
    result = sphinx(DOCS, folder)
    assert result.returncode == 0, result.stderr
    return folder


def pages(site):
    return {path.relative_to(site).as_posix(): path.read_text() for path in sorted(site.rglob("*.html"))}


def test_nothing_is_fetched_when_a_page_is_read(site):  # S8, S15
    """Links may lead elsewhere."""
    for page, text in pages(site).items():
        assert not re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//", text), page
        assert not re.findall(r"<link[^>]*href=[\"'](?:https?:)?//[^>]*>", text), page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:@import\s+|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_every_public_name_has_a_place_to_link_to(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = re.findall(r"^equireg\.(\w+) py:(?:class|function) \d+ (\S+)#\S* ", inventory, re.M)
    assert {place for place, _ in documented} == set(equireg.__all__)
    assert all((site / page).exists() and page.startswith("api/") for _, page in documented)


def test_links_and_pictures_of_the_site_are_there(site):
    texts = pages(site)
    ids = {page: set(re.findall(r"\sid=\"([^\"]+)\"", text)) for page, text in texts.items()}
    for page, text in texts.items():
        for target in map(html.unescape, re.findall(r"\s(?:href|src)=\"([^\"]*)\"", text)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, place = target.partition("#")
            file = os.path.normpath(Path(page).parent / unquote(file.partition("?")[0])) if file else page
            assert (site / file).is_file(), f"{page}: {target}"
            assert not place or file not in ids or unquote(place) in ids[file], f"{page}: {target}"


def test_tables_scroll_by_themselves(site):
    """On a narrow screen; the pages in HTML alone would be as wide as their widest table."""
    tables = 0
    for page, text in pages(site).items():
        found = re.findall(r"(<div class=\"table-wrapper[^>]*>\s*)?<table class=\"docutils", text)
        assert all(found), page
        tables += len(found)
    assert tables > 20
    assert re.search(r"div\.table-wrapper[^{]*\{ overflow-x: auto", (site / "_static/site.css").read_text())


def formulas(site):
    for page, text in pages(site).items():
        for formula in re.findall(r"<math.*?</math>", text, re.S):
            yield page, ElementTree.fromstring(formula)  # noqa: S314


def test_formulas_are_drawn(site):
    """No TeX is left over, and what a browser does not know is not asked of it."""
    for page, text in pages(site).items():
        prose = re.sub(r"<(pre|code|script|title)\b.*?</\1>", "", text, flags=re.S)
        assert not re.findall(r"\$\$|\\[\[(a-zA-Z]", re.sub(r"<[^>]+>", "", prose)), page
    found = list(formulas(site))
    assert len(found) > 50
    for page, formula in found:
        for element in formula.iter():
            assert not (element.text or "").startswith("\\"), page
            if element.tag == MATHML + "msub" and element[0].tag == MATHML + "mo":
                assert not element[0].get("movablelimits"), f"{page}: limits beside their operator"


def test_the_font_has_what_formulas_need(site):
    """Single letters are drawn in the italics of mathematics, which have places of their own; h is the exception."""
    TTFont = pytest.importorskip("fontTools.ttLib", reason="comes with matplotlib").TTFont
    with TTFont(io.BytesIO((site / "_static/math.woff").read_bytes())) as font:
        assert "MATH" in font, "brackets could not grow"
        known = set(font.getBestCmap())
    for page, formula in formulas(site):
        for element in formula.iter():
            text = (element.text or "").strip()
            places = {ord(character) for character in text if not character.isspace()}
            if element.tag == MATHML + "mi" and len(text) == 1 and text.isascii() and text.isalpha() and text != "h":
                places = {(0x1D434 if text.isupper() else 0x1D44E - 32) + ord(text) - ord("A")}
            assert places <= known, f"{page}: {text}"


# Opens one page after the other in a frame of a browser's width, and leaves what it measured as the page's text.
MEASURE = """<!doctype html><body><script>
const found = {};
async function measure(page) {
  const frame = document.createElement("iframe");
  frame.style.cssText = "border: 0; width: WIDTHpx; height: 900px";
  document.body.append(frame);
  await new Promise(done => { frame.onload = done; frame.src = page; });
  // On a phone, furo lets the text scroll in itself.
  const inside = frame.contentDocument, text = inside.querySelector(".content") || inside.body;
  const shown = element => element.offsetParent !== null;
  const formulas = [...inside.querySelectorAll("math")].filter(math => shown(math.parentElement));
  const pictures = [...inside.images].filter(shown);
  found[page] = {
    width: inside.documentElement.scrollWidth + text.scrollWidth - text.clientWidth,
    formulas: formulas.length,
    flat: formulas.filter(math => !math.getBoundingClientRect().width).map(math => math.textContent),
    broken: pictures.filter(image => !image.naturalWidth).map(image => image.src),
  };
  const behind = element => inside.defaultView.getComputedStyle(element).backgroundColor;
  inside.body.dataset.theme = "dark"; // as furo's switch does
  found[page].dark = behind(inside.body);
  found[page].pale = pictures.filter(image => behind(image) !== "rgb(255, 255, 255)").map(image => image.src);
  frame.remove();
}
(async () => {
  for (const page of PAGES) await measure(page);
  document.body.textContent = JSON.stringify(found);
})();
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1366])  # of a phone, of a laptop
def test_in_a_browser_no_page_scrolls_sideways_and_all_is_drawn(site, tmp_path, width):
    names = [name for name in pages(site) if not name.startswith("_modules")]
    script = tmp_path / "measure.html"
    addresses = json.dumps([(site / name).as_uri() for name in names])
    script.write_text(MEASURE.replace("WIDTH", str(width)).replace("PAGES", addresses))
    result = chromium(tmp_path, script, "--allow-file-access-from-files", "--dump-dom", "--virtual-time-budget=200000")
    text = re.search("<body>(.*)</body>", result.stdout, re.DOTALL)
    assert text, result.stderr
    found = json.loads(html.unescape(text[1]))
    assert len(found) == len(names)
    assert sum(page["formulas"] for page in found.values()) > 50
    wrong = {name: page for name, page in found.items() if page["width"] > width or page["flat"] or page["broken"]}
    assert not wrong
    # In dark mode, what is drawn in black keeps white behind it.
    assert all(max(map(int, re.findall(r"\d+", page["dark"])[:3])) < 64 for page in found.values())
    assert not [name for name, page in found.items() if page["pale"]]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1366])
@pytest.mark.parametrize("page", ["index", "eqinv", "results"])
def test_a_screenshot_shows_the_page(site, tmp_path, page, width):
    """It is not white, and nothing dark is cut off at its edges."""
    picture = tmp_path / "page.png"
    flags = ["--hide-scrollbars", f"--screenshot={picture}", f"--window-size={width},1600"]
    chromium(tmp_path, site / f"{page}.html", *flags)
    with Image.open(picture) as opened:
        dark = np.asarray(opened.convert("L")) < 128
    assert dark.shape == (1600, width)
    assert 0.02 < dark.mean() < 0.5
    assert not dark[:, [0, -1]].any()


def chromium(folder, page, *flags):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *flags]
    return subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=200)  # noqa: S603
