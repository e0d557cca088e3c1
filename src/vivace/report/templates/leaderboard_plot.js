// Cost against quality with intervals, the front, curves of one knob, and the bands of the anchors.
(() => {
  const { data, el, svg, pick, finite, full, state } = V;
  const COSTS = {
    seconds: { title: "seconds", of: (f) => f.time?.cost?.total, text: V.secondsText, measured: true },
    flops: { title: "FLOPs", of: (f) => ({ value: f.counted?.counts?.flops }), text: V.flops },
    nfe: { title: "network evaluations (NFE)", of: (f) => ({ value: f.counted?.counts?.nfe }), text: V.number },
    peak_bytes: { title: "peak memory", of: (f) => ({ value: V.memoryOf(f.time) }), text: V.bytes, measured: true },
  };
  const model = () => V.models.get(state.model) || data.models[0];
  const HEIGHT = 460;

  /** Points of the chosen axes: only methods for which both numbers are known. */
  function points(from) {
    const cost = COSTS[state.x];
    return data.methods.filter((m) => m.model === model().id && !["floor", "seed"].includes(m.kind)).map((m) => V.facts(m, from)).map((facts) => {
      const x = cost.of(facts), y = facts.quality?.quality?.[state.y];
      const box = x && finite(x.q1) ? [x.q1, x.q3] : [x?.low ?? x?.value, x?.high ?? x?.value];
      return { ...facts, x, y, xs: box, on: V.fits(facts) };
    }).filter((point) => finite(point.x?.value) && point.x.value > 0 && finite(point.y?.value));
  }

  /** Whom nobody beats in both: as the board says where it has this very front, else from the point estimates. */
  function front(list, from) {
    const better = data.series[state.y].better;
    if (better === "same") return [];
    const known = frontOf(from);
    const sign = better === "lower" ? -1 : 1;
    if (known) {
      const inside = new Set(known.points.filter((p) => p.front).map((p) => p.row));
      return list.filter((p) => inside.has(p.quality.id));
    }
    return list.filter((p) => !list.some((q) => q !== p && q.x.value <= p.x.value && sign * q.y.value >= sign * p.y.value && (q.x.value < p.x.value || q.y.value !== p.y.value)));
  }

  function ticksLinear(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * ([1, 2, 5, 10].find((m) => m * power >= rough) || 10);
    const out = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
    return [out, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
  }
  /** Round values on a log axis: as few of 1, 2, 5 of every decade as give four ticks, else linear ones. */
  function ticksLog(low, high, base) {
    const unit = base === 1024 ? 1024 ** Math.floor(Math.log(low) / Math.log(1024)) : 1;
    for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
      const out = [];
      for (let e = Math.floor(Math.log10(low / unit)); e <= Math.ceil(Math.log10(high / unit)); e += 1)
        for (const s of steps) { const v = unit * s * 10 ** e; if (v >= low * 0.999 && v <= high * 1.001) out.push(v); }
      if (out.length >= 4) return out;
    }
    return ticksLinear(low / unit, high / unit, 4)[0].filter((v) => v > 0).map((v) => v * unit);
  }

  function scales(list, bands, width, narrow) {
    const left = 62, right = narrow ? 14 : 104, top = 16, bottom = 52;
    const xs = list.flatMap((p) => [...p.xs, p.x.value]), ys = list.flatMap((p) => [p.y.value, p.y.low, p.y.high].filter(finite));
    let low = Math.min(...ys), high = Math.max(...ys);
    const extent = high - low || Math.abs(high) * 0.1 || 1;
    // An anchor far away would flatten everything else, so it draws the axis only a little.
    for (const band of bands) if (band.value > low - 0.6 * extent && band.value < high + 0.6 * extent) { low = Math.min(low, band.value); high = Math.max(high, band.value); }
    const pad = (high - low || extent) * 0.07;
    [low, high] = [low - pad, high + pad];
    const [l0, l1] = [Math.log(Math.min(...xs)), Math.log(Math.max(...xs))], gap = (l1 - l0 || 0.4) * 0.06;
    const x = (v) => left + ((Math.log(v) - l0 + gap) / (l1 - l0 + 2 * gap)) * (width - left - right);
    const y = (v) => top + ((high - v) / (high - low)) * (HEIGHT - top - bottom);
    const bytes = state.x === "peak_bytes";
    const xTicks = ticksLog(Math.exp(l0 - gap), Math.exp(l1 + gap), bytes ? 1024 : 10);
    return { x, y, left, right: width - right, top, bottom: HEIGHT - bottom, low, high, xTicks, yTicks: ticksLinear(low, high, 6) };
  }

  const line = (pts) => pts.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
  function staircase(list, at) {
    const sorted = [...list].sort((a, b) => a.x.value - b.x.value), path = [];
    sorted.forEach((p, i) => {
      if (i) path.push([at.x(p.x.value), at.y(sorted[i - 1].y.value)]);
      path.push([at.x(p.x.value), at.y(p.y.value)]);
    });
    if (sorted.length) path.push([at.right, at.y(sorted.at(-1).y.value)]);
    return path;
  }

  function describe(p) {
    const cost = COSTS[state.x], extra = p.x && finite(p.x.low) ? ` [${cost.text(p.x.low)}, ${cost.text(p.x.high)}]` : "";
    const speed = finite(p.time?.speed_up?.value) ? `\nspeed-up ${full(p.time.speed_up, V.TIMES)}` : "";
    const pair = p.quality?.paired?.[state.y];
    const verdict = pair ? `\nto exact ${full(pair.difference, V.unit(state.y), true)}${pair.verdict === "no margin" ? "" : `, ${pair.verdict}`}` : "";
    return `${p.method.title}${p.method.kind in V.PINNED ? "" : ` (${p.method.subtitle})`}\n${V.title(state.y)} ${full(p.y, V.unit(state.y))}\n${cost.title} ${cost.text(p.x.value)}${extra}${speed}${verdict}`;
  }

  /** Names beside the points that matter, dropped where they would lie on another name or point. */
  function labels(list, marked, at, narrow) {
    const taken = list.map((p) => [at.x(p.x.value) - 7, at.y(p.y.value) - 7, 14, 14]);
    const wanted = [...list].filter((p) => p.on).sort((a, b) => rank(a) - rank(b));
    function rank(p) { return p.method.kind === "plan" ? 0 : p.method.kind === "exact" ? 1 : marked.has(p) ? 2 : p.method.kind === "steps" ? 3 : 4; }
    const out = [];
    for (const p of wanted.slice(0, narrow ? 6 : 18)) {
      const text = p.method.kind === "peer" && p.method.knob ? `${p.method.title} ${p.method.knob.split("=").at(-1)}` : p.method.title;
      const width = text.length * 6.3, x = at.x(p.x.value), y = at.y(p.y.value);
      const spots = [[x + 11, y + 4], [x - width - 11, y + 4], [x - width / 2, y - 13], [x - width / 2, y + 21], [x + 9, y - 9], [x + 9, y + 17]];
      const free = spots.find(([a, b]) => a > at.left + 2 && a + width < at.right + (narrow ? 8 : 98) && b > at.top + 6 && b < at.bottom - 4 && !taken.some(([u, v, w, h]) => a < u + w && a + width > u && b - 10 < v + h && b + 3 > v));
      if (!free) continue;
      taken.push([free[0], free[1] - 10, width, 13]);
      out.push(svg("text", { class: `name ${p.method.kind === "plan" ? "ours" : ""}`, x: free[0], y: free[1] }, text));
    }
    return out;
  }

  V.ticksLinear = ticksLinear;
  V.drawPlot = () => {
    const host = document.getElementById("plot"), from = V.sources(model());
    const available = V.judges().filter((name) => from.quality && data.methods.some((m) => m.model === model().id && finite(V.rowAt(m, from.quality)?.quality?.[name]?.value)));
    const panel = host.closest("section");
    panel.hidden = available.length === 0;
    if (!available.length) return;
    const usable = (key) => data.methods.some((m) => m.model === model().id && finite(COSTS[key].of(V.facts(m, from))?.value));
    const costs = Object.keys(COSTS).filter(usable);
    if (!costs.includes(state.x)) state.x = costs[0];
    if (!available.includes(state.y)) state.y = [state.judge, ...data.shown].find((name) => available.includes(name)) || available[0];
    const redraw = (key) => (value) => { state[key] = value; V.drawPlot(); };
    document.getElementById("plot-picks").replaceChildren(
      pick("Cost", "plot-x", costs.map((key) => [COSTS[key].title, key]), state.x, redraw("x")),
      pick("Quality", "plot-y", available.map((name) => [V.title(name), name]), state.y, redraw("y")));
    const apart = COSTS[state.x].measured && from.time && V.sourceText(from.time) !== V.sourceText(from.quality);
    const where = apart ? `Cost from ${V.sourceText(from.time)}; quality` : "Cost and quality";
    document.getElementById("plot-about").textContent = `${where} from ${V.sourceText(from.quality)}. Boxes are intervals; select a point to open its page.`;

    const list = points(from);
    if (!list.length) {
      host.replaceChildren(el("p", { class: "fine" }, "No contender has both numbers here; choose another cost, quality or machine."));
      return;
    }
    const width = Math.max(300, host.clientWidth), narrow = width < 620;
    const found = V.anchorAt(list[0].quality);
    const bands = ["floor", "seed"].map((kind) => ({ kind, ...(found?.[kind]?.[state.y] || {}) })).filter((b) => finite(b.value));
    const at = scales(list, bands, width, narrow), best = front(list, from), marked = new Set(best);
    const [yTicks, digits] = at.yTicks;
    const ways = { higher: "better \u2192", lower: "\u2190 better", same: "" };
    const clampY = (v) => Math.min(at.bottom, Math.max(at.top, at.y(v)));

    const picture = svg("svg", { class: "scatter", viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "group", "data-plot": "pareto", "aria-label": `${V.title(state.y)} against ${COSTS[state.x].title}, ${list.length} contenders` });
    picture.append(
      ...yTicks.map((v) => svg("g", {}, svg("line", { class: "grid", x1: at.left, x2: at.right, y1: at.y(v), y2: at.y(v) }), svg("text", { class: "tick y", x: at.left - 9, y: at.y(v) }, V.fixed(v, digits)))),
      ...at.xTicks.map((v) => svg("g", {}, svg("line", { class: "grid", x1: at.x(v), x2: at.x(v), y1: at.top, y2: at.bottom }), svg("text", { class: "tick", x: at.x(v), y: at.bottom + 19 }, COSTS[state.x].text(v).replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "")))),
      svg("line", { class: "axis", x1: at.left, x2: at.right, y1: at.bottom, y2: at.bottom }),
      svg("text", { class: "axis-name", x: (at.left + at.right) / 2, y: HEIGHT - 8 }, `${COSTS[state.x].title}, log scale \u2190 cheaper`),
      svg("text", { class: "axis-name", transform: `translate(14 ${(at.top + at.bottom) / 2}) rotate(-90)` }, `${V.title(state.y)}${V.unit(state.y) ? ` (${V.unit(state.y)})` : ""} ${ways[data.series[state.y].better]}`));
    for (const band of bands) {
      if (at.y(band.value) < at.top || at.y(band.value) > at.bottom) continue;
      const [a, b] = [clampY(band.high ?? band.value), clampY(band.low ?? band.value)];
      picture.append(svg("g", { class: `band band-${band.kind}` }, svg("rect", { x: at.left, width: at.right - at.left, y: Math.min(a, b), height: Math.abs(b - a) }), svg("line", { x1: at.left, x2: at.right, y1: at.y(band.value), y2: at.y(band.value) }), svg("text", { x: narrow ? at.left + 5 : at.right + 8, y: at.y(band.value) + (narrow ? -5 : 4) }, V.KINDS[band.kind])));
    }
    const groups = Map.groupBy ? Map.groupBy(list, (p) => p.method.group) : list.reduce((map, p) => map.set(p.method.group, [...(map.get(p.method.group) || []), p]), new Map());
    for (const members of groups.values()) {
      if (members.length < 2) continue;
      const sorted = [...members].sort((a, b) => a.x.value - b.x.value);
      picture.append(svg("path", { class: `knob ${V.familyClass(sorted.find((p) => p.method.kind !== "exact").method)} ${members.some((p) => p.on) ? "" : "off"}`, d: line(sorted.map((p) => [at.x(p.x.value), at.y(p.y.value)])) }));
    }
    if (best.length > 1) picture.append(svg("path", { class: "front", d: line(staircase(best, at)) }));
    for (const p of list) {
      const [x, y] = [at.x(p.x.value), at.y(p.y.value)];
      const box = { x: at.x(p.xs[0]), w: Math.max(1, at.x(p.xs[1]) - at.x(p.xs[0])), y: clampY(p.y.high ?? p.y.value), b: clampY(p.y.low ?? p.y.value) };
      const dot = svg("a", { class: `point ${V.familyClass(p.method)} ${p.on ? "" : "off"} ${marked.has(p) ? "on-front" : ""}`, href: V.route(p.method.id), "data-method": p.method.id, "data-tip": describe(p), "aria-label": describe(p).replaceAll("\n", ", ") },
        svg("rect", { class: "whisker-box", x: box.x - 3, width: box.w + 6, y: box.y, height: Math.max(1, box.b - box.y), rx: 3 }),
        svg("path", { class: "whisker", d: `M${x},${box.y}V${box.b}M${box.x},${y}H${box.x + box.w}` }),
        svg("circle", { class: "halo", cx: x, cy: y, r: 15 }),
        svg("path", { class: "dot", d: V.shape(p.method.kind, 6), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` }));
      picture.append(dot);
    }
    picture.append(...labels(list, marked, at, narrow));
    host.replaceChildren(picture);
    legend(list, best.length > 1);
    notes(from);
  };

  function legend(list, hasFront) {
    const icon = (name, kind) => svg("svg", { class: `mark-icon ${name}`, viewBox: "-9 -9 18 18", "aria-hidden": "true" }, svg("path", { d: V.shape(kind, 5.4) }));
    const families = [...new Set(list.filter((p) => ["plan", "peer"].includes(p.method.kind)).map((p) => p.method.family))];
    const kinds = [...new Set(list.map((p) => p.method.kind))];
    document.getElementById("plot-legend").replaceChildren(
      ...families.map((family) => el("li", {}, svg("svg", { class: `mark-icon ${V.familyClass({ kind: "peer", family })}`, viewBox: "-9 -9 18 18", "aria-hidden": "true" }, svg("rect", { x: -6, y: -6, width: 12, height: 12, rx: 3 })), family || "other")),
      ...kinds.map((kind) => el("li", {}, icon("family-base", kind), V.KINDS[kind])),
      hasFront ? el("li", {}, svg("svg", { viewBox: "0 0 22 12", class: "line-icon", "aria-hidden": "true" }, svg("path", { class: "front", d: "M1,10H8V3H21" })), "front: nobody is cheaper and better") : "");
  }

  const equal = (found) => (found && finite(found.ratio?.value) ? `; ${full(found.ratio, V.TIMES)} cheaper at ${V.number(found.quality)}${V.unitText(V.unit(state.y))}` : "");
  const frontOf = (from) => data.fronts.find((f) => f.cost === state.x && f.series === state.y && (!f.model || f.model === model().name)
    && [from.quality, COSTS[state.x].measured ? from.time : from.quality].every((s) => s && f.task === s.task && f.environment === s.environment));
  function notes(from) {
    const known = frontOf(from);
    const lines = (known?.areas || []).map((area) => el("li", {}, el("b", {}, `${area.a} over ${area.b === "steps" ? "fewer steps" : area.b}: ${full(area, V.unit(state.y), true)}`), area.note ? `, ${area.note}` : "", equal(area.at_equal_quality)));
    document.getElementById("plot-notes").replaceChildren(...(lines.length ? [el("h3", {}, "Mean difference between curves"), el("ul", {}, lines)] : []));
  }
})();
