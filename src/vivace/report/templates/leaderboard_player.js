// Three screens on one clock: exact, method, and their difference, drawn from the two videos.
(() => {
  const { el, data } = V;
  const urls = new Map();
  /** The object address of a clip of the page; made when it is first wanted. */
  V.clipUrl = (index) => {
    if (!urls.has(index)) {
      const bytes = Uint8Array.from(atob(document.getElementById(`clip-${index}`).textContent), (c) => c.charCodeAt(0));
      urls.set(index, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
    }
    return urls.get(index);
  };
  const ICONS = {
    back: "M7 6v12M18 6l-8 6 8 6z", forward: "M17 6v12M6 6l8 6-8 6z",
  };
  const icon = (d) => V.svg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, V.svg("path", { d }));
  const screen = (tag, name, label, task) => {
    const node = el(tag, { class: "screen", style: `aspect-ratio: ${task.width} / ${task.height}`, "aria-label": label, role: tag === "canvas" ? "img" : null });
    if (tag === "video") Object.assign(node, { muted: true, playsInline: true, preload: "auto", tabIndex: -1 });
    return [node, el("figure", {}, el("figcaption", {}, el("span", { class: `dot dot-${name}` }), label), node,
      tag === "video" && el("p", { class: "trouble", hidden: true }, "This browser cannot play H.264 video."))];
  };

  /**
   * A stage for one method. `show(exact, method)` puts two clips on it.
   * The difference is |exact - method| per channel, brightened; it is drawn by the canvas itself, no pixel is read.
   */
  V.player = (task, label) => {
    const fps = task.fps || 8, frames = task.frames || 1, last = frames - 1;
    const [exact, exactFigure] = screen("video", "exact", "Exact", task);
    const [method, methodFigure] = screen("video", "fast", label, task);
    const [canvas, canvasFigure] = screen("canvas", "difference", "Difference", task);
    Object.assign(canvas, { width: task.width, height: task.height });
    const paint = canvas.getContext("2d");
    const videos = [exact, method];
    let playing = false, frame = 0, drawn = 0, alive = true;

    const where = el("output", {}), scrub = el("input", { type: "range", min: 0, max: last, value: 0, step: 1, "aria-label": "Frame", oninput: () => step(Number(scrub.value) - frame) });
    const rate = el("select", { "aria-label": "Speed", onchange: () => { for (const v of videos) v.playbackRate = Number(rate.value); } }, ["0.25", "0.5", "1"].map((v) => el("option", { value: v, selected: v === "1" }, `${v}${V.TIMES}`)));
    const gain = el("select", { "aria-label": "Brighten the difference", onchange: () => { canvas.style.filter = `brightness(${gain.value})`; } }, ["1", "4", "8", "16"].map((v) => el("option", { value: v, selected: v === "8" }, `${v}${V.TIMES}`)));
    canvas.style.filter = "brightness(8)";
    canvasFigure.firstChild.append(el("label", { class: "rate" }, gain));
    const play = el("button", { type: "button", class: "primary", "aria-label": "Play", title: "Play or pause (space)", onclick: () => toggle() }, V.svg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, V.svg("path", { class: "when-paused", d: "M8 5l11 7-11 7z" }), V.svg("path", { class: "when-playing", d: "M8 5v14M16 5v14" })));
    const node = el("section", { class: "stage", "aria-label": "Players" },
      el("div", { class: "screens screens-3" }, exactFigure, methodFigure, canvasFigure),
      el("div", { class: "transport", role: "group", "aria-label": "Playback of all clips" },
        el("button", { type: "button", "aria-label": "One frame back", title: "One frame back (left arrow)", onclick: () => step(-1) }, icon(ICONS.back)), play,
        el("button", { type: "button", "aria-label": "One frame forward", title: "One frame forward (right arrow)", onclick: () => step(1) }, icon(ICONS.forward)),
        scrub, where, el("label", { class: "rate" }, el("span", {}, "Speed"), rate)));

    function difference() {
      if (videos.some((v) => v.readyState < 2)) return;
      paint.globalCompositeOperation = "copy";
      paint.drawImage(exact, 0, 0, canvas.width, canvas.height);
      paint.globalCompositeOperation = "difference";
      paint.drawImage(method, 0, 0, canvas.width, canvas.height);
      drawn += 1;
      canvas.dataset.drawn = drawn;
    }
    function note(index) {
      frame = index;
      scrub.value = index;
      scrub.setAttribute("aria-valuetext", `frame ${index + 1} of ${frames}`);
      where.textContent = `${index + 1} / ${frames} \u00b7 ${(index / fps).toFixed(2)} s`;
    }
    function seek(index) {
      const target = Math.min(last, Math.max(0, index));
      for (const v of videos) v.currentTime = (target + 0.5) / fps;
      note(target);
    }
    function tick() {
      if (!playing || !alive) return;
      const drift = method.currentTime - exact.currentTime;
      if (Math.abs(drift) > 2 / fps) method.currentTime = exact.currentTime;
      else method.playbackRate = exact.playbackRate * (Math.abs(drift) > 0.25 / fps ? (drift > 0 ? 0.9 : 1.1) : 1);
      difference();
      note(Math.min(last, Math.max(0, Math.floor(exact.currentTime * fps + 1e-3))));
      requestAnimationFrame(tick);
    }
    function mode(value) {
      playing = value;
      play.classList.toggle("playing", value);
      play.setAttribute("aria-label", value ? "Pause" : "Play");
    }
    async function start() {
      if (frame >= last) seek(0);
      for (const v of videos) v.playbackRate = Number(rate.value);
      mode(true);
      try {
        await Promise.all(videos.map((v) => v.play()));
        requestAnimationFrame(tick);
      } catch { stop(); }
    }
    function stop() {
      for (const v of videos) v.pause();
      mode(false);
      if (alive) seek(frame);
    }
    const toggle = () => (playing ? stop() : start());
    const step = (by) => { if (playing) stop(); seek(frame + by); };
    exact.addEventListener("ended", () => { if (playing && alive) { seek(0); start(); } });
    for (const v of videos) {
      v.addEventListener("seeked", difference);
      v.addEventListener("loadeddata", difference);
      v.addEventListener("click", toggle);
      v.addEventListener("error", () => { if (v.src) v.nextElementSibling.hidden = false; });
    }
    note(0);
    return {
      node, toggle, step, seek,
      home: () => step(-frame), end: () => step(last - frame),
      show(exactClip, methodClip) {
        if (playing) stop();
        exact.src = V.clipUrl(exactClip);
        method.src = V.clipUrl(methodClip);
        seek(0);
        if (!matchMedia("(prefers-reduced-motion: reduce)").matches && last > 0) start();
      },
      close() {
        alive = false;
        for (const v of videos) { v.pause(); v.removeAttribute("src"); v.load(); }
      },
    };
  };

  /** A still of a clip: a small video that is filled when it comes into view. */
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watch.unobserve(entry.target);
      const video = el("video", { "aria-hidden": "true", tabindex: "-1" });
      Object.assign(video, { muted: true, playsInline: true, preload: "auto" });
      video.src = V.clipUrl(Number(entry.target.dataset.clip));
      video.currentTime = Number(entry.target.dataset.at);
      entry.target.append(video);
    }
  }, { rootMargin: "200px" });
  V.thumbnail = (index, task) => {
    const node = el("span", { class: "thumb", "data-clip": index, "data-at": ((task.frames || 2) / 2 + 0.5) / (task.fps || 8), style: `aspect-ratio: ${task.width} / ${task.height}` });
    watch.observe(node);
    return node;
  };
  V.hasClips = Object.values(data.rows).some((row) => Object.keys(row.clips).length > 0);
})();
