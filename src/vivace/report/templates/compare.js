"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const videos = [...document.querySelectorAll("video")];
  const [lead, ...followers] = videos;
  const play = byId("play"), scrub = byId("scrub"), where = byId("where"), rate = byId("rate");
  const plots = [...document.querySelectorAll("[data-chart]")];
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const last = data.frames - 1;
  let playing = false, frame = 0;

  // One clock: the exact clip leads, the others follow it.
  const middle = (index) => (index + 0.5) / data.fps;
  const frameAt = (time) => Math.min(last, Math.max(0, Math.floor(time * data.fps + 1e-3)));

  function show(index) {
    frame = index;
    scrub.value = index;
    scrub.setAttribute("aria-valuetext", `frame ${index + 1} of ${data.frames}`);
    where.textContent = `${index + 1} / ${data.frames} \u00b7 ${(index / data.fps).toFixed(2)} s`;
    for (const plot of plots) {
      const x = data.charts[plot.dataset.chart].points[index][0];
      const head = plot.querySelector(".playhead");
      head.setAttribute("x1", x);
      head.setAttribute("x2", x);
    }
  }

  function seek(index) {
    const target = Math.min(last, Math.max(0, index));
    for (const video of videos) video.currentTime = middle(target);
    show(target);
  }

  function follow() {
    for (const video of followers) {
      const drift = video.currentTime - lead.currentTime;
      if (Math.abs(drift) > 2 / data.fps) video.currentTime = lead.currentTime;
      else if (Math.abs(drift) > 0.25 / data.fps) video.playbackRate = lead.playbackRate * (drift > 0 ? 0.9 : 1.1);
      else video.playbackRate = lead.playbackRate;
    }
  }

  function tick() {
    if (!playing) return;
    follow();
    show(frameAt(lead.currentTime));
    requestAnimationFrame(tick);
  }

  function setPlaying(value) {
    playing = value;
    play.classList.toggle("playing", value);
    play.setAttribute("aria-label", value ? "Pause" : "Play");
  }

  async function start() {
    if (frame >= last) seek(0);
    for (const video of videos) video.playbackRate = Number(rate.value);
    setPlaying(true);
    try {
      await Promise.all(videos.filter((video) => !video.error).map((video) => video.play()));
      requestAnimationFrame(tick);
    } catch {
      stop(); // the browser refused to start by itself: the button still works
    }
  }

  function stop() {
    for (const video of videos) video.pause();
    setPlaying(false);
    seek(frame);
  }

  const toggle = () => (playing ? stop() : start());
  const step = (by) => {
    if (playing) stop();
    seek(frame + by);
  };

  lead.addEventListener("ended", () => {
    if (!playing) return;
    seek(0);
    start();
  });
  for (const video of videos) {
    video.addEventListener("error", () => { video.nextElementSibling.hidden = false; });
    video.addEventListener("click", toggle);
  }
  play.addEventListener("click", toggle);
  byId("back").addEventListener("click", () => step(-1));
  byId("forward").addEventListener("click", () => step(1));
  scrub.addEventListener("input", () => step(Number(scrub.value) - frame));
  rate.addEventListener("change", () => { for (const video of videos) video.playbackRate = Number(rate.value); });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { " ": toggle, ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => step(-frame), End: () => step(last - frame) };
    const owner = event.target.closest("button, select, summary, a, .scroll");
    if (!keys[event.key] || owner) return; // the focused control has its own use for the key
    event.preventDefault();
    keys[event.key]();
  });

  // One tooltip for everything that carries data-tip, and for the charts.
  const tip = byId("tip");
  function place(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(innerWidth - box.width - 8, Math.max(8, x - box.width / 2));
    const top = y - box.height - 14 > 0 ? y - box.height - 14 : y + 18;
    tip.style.transform = `translate(${left}px, ${top}px)`;
  }
  document.addEventListener("pointermove", (event) => {
    const owner = event.target.closest?.("[data-tip]");
    if (owner) place(owner.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest?.("[data-chart]")) tip.hidden = true;
  });

  for (const plot of plots) {
    const { points, texts, title } = data.charts[plot.dataset.chart];
    const dot = plot.querySelector(".hover");
    const nearest = (event) => {
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
      return points.reduce((best, point, i) => (Math.abs(point[0] - x) < Math.abs(points[best][0] - x) ? i : best), 0);
    };
    plot.addEventListener("pointermove", (event) => {
      const index = nearest(event);
      dot.removeAttribute("hidden");
      dot.setAttribute("cx", points[index][0]);
      dot.setAttribute("cy", points[index][1]);
      place(`frame ${index + 1}\n${title} ${texts[index]}`, event.clientX, event.clientY);
    });
    plot.addEventListener("pointerleave", () => {
      dot.setAttribute("hidden", "");
      tip.hidden = true;
    });
    plot.addEventListener("click", (event) => step(nearest(event) - frame));
  }

  byId("copy")?.addEventListener("click", async (event) => {
    const text = byId("command");
    try {
      await navigator.clipboard.writeText(text.textContent);
      event.target.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // no clipboard from file:// here: leave it selected
      event.target.textContent = "Selected";
    }
    setTimeout(() => { event.target.textContent = "Copy"; }, 1600);
  });

  show(0);
  if (!still && last > 0) start();
})();
