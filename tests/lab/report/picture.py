"""Takes the picture that the README shows: python tests/lab/report/picture.py outrider-report.html docs/report.png"""

import asyncio
import sys
from pathlib import Path

from chromium import tab

WIDTH = 1280
END = "document.querySelector('#timeline details').getBoundingClientRect().top + scrollY"


async def take(report: Path, target: Path) -> None:
    """From the headlines to the end of the timelines, in daylight."""
    async with tab() as page:
        await page.open(report.resolve().as_uri(), WIDTH)
        await page.screenshot(target, await page.eval(END))
        assert not page.said, page.said


if __name__ == "__main__":
    asyncio.run(take(Path(sys.argv[1]), Path(sys.argv[2])))
