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

from upit.page import write_page
from upit.pictures import PICTURES

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason=f"needs a headless browser, found none of {', '.join(NAMES)}"),
]


def rendered(url: str, folder: Path, *, milliseconds: int) -> str:
    """The page's DOM once its scripts ran for a while."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1600,4000"]
    flags += ["--run-all-compositor-stages-before-draw", f"--virtual-time-budget={milliseconds}"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder}", "--dump-dom", url]
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
    addresses = re.findall(r'<img[^>]*imageId=([^"&]+)', rendered(url, tmp_path / "profile", milliseconds=20000))
    shown = {json.loads(base64.urlsafe_b64decode(address + "=="))[-3] for address in addresses}
    assert shown == set(PICTURES)
