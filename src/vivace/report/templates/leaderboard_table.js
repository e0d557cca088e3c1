// The leaderboard: a table for each model, sorted and filtered together.
(() => {
  const { data, el, pick, finite, bare, range, seconds, bytes, flops, percent, chip, KINDS } = V;
  const PINNED = { exact: 0, floor: 1, seed: 2 };
  const primary = data.models[0];
  const ordered = [...data.shown, ...Object.keys(data.series).filter((name) => !data.shown.includes(name))];
  const judges = () => ordered.filter((name) => data.methods.some((m) => m.rows.some((id) => data.rows[id].quality?.[name])));
  const withMargin = judges().filter((name) => finite(data.series[name].margin) && data.series[name].group !== "fidelity");
  const state = V.state = {
    model: primary.id, task: "", hardware: "", family: "", kind: "", text: "",
    judge: data.shown.find((name) => withMargin.includes(name)) || withMargin[0] || data.shown[0] || "",
    columns: new Set(data.shown), sort: "speed_up", down: true, x: "", y: "",
  };

  const source = (list, task, hardware) => list.find((s) => (!task || s.task === task) && (!hardware || s.environment === hardware)) || null;
  /** Where the columns of a model come from under the filters: the wished place, else the usual one. */
  V.sources = (model) => ({
    quality: source(model.quality, state.task, state.hardware) || source(model.quality, state.task, "") || model.quality[0] || null,
    time: source(model.time, state.task, state.hardware) || source(model.time, "", state.hardware) || (state.hardware ? null : model.time[0] || null),
  });
  V.shownModels = () => data.models.filter((model) => !state.model || model.id === state.model);

  /** Everything the table and the plot say about a method, from its two rows. */
  V.facts = (method, from) => {
    const quality = V.rowAt(method, from.quality), time = V.rowAt(method, from.time);
    const counted = quality?.counts?.flops ? quality : time || quality;
    return { method, quality, time, counted };
  };
  V.fits = (facts) => {
    const { method, time, quality } = facts;
    if (!quality && !time) return false;
    if (method.kind in PINNED) return true;
    if (state.hardware && !method.rows.some((id) => data.rows[id].environment === state.hardware)) return false;
    if (state.family && method.family !== state.family) return false;
    if (state.kind && method.kind !== state.kind) return false;
    const hay = [method.name, method.title, method.subtitle, method.family, KINDS[method.kind], ...method.techniques].join(" ").toLowerCase();
    return state.text.toLowerCase().split(/\s+/).every((word) => hay.includes(word));
  };

  function measured(v, unit, extra, signed = false) {
    if (!v || v.value === null || v.value === undefined) return el("td", { class: "none" }, V.MISSING);
    return el("td", {}, el("span", { class: "main" }, bare(v, unit, signed)), range(v, signed) && el("span", { class: "interval" }, range(v, signed)), extra);
  }
  const plain = (text, small, tip) => el("td", { class: text === V.MISSING ? "none" : null, "data-tip": tip }, el("span", { class: "main" }, text), small && el("span", { class: "interval" }, small));

  function secondsCell(facts) {
    const cost = facts.time?.cost, scaled = seconds(cost?.total);
    if (!scaled) return el("td", { class: "none" }, V.MISSING);
    const cell = measured(...scaled);
    const stages = Object.entries(cost).filter(([name, v]) => name !== "total" && v).map(([name, v]) => `${name} ${V.secondsText(v.value)}`);
    const batch = facts.time.timing?.batch > 1 ? `one call makes ${facts.time.timing.batch} clips\n` : "";
    cell.dataset.tip = `${batch}${stages.join("\n")}`;
    return cell;
  }
  function matchedCell(facts) {
    const matched = facts.quality?.matched, pair = matched?.paired?.[state.judge];
    if (!pair) return el("td", { class: "none" }, facts.method.kind === "steps" ? "is the control" : V.MISSING);
    const tone = pair.verdict === "better" ? "good" : ["worse", "inferior"].includes(pair.verdict) ? "bad" : "";
    return el("td", {}, el("span", { class: `main ${tone}` }, bare(pair.difference, V.unit(state.judge), true)),
      el("span", { class: "interval" }, range(pair.difference, true)),
      el("span", { class: "interval against", "data-tip": matched.note || null }, `against ${V.controlTitle(facts.quality)}`));
  }
  function qualityCell(name) {
    return (facts) => {
      const v = facts.quality?.quality?.[name] || anchor(facts, name);
      if (!v && facts.method.kind === "exact") return el("td", { class: "none" }, "reference");
      const cell = measured(v, "", chip(facts.quality?.paired?.[name], true));
      const notes = [v?.left_out ? `${v.left_out} prompt${v.left_out === 1 ? "" : "s"} left out (infinite or undefined)` : "", finite(v?.median) ? `median ${bare({ value: v.median })}` : "", finite(v?.worst) ? `worst ${bare({ value: v.worst })}` : ""].filter(Boolean);
      if (v && notes.length) cell.firstChild.dataset.tip = notes.join("\n");
      if (!v && facts.quality?.skipped?.[data.series[name].metric]) cell.dataset.tip = facts.quality.skipped[data.series[name].metric];
      return cell;
    };
  }
  function anchor(facts, name) {
    if (!["floor", "seed"].includes(facts.method.kind) || !facts.quality) return null;
    return V.anchorAt(facts.quality)?.[facts.method.kind]?.[name] || null;
  }

  const number = (v) => (v === "inf" ? Infinity : finite(v) ? v : null);
  function columns(from) {
    const counted = from.quality || from.time;
    const group = { counted: ["Counted", counted?.task], time: ["Measured time", from.time && V.sourceText(from.time)], quality: ["Quality", from.quality && V.sourceText(from.quality)] };
    const judged = state.judge && from.quality;
    return [
      { key: "method", head: "Method", value: (f) => f.method.title.toLowerCase(), text: true },
      { key: "speed_up", head: "Speed-up", group: group.time, tip: "Ratio of medians to the exact run on the same machine and task.", value: (f) => number(f.time?.speed_up?.value), cell: (f) => (f.method.kind === "exact" && f.time ? plain(`1${V.TIMES}`) : measured(f.time?.speed_up, V.TIMES)) },
      { key: "seconds", head: "Seconds", group: group.time, tip: "Median of the warm runs, all stages; quartiles of the stages in the method's page.", up: true, value: (f) => number(f.time?.cost?.total?.value), cell: secondsCell },
      { key: "memory", head: "Peak memory", group: group.time, up: true, value: (f) => V.memoryOf(f.time), cell: (f) => plain(bytes(V.memoryOf(f.time)), "", f.time?.memory?.peak_allocated ? "peak allocated on the device" : "peak resident set of the process") },
      { key: "nfe", head: "NFE", group: group.counted, tip: "Network evaluations that were really made.", up: true, value: (f) => number(f.counted?.counts?.nfe), cell: (f) => plain(V.number(f.counted?.counts?.nfe)) },
      { key: "work", head: "Work", group: group.counted, tip: "FLOPs over the FLOPs of the exact run.", up: true, value: (f) => number(f.counted?.work_share?.value), cell: (f) => plain(percent(f.counted?.work_share?.value), flops(f.counted?.counts?.flops)) },
      ...judges().filter((name) => state.columns.has(name) && from.quality).map((name) => ({
        key: `quality.${name}`, head: `${V.title(name)}${V.unit(name) ? `, ${V.unit(name)}` : ""} ${V.arrow(name)}`, group: group.quality, tip: V.about(name), up: data.series[name].better === "lower",
        value: (f) => number(f.quality?.quality?.[name]?.value), cell: qualityCell(name),
      })),
      judged && { key: "matched", head: `${V.title(state.judge)} at equal FLOPs`, group: ["Against fewer steps", ""], tip: `Paired difference of ${V.title(state.judge)} to the exact run with as many steps as cost the same FLOPs.`, up: data.series[state.judge].better === "lower", value: (f) => number(f.quality?.matched?.paired?.[state.judge]?.difference?.value), cell: matchedCell },
    ].filter(Boolean);
  }

  function compare(column) {
    const sign = state.down ? -1 : 1;
    return (a, b) => {
      const x = column.value(a), y = column.value(b);
      if (x === y) return 0;
      if (x === null || x === undefined) return 1; // what was not measured stays below, whichever way
      if (y === null || y === undefined) return -1;
      return x < y ? -sign : sign;
    };
  }

  function headRow(columns_) {
    return el("tr", {}, columns_.map((column) => {
      const sorted = state.sort === column.key;
      return el("th", { scope: "col", "data-key": column.key, "aria-sort": sorted ? (state.down ? "descending" : "ascending") : "none" },
        el("button", { type: "button", "data-tip": column.tip, onclick: () => sortBy(column) }, column.head, el("span", { class: "sort", "aria-hidden": "true" }, sorted ? (state.down ? "\u25be" : "\u25b4") : "\u25b4\u25be")));
    }));
  }
  function groupRow(columns_) {
    const cells = [];
    for (const column of columns_) {
      const name = column.group?.[0] || "";
      if (cells.length && cells.at(-1).name === name) cells.at(-1).span += 1;
      else cells.push({ name, about: column.group?.[1], span: 1 });
    }
    return el("tr", { class: "groups" }, cells.map((cell) => cell.name ? el("th", { scope: "colgroup", colspan: cell.span }, el("b", {}, cell.name), cell.about && el("span", {}, cell.about)) : el("td", { colspan: cell.span })));
  }
  function sortBy(column) {
    if (state.sort === column.key) state.down = !state.down;
    else Object.assign(state, { sort: column.key, down: !(column.up || column.text) });
    V.update();
    document.querySelector(`th[data-key="${CSS.escape(column.key)}"] button`)?.focus();
  }

  function methodCell(facts) {
    const { method } = facts;
    const badges = { plan: ["ours", "badge ours"], exact: ["baseline", "badge"], steps: ["control", "badge"] };
    const badge = badges[method.kind] && el("span", { class: badges[method.kind][1] }, badges[method.kind][0]);
    const small = method.kind === "plan" ? [method.knob, method.techniques.join(" + ").replaceAll("_", " ") || method.subtitle].filter(Boolean).join(", ") : method.subtitle;
    return el("th", { scope: "row" }, el("div", { class: "who", "data-tip": method.kind in PINNED || !method.family ? null : method.family }, V.mark(method), el("div", {}, el("a", { href: V.route(method.id) }, method.title), badge,
      method.notes.length > 0 && el("span", { class: "badge note", "data-tip": method.notes.join("\n"), tabindex: "0" }, "note"), el("span", { class: "interval" }, small))));
  }

  function table(model) {
    const from = V.sources(model), list = columns(from);
    const all = data.methods.filter((m) => m.model === model.id).map((m) => V.facts(m, from)).filter(V.fits);
    const column = list.find((c) => c.key === state.sort) || list[1];
    const pinned = all.filter((f) => f.method.kind in PINNED).sort((a, b) => PINNED[a.method.kind] - PINNED[b.method.kind]);
    const rows = all.filter((f) => !(f.method.kind in PINNED)).sort(compare(column));
    const body = (facts, extra) => el("tr", { class: `${extra} kind-${facts.method.kind}`, "data-method": facts.method.id }, methodCell(facts), list.slice(1).map((c) => c.cell(facts)));
    return { count: rows.length, node: el("section", { class: "board", "data-model": model.name },
      data.models.length > 1 && el("h3", {}, model.label, " ", el("span", { class: "aside" }, model.dtypes.join(" and "))),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Leaderboard of ${model.label}` },
        el("table", { class: "leaderboard" }, el("thead", {}, groupRow(list), headRow(list)),
          el("tbody", { class: "pins" }, pinned.map((f) => body(f, "pinned"))), el("tbody", {}, rows.map((f) => body(f, "")))))) };
  }

  V.drawTable = () => {
    const made = V.shownModels().map(table);
    document.getElementById("tables").replaceChildren(...made.map((m) => m.node));
    const count = made.reduce((sum, m) => sum + m.count, 0);
    document.getElementById("no-rows").hidden = count > 0;
    document.getElementById("table-about").textContent = `${count} contender${count === 1 ? "" : "s"}. Click a heading to sort, a name for its page. The exact run and the anchors stay on top.`;
  };

  const options = (values, all) => [[all, ""], ...values.map((v) => (Array.isArray(v) ? v : [v, v]))];
  const unique = (values) => [...new Set(values.filter(Boolean))];
  V.drawToolbar = () => {
    const set = (key) => (value) => { state[key] = value; V.update(); };
    const families = unique(data.methods.filter((m) => !(m.kind in PINNED)).map((m) => m.family));
    const kinds = unique(data.methods.filter((m) => !(m.kind in PINNED)).map((m) => m.kind));
    const tasks = unique(data.models.flatMap((m) => m.quality.map((s) => s.task)));
    const machines = Object.entries(data.environments).map(([id, e]) => [e.label, id]);
    const bar = document.getElementById("toolbar");
    bar.addEventListener("submit", (event) => event.preventDefault());
    bar.replaceChildren(...[
      el("label", { class: "pick search" }, el("span", {}, "Search"), el("input", { type: "search", id: "text", placeholder: "name, package, technique", oninput: (event) => set("text")(event.target.value.trim()) })),
      data.models.length > 1 && pick("Model", "model", [...data.models.map((m) => [m.label, m.id]), ["all models", ""]], state.model, set("model")),
      tasks.length > 1 && pick("Quality on", "task", options(tasks, "main task"), state.task, set("task")),
      machines.length > 1 && pick("Hardware", "hardware", options(machines, "all"), state.hardware, set("hardware")),
      families.length > 1 && pick("Family", "family", options(families, "all"), state.family, set("family")),
      kinds.length > 1 && pick("Kind", "kind", options(kinds.map((k) => [KINDS[k], k]), "all"), state.kind, set("kind")),
      withMargin.length > 1 && pick("Judge by", "judge", withMargin.map((n) => [V.title(n), n]), state.judge, set("judge")),
    ].filter(Boolean));
    document.getElementById("clear").addEventListener("click", () => {
      Object.assign(state, { hardware: "", family: "", kind: "", text: "" });
      for (const id of ["hardware", "family", "kind", "text"]) { const node = document.getElementById(id); if (node) node.value = ""; }
      V.update();
    });
    const groups = { fidelity: "Fidelity to exact", absolute: "Absolute", distribution: "Distribution" };
    document.getElementById("columns").replaceChildren(...Object.entries(groups).map(([group, words]) => {
      const names = judges().filter((name) => data.series[name].group === group);
      return names.length > 0 && el("fieldset", {}, el("legend", {}, words), names.map((name) => el("label", { "data-tip": V.about(name) },
        el("input", { type: "checkbox", value: name, checked: state.columns.has(name), onchange: (event) => { state.columns[event.target.checked ? "add" : "delete"](name); V.update(); } }), V.title(name))));
    }).filter(Boolean));
  };
  Object.assign(V, { PINNED, judges });
})();
