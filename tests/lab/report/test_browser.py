"""The page in a real browser: no error, no request, no overflow, and a call's story by pointer, tap and key."""

from dataclasses import replace
from pathlib import Path

import pytest
from chromium import BROWSER, tab

from outrider.lab import report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")

FIRST_BAR = """(async () => {
  const svg = document.querySelector('.lanes');
  svg.scrollIntoView({block: 'center'});
  for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
  const box = document.querySelector('.lanes g[data-i] .stream').getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
})()"""


@pytest.fixture(scope="module")
def page_url(simulated: report.Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "r.html"
    report.write(path, simulated)
    return path.as_uri()


async def test_it_opens_anywhere_without_error_request_or_overflow(page_url: str) -> None:
    async with tab() as page:
        for width in (1280, 390):
            grounds = []
            for dark in (False, True):
                await page.open(page_url, width, dark=dark, touch=width < 500)
                assert await page.eval("document.documentElement.scrollWidth") == width
                grounds.append(await page.eval("getComputedStyle(document.body).backgroundColor"))
                tall = await page.eval(
                    "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)"
                )
                assert min(tall) > 5, "every picture has a height"
            assert grounds[0] != grounds[1], "light and dark differ"
        assert page.said == []
        assert {url for url in page.asked if not url.startswith(("file:", "data:"))} == set()


async def test_a_long_name_does_not_widen_a_phone(simulated: report.Run, tmp_path: Path) -> None:
    report.write(tmp_path / "r.html", replace(simulated, title="AzureLLMInferenceTrace_conv.csv.xz" * 2))
    async with tab() as page:
        await page.open((tmp_path / "r.html").as_uri(), 390, touch=True)
        assert await page.eval("document.documentElement.scrollWidth") == 390


async def test_a_call_tells_its_story(page_url: str) -> None:
    """By mouse, by keys, and never without being asked; text is set as text."""
    async with tab() as page:
        await page.open(page_url, 1280)
        hidden = "document.getElementById('tip').hidden"
        assert await page.eval(hidden) is True
        await page.mouse(*await page.eval(FIRST_BAR))
        told = await page.eval("document.getElementById('tip').innerText")
        assert "flow-0 · turn/0" in told and "first byte after" in told and "computed" in told
        box = await page.eval("(r => [r.left, r.right])(document.getElementById('tip').getBoundingClientRect())")
        assert 0 <= box[0] < box[1] <= 1280
        await page.mouse(5, 5)
        assert await page.eval(hidden) is True
        await page.eval("scrollTo(0, 0), document.querySelector('.lanes').focus({preventScroll: true})")
        for _ in range(2):
            await page.key("ArrowRight")
        await page.settled()
        assert await page.eval(hidden) is False, "also where the page had to scroll for it"
        assert "flow-0 · turn/1" in await page.eval("document.getElementById('tip').innerText")
        await page.key("Escape")
        assert await page.eval(hidden) is True
        await page.eval("document.querySelectorAll('.lanes')[1].focus()")
        await page.key("ArrowRight")
        assert "residency" in await page.eval("document.getElementById('tip').innerText"), "the other arm's own call"
        assert page.said == []


async def test_a_tap_on_a_phone_tells_it_too(page_url: str) -> None:
    async with tab() as page:
        await page.open(page_url, 390, touch=True)
        x, y = await page.eval(FIRST_BAR)
        await page.call("Emulation.setTouchEmulationEnabled", enabled=True)
        await page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        await page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        box = await page.eval(
            "(r => [r.left, r.right, r.height])(document.getElementById('tip').getBoundingClientRect())"
        )
        assert 0 <= box[0] < box[1] <= 390 and box[2] > 20
        assert page.said == []


async def test_zoom_keeps_both_arms_on_one_axis(page_url: str) -> None:
    async with tab() as page:
        await page.open(page_url, 1280)
        wide = "[...document.querySelectorAll('.plot')].map(e => e.getBoundingClientRect().width)"
        before = await page.eval(wide)
        await page.eval("document.querySelector('[data-zoom=\"2\"]').click()")
        await page.settled()
        after = await page.eval(wide)
        assert [round(a / b, 2) for a, b in zip(after, before, strict=True)] == [2, 2]
        await page.eval("document.querySelectorAll('.scroll')[1].scrollLeft = 100")
        await page.settled()
        assert await page.eval("document.querySelectorAll('.scroll')[0].scrollLeft") == 100
        assert await page.eval("document.documentElement.scrollWidth") == 1280
        assert page.said == []
