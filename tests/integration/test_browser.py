"""TensorBoard and the HTML page in headless Chromium: the pictures are there, as a reader would find them."""

import base64
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest

from upit.report.page import write_page
from upit.report.pictures import PICTURES
from upit.report.run import Run
from upit.report.token_text import symbol, token_text

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason=f"needs a headless browser, found none of {', '.join(NAMES)}"),
]


# the text page keeps its content in shadow trees, which a dump of the DOM leaves out
MANIFEST = {"manifest_version": 3, "name": "probe", "version": "1"}
PROBE = """
const texts = node => node.nodeType == Node.TEXT_NODE ? node.data
  : [node.shadowRoot, ...node.childNodes].filter(Boolean).map(texts).join(" ");
const shown = document.body.appendChild(document.createElement("pre"));
setInterval(() => { shown.textContent = texts(document.querySelector("tf-text-dashboard") ?? shown); }, 500);
"""


def probe(folder: Path) -> str:
    """A browser extension that copies the text page's text to where a dump has it, as a flag."""
    folder.mkdir()
    script = {"matches": ["http://127.0.0.1/*"], "js": ["probe.js"]}
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, "content_scripts": [script]}))
    (folder / "probe.js").write_text(PROBE)
    return f"--load-extension={folder}"


def rendered(url: str, folder: Path, *more: str, milliseconds: int) -> str:
    """The page's DOM once its scripts ran for a while."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1600,4000"]
    flags += ["--run-all-compositor-stages-before-draw", f"--virtual-time-budget={milliseconds}"]
    command = [CHROMIUM, *flags, *more, f"--user-data-dir={folder}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=True).stdout


def test_page_opens_from_disk(pictured, tmp_path):
    page = write_page([pictured], tmp_path / "report.html")
    probe = (
        "<script>addEventListener('load', () => document.title = 'drawn ' +"
        " [...document.images].filter(i => i.naturalWidth > 150).length)</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", probe))
    dom = rendered(page.as_uri(), tmp_path / "profile", milliseconds=5000)
    assert f"<title>drawn {len(PICTURES)}</title>" in dom


@pytest.fixture
def tensorboard(pictured):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(pictured),
        "--port",
        str(port),
        "--load_fast=false",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            if urllib.request.urlopen(f"{url}/data/plugin/images/tags").read() != b"{}":
                break
        except OSError:
            pass
        time.sleep(0.5)
    yield url
    server.terminate()
    server.wait()


def test_tensorboard_shows_the_pictures(tensorboard, tmp_path):
    """The cards of the Time Series page are filtered to the pictures; an image's address names its tag."""
    tags = "|".join(f"^{tag}$" for tag in PICTURES)
    url = f"{tensorboard}/?tagFilter={quote(tags)}#timeseries"
    for attempt in range(3):  # a busy machine draws nothing in time
        page = rendered(url, tmp_path / f"profile_{attempt}", milliseconds=20000)
        addresses = re.findall(r'<img[^>]*imageId=([^"&]+)', page)
        shown = {json.loads(base64.urlsafe_b64decode(address + "=="))[-3] for address in addresses}
        if shown == set(PICTURES):
            break
    assert shown == set(PICTURES)


def test_tensorboard_shows_the_token_text(tensorboard, pictured, tmp_path):
    extension = probe(tmp_path / "probe")
    page = rendered(f"{tensorboard}/#text", tmp_path / "profile", extension, milliseconds=20000)
    assert "router/tokens/text_summary" in page
    tokens = Run(pictured).routing[-1]["tokens"]
    legend = token_text(tokens).split("\n")[0]
    assert legend in page
    assert f"letters, layer {tokens['layers'][-1]}" in page
    assert page.count(symbol(0)[0]) > 5, "in the legend and in the text"
