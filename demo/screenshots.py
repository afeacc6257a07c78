"""Pictures of a run's report.html: at the width of a desk and of a phone, light and dark, as PNG.

make report-screenshots                                    # of runs/handbook, after make demo
python demo/screenshots.py runs/other --out pictures       # of another run

Where that run has no report, a small one is made first, on rules in the place of models
(programs/backends/scripted.toml): drafts, influence and pairs of a few questions. What is measured
there means nothing. Wants Chromium: apt-get install chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TASK = [str(ROOT / "programs/handbook.toml"), str(ROOT / "programs/backends/scripted.toml")]
VERBS = (
    ["evaluate", "--arm", "strong", "--arm", "collaboration_sft", "--arm", "oracle"],
    ["collect"],
    ["pairs"],
    ["report"],
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def scripted_report(folder: Path) -> Path:
    """The report of a run on rules, made in that folder by the verbs of the command line."""
    for verb, *options in VERBS:
        command = [
            sys.executable,
            "-m",
            "cowest_dspy.cli.main",
            verb,
            *TASK,
            *options,
            "--run",
            str(folder),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(
                f"cowest {verb} did not go through:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
    return folder / "report.html"


def pictures(page_file: Path, out: Path) -> list[Path]:
    """The pictures of the page, one for each section, size and theme."""
    from playwright.sync_api import sync_playwright

    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        sys.exit("There is no Chromium to take pictures with: apt-get install chromium")
    out.mkdir(parents=True, exist_ok=True)
    made = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(CHROMIUM))
        for name, (width, height) in SIZES.items():
            for theme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=theme
                )
                page.goto(page_file.resolve().as_uri())
                for link in page.locator("nav a").all():
                    link.click()
                    section = (link.get_attribute("href") or "").removeprefix("#")
                    for first in page.locator(f"#{section} button.open").all()[:1]:
                        first.click()
                    made.append(out / f"{section}-{name}-{theme}.png")
                    page.screenshot(path=made[-1], full_page=True)
                page.close()
        browser.close()
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        default=ROOT / "runs/handbook",
        help="a run folder; default: runs/handbook",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/screenshots", help="default: build/screenshots"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = given.run / "report.html"
        if not report.is_file():
            print(
                f"{given.run} has no report.html, so a small run is made on rules in the place of "
                "models"
            )
            report = scripted_report(Path(scratch) / "scripted")
        for path in pictures(report, given.out):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
