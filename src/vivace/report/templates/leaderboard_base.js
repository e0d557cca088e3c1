// Elements, numbers in words, the data of the page, and the tooltip.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const MISSING = "\u2013", MINUS = "\u2212", SPACE = "\u00a0", TIMES = "\u00d7";
  const SVG = "http://www.w3.org/2000/svg";
  const finite = (x) => typeof x === "number" && Number.isFinite(x);

  function build(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(3)) if (child !== null && child !== undefined && child !== false && child !== "") node.append(child);
    return node;
  }
  const el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);
  const pick = (label, id, options, value, change, key = label) => options.length < 1 ? null : el("label", { class: "pick" },
    el("span", {}, label),
    el("select", { id, "data-key": key, onchange: (event) => change(event.target.value) },
      options.map(([text, name]) => el("option", { value: name, selected: name === value }, text))));

  // The same rules as leaderboard_values.py and units.py: a browser test holds them together.
  function decimals(value, low, high) {
    const half = finite(low) && finite(high) ? (high - low) / 2 : 0;
    if (half > 0) {
      const power = Math.floor(Math.log10(half));
      return Math.min(6, Math.max(0, (half / 10 ** power < 3 ? 1 : 0) - power));
    }
    if (!value || Number.isInteger(value)) return 0;
    return Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value)))));
  }
  function fixed(value, digits, signed = false) {
    if (value === "inf" || value === Infinity) return "\u221e";
    if (value === "-inf" || value === -Infinity) return `${MINUS}\u221e`;
    if (!finite(value)) return MISSING;
    const text = Math.abs(value).toFixed(digits).replace(/^\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ","));
    if (value < 0 && Number(text.replaceAll(",", "")) !== 0) return MINUS + text;
    return signed && value > 0 ? `+${text}` : text;
  }
  const unitText = (unit) => (unit ? (/^[\p{L}\d]/u.test(unit) ? SPACE + unit : unit) : "");
  const digitsOf = (v) => decimals(finite(v.value) ? v.value : 0, v.low, v.high);
  const number = (x) => fixed(x, finite(x) ? decimals(x) : 0);
  const bare = (v, unit = "", signed = false) =>
    !v || v.value === null || v.value === undefined ? MISSING : finite(v.value) ? fixed(v.value, digitsOf(v), signed) + unitText(unit) : fixed(v.value, 0);
  const missing = (x) => x === null || x === undefined;
  const range = (v, signed = false) =>
    !v || missing(v.low) || missing(v.high) ? "" : `[${fixed(v.low, digitsOf(v), signed)}, ${fixed(v.high, digitsOf(v), signed)}]`;
  const full = (v, unit = "", signed = false) => `${bare(v, unit, signed)} ${range(v, signed)}`.trim();
  const times = (v, by) => v && { ...v, value: v.value * by, ...(finite(v.low) ? { low: v.low * by, high: v.high * by } : {}) };
  function prefixed(value, base, names) {
    let power = 0;
    while (Math.abs(value) >= base && power < names.length - 1) { value /= base; power += 1; }
    return number(value) + SPACE + names[power];
  }
  const bytes = (x) => (finite(x) ? prefixed(x, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]) : MISSING);
  const flops = (x) => (finite(x) ? prefixed(x, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]) : MISSING);
  const seconds = (v) => (!v || !finite(v.value) ? null : v.value < 1 ? [times(v, 1000), "ms"] : v.value < 600 ? [v, "s"] : [times(v, 1 / 60), "min"]);
  const secondsText = (x) => (finite(x) ? ((scaled) => bare(scaled[0], scaled[1]))(seconds({ value: x })) : MISSING);
  const percent = (x) => (finite(x) ? number(Math.round(x * 1e5) / 1e3) + SPACE + "%" : MISSING);
  const p = (x) => (finite(x) ? (x < 0.001 ? "< 0.001" : x < 0.1 ? x.toFixed(3) : x.toFixed(2)) : MISSING);

  // Families keep their colour, kinds their shape, so that neither rests on the other.
  const FAMILIES = ["step distillation", "efficient attention", "model compression", "feature caching", "trajectory", "composite"];
  const familyClass = (method) => {
    if (["exact", "steps", "floor", "seed"].includes(method.kind)) return "family-base";
    const index = FAMILIES.indexOf(method.family);
    return index < 0 ? "family-other" : `family-${index}`;
  };
  const SHAPES = {
    plan: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
    peer: (r) => `M0,${-1.25 * r}L${1.25 * r},0L0,${1.25 * r}L${-1.25 * r},0Z`,
    steps: (r) => `M${-0.9 * r},${-0.9 * r}h${1.8 * r}v${1.8 * r}h${-1.8 * r}Z`,
    exact: (r) => `M0,${-1.4 * r}L${0.41 * r},${-0.45 * r}L${1.33 * r},${-0.43 * r}L${0.66 * r},${0.22 * r}L${0.82 * r},${1.13 * r}L0,${0.66 * r}L${-0.82 * r},${1.13 * r}L${-0.66 * r},${0.22 * r}L${-1.33 * r},${-0.43 * r}L${-0.41 * r},${-0.45 * r}Z`,
  };
  const shape = (kind, r) => (SHAPES[kind] || SHAPES.peer)(r);
  const mark = (method) => svg("svg", { class: `mark-icon ${familyClass(method)}`, viewBox: "-9 -9 18 18", "aria-hidden": "true" }, svg("path", { d: shape(method.kind, 5.4) }));
  const KINDS = { exact: "baseline", plan: "plan of ours", peer: "peer", steps: "fewer steps", floor: "noise floor", seed: "seed ceiling" };

  const VERDICTS = {
    better: ["good", "better"], "non-inferior": ["good", "not inferior"], equivalent: ["good", "equivalent"],
    worse: ["warn", "worse"], inferior: ["bad", "inferior"], undecided: ["", "undecided"],
  };
  function chip(pair, short = false) {
    const known = pair && VERDICTS[pair.verdict];
    if (!known) return null;
    const [tone, text] = known;
    const margin = finite(pair.margin) ? `, margin ${pair.margin}` : "";
    const holm = finite(pair.p_holm) ? `\nHolm p ${p(pair.p_holm)}, ${pair.test || "paired"}` : "";
    const need = finite(pair.needed) ? `\n${Math.ceil(pair.needed)} prompts would be needed for 80 % power` : "";
    return el("span", { class: `verdict-chip ${tone}`, "data-tip": `difference to exact ${full(pair.difference, "", true)}${margin}${holm}${need}`, tabindex: short ? null : "0" }, text);
  }

  // One tooltip for the whole page; it follows the pointer, or stands by what has the focus.
  const tip = document.getElementById("tip");
  function place(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(innerWidth - box.width - 8, Math.max(8, x - box.width / 2));
    const top = y - box.height - 14 > 0 ? y - box.height - 14 : y + 18;
    tip.style.transform = `translate(${left}px, ${top}px)`;
  }
  const hide = () => { tip.hidden = true; };
  document.addEventListener("pointermove", (event) => {
    const owner = event.target.closest?.("[data-tip]");
    if (owner) place(owner.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest?.("[data-plot]")) hide();
  });
  document.addEventListener("focusin", (event) => {
    const owner = event.target.closest?.("[data-tip]");
    if (!owner) return hide();
    if (!owner.matches(":focus-visible")) return;
    const box = owner.getBoundingClientRect();
    place(owner.dataset.tip, box.left + box.width / 2, box.top);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("scroll", hide, { passive: true, capture: true });

  const methods = new Map(data.methods.map((method) => [method.id, method]));
  const models = new Map(data.models.map((model) => [model.id, model]));
  /** The row of a method at a task and an environment. */
  const rowAt = (method, source) => source && method.rows.map((id) => data.rows[id]).find((row) => row.task === source.task && row.environment === source.environment);
  const methodAt = (model, name) => data.methods.find((method) => method.model === model && method.name === name);
  const place_ = (source) => `${source.task} on ${data.environments[source.environment]?.label || source.environment}`;
  const memoryOf = (row) => row?.memory?.peak_allocated ?? row?.memory?.resident ?? null;
  const samplesOf = (() => {
    const cache = new Map();
    return (id) => {
      if (!cache.has(id)) {
        const node = document.getElementById(`samples-${id}`);
        cache.set(id, node ? JSON.parse(node.textContent) : null);
      }
      return cache.get(id);
    };
  })();
  const route = (id) => `#/method/${encodeURIComponent(id)}`;
  /** The fewer-step control of a row in words: "exact, 18 steps", or "8 to 18 steps" where it lies between two runs. */
  const controlTitle = (row) => {
    const name = row.matched.contender, found = methodAt(methods_(row).model, name);
    if (found) return found.title;
    const steps = name.split(" .. ").map((part) => (part.startsWith("steps=") ? part.slice(6) : (part === "exact" && data.tasks[row.task]?.steps) || part));
    return steps.length === 2 ? `exact, ${steps.join(" to ")} steps` : name;
  };
  const owners = new Map(data.methods.flatMap((method) => method.rows.map((id) => [id, method])));
  const methods_ = (row) => owners.get(row.id);
  const anchorAt = (row) => data.anchors.find((a) => a.task === row.task && a.environment === row.environment && (!a.model || a.model === models.get(methods_(row).model).name));
  const title = (name) => data.series[name]?.title || name;
  const unit = (name) => data.series[name]?.unit || "";
  const arrow = (name) => ({ higher: "\u2191", lower: "\u2193" })[data.series[name]?.better] || "=";
  const about = (name) => {
    const s = data.series[name];
    if (!s) return name;
    const way = { higher: "Higher is better.", lower: "Lower is better.", same: "Nearer to the exact run is better." }[s.better];
    const blind = s.blind_to?.length ? `\nBlind to: ${s.blind_to.join(", ")}.` : "";
    return `${s.title}${s.unit ? ` (${s.unit})` : ""}: ${s.about} ${way}${finite(s.margin) ? ` Margin ${s.margin}.` : ""}${blind}`;
  };

  Object.assign(V, {
    data, el, svg, pick, finite, decimals, fixed, number, bare, range, full, times, bytes, flops, seconds, secondsText, percent, p, unitText,
    FAMILIES, KINDS, familyClass, shape, mark, chip, tip: { place, hide }, methods, models, rowAt, methodAt, sourceText: place_, memoryOf, samplesOf,
    ownerOf: methods_, controlTitle, anchorAt, missing, route, title, unit, arrow, about, MISSING, TIMES, SPACE,
  });
})();
