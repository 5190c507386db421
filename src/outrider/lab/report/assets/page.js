"use strict";
(() => {
  const stories = JSON.parse(document.getElementById("stories").textContent);
  const tip = document.getElementById("tip");
  const timeline = document.getElementById("timeline");
  if (!timeline) return;

  // ---- a call's story: by pointer, by tap, by arrow keys
  const s = (value) => (value === null ? "–" : value.toFixed(2) + " s");
  const tell = (story) => {
    const lines = [`arrived at ${s(story.at_s)}, ${story.ahead} ahead; in line ${s(story.queued_s)}`];
    if (story.engine) lines.push(`${story.engine} (${story.reason})`);
    for (const failure of story.failures) lines.push("broke: " + failure);
    if (story.first_s !== null) lines.push(`first byte after ${s(story.first_s)}, stream ${s(story.stream_s)}`);
    if (story.total_s !== null) lines.push(`done ${s(story.total_s)} after its arrival`);
    if (story.prompt !== null) {
      lines.push(`prompt ${story.prompt} tokens: ${story.computed} computed, ${story.cached} engine cache, ${story.memory} memory`);
      lines.push(`output ${story.output} tokens; foretold ${story.predicted}, bound ${story.bound}`);
    }
    if (story.end !== "Settle") lines.push((story.end || "unanswered when the journal ends") + (story.why ? ": " + story.why : ""));
    return lines.join("\n");
  };
  let chosen = null, byKey = false;
  const clear = () => {
    if (chosen) chosen.classList.remove("on");
    chosen = null;
    tip.hidden = true;
  };
  const choose = (bar, x, y) => {
    if (bar !== chosen) {
      clear();
      chosen = bar;
      bar.classList.add("on");
      const story = stories[bar.dataset.i];
      const name = document.createElement("b");
      name.textContent = [story.workflow, story.stage || story.role].filter(Boolean).join(" · ") || story.id;
      tip.replaceChildren(name, tell(story));
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth - 8 ? x - 14 - box.width : x + 14;
    const top = y + 14 + box.height > innerHeight - 8 ? y - 14 - box.height : y + 14;
    tip.style.transform = `translate(${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px, ${Math.max(8, top)}px)`;
  };
  // the nearest bar of a lane counts: a bar may be thinner than a finger
  const nearest = (svg, x, y) => {
    let best = null, least = 24;
    for (const bar of svg.querySelectorAll("g[data-i]")) {
      const box = bar.getBoundingClientRect();
      const away = Math.hypot(Math.max(box.left - x, 0, x - box.right), 2 * Math.max(box.top - y, 0, y - box.bottom));
      if (away < least) [best, least] = [bar, away];
    }
    return best;
  };
  const below = (bar) => {
    const box = bar.getBoundingClientRect();
    choose(bar, box.left + box.width / 2, box.bottom);
  };
  const scrolled = () => (byKey && chosen ? below(chosen) : clear());
  for (const svg of timeline.querySelectorAll(".lanes")) {
    const point = (event) => {
      byKey = false;
      const bar = event.target.closest("g[data-i]") || nearest(svg, event.clientX, event.clientY);
      if (bar) choose(bar, event.clientX, event.clientY);
      else clear();
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") clear(); });
    svg.addEventListener("blur", clear);
    svg.addEventListener("keydown", (event) => {
      const bars = [...svg.querySelectorAll("g[data-i]")];
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") clear();
      if (!step || !bars.length) return;
      event.preventDefault();
      const at = bars.indexOf(chosen);
      const bar = bars[at < 0 ? 0 : Math.max(0, Math.min(bars.length - 1, at + step))];
      bar.scrollIntoView({ block: "nearest", inline: "nearest" });
      byKey = true;
      below(bar);
    });
  }
  addEventListener("scroll", scrolled, { passive: true });

  // ---- zoom: both arms keep one axis, also while one of them scrolls
  const zoom = timeline.querySelector(".zoom");
  const panes = [...timeline.querySelectorAll(".scroll")];
  let scale = 1;
  zoom.hidden = false;
  zoom.addEventListener("click", (event) => {
    const factor = Number(event.target.dataset.zoom);
    if (!factor) return;
    const middle = (panes[0].scrollLeft + panes[0].clientWidth / 2) / panes[0].scrollWidth;
    scale = Math.max(1, Math.min(32, scale * factor));
    zoom.querySelector("output").textContent = scale + "×";
    for (const pane of panes) pane.style.setProperty("--zoom", scale);
    panes[0].scrollLeft = middle * panes[0].scrollWidth - panes[0].clientWidth / 2;
  });
  for (const pane of panes) {
    pane.addEventListener("scroll", () => {
      scrolled();
      for (const other of panes) if (other.scrollLeft !== pane.scrollLeft) other.scrollLeft = pane.scrollLeft;
    }, { passive: true });
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
