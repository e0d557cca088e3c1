// One method's page: what it is, what it costs, how its clips look and measure, prompt by prompt.
(() => {
  const { data, el, svg, pick, finite, bare, range, full, chip, state } = V;
  const GROUPS = { fidelity: ["Fidelity", "is it the clip the exact run would have made?"], absolute: ["Absolute quality", "is it a good clip of its prompt?"], distribution: ["Distribution", "do all clips together look like the exact run's?"] };
  let player = null, current = null;

  const exactAt = (row) => Object.values(data.rows).find((r) => r.task === row.task && r.environment === row.environment && ownerOf(r).kind === "exact" && ownerOf(r).model === ownerOf(row).model);
  const { ownerOf } = V;
  const panel = (title, id, ...children) => el("section", { class: "panel", id, "aria-label": title }, el("h2", {}, title), children);
  const list = (pairs) => el("dl", { class: "environment" }, pairs.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))));

  function lead(method, facts) {
    const parts = [], speed = facts.time?.speed_up, share = facts.counted?.work_share;
    if (method.kind === "exact") return "The run that everything else is measured against.";
    if (method.kind === "floor") return "The exact run again with another kernel: how far two runs of the same arithmetic differ.";
    if (method.kind === "seed") return "The exact run with other noise: how far two good clips of one prompt differ.";
    if (finite(speed?.value)) parts.push(`${bare(speed.value >= 1 ? speed : { value: 1 / speed.value }, V.TIMES)} ${speed.value >= 1 ? "faster" : "slower"} than the exact run`);
    if (finite(share?.value)) parts.push(`${V.percent(share.value)} of its FLOPs`);
    const pair = facts.quality?.paired?.[state.judge];
    const said = pair && { better: "better than exact", "non-inferior": "not inferior", equivalent: "equivalent", worse: "worse, and a loss beyond the margin is not ruled out", inferior: "inferior", undecided: "undecided" }[pair.verdict];
    const verdict = said ? ` ${V.title(state.judge)}: ${said}.` : "";
    return parts.length ? `${parts.join(", with ")}.${verdict}` : `Measured beside the exact run.${verdict}`;
  }

  function cards(method, facts) {
    const made = [];
    const add = (label, value, note, extra) => made.push(el("div", { class: `card ${made.length ? "" : "lead"}` }, el("p", { class: "label" }, label), el("p", { class: "value" }, value), el("p", { class: "note" }, note, extra)));
    if (finite(facts.time?.speed_up?.value)) add("Speed-up", bare(facts.time.speed_up, V.TIMES), `${range(facts.time.speed_up)} ${V.sourceText(facts.time)}`);
    if (facts.counted?.counts?.nfe) add("NFE", V.number(facts.counted.counts.nfe), `network evaluations, ${V.number(facts.counted.counts.full_equivalents)} full ones in FLOPs`);
    if (finite(facts.counted?.work_share?.value)) add("Work", V.percent(facts.counted.work_share.value), `${V.flops(facts.counted.counts.flops)} a clip`);
    const quality = facts.quality?.quality || {};
    for (const name of data.shown.filter((n) => quality[n]).slice(0, 3)) {
      const pair = facts.quality.paired?.[name];
      add(V.title(name), bare(quality[name], V.unit(name)), `${range(quality[name])} `, chip(pair));
    }
    return made.length ? el("section", { class: "cards", "aria-label": "Headline numbers" }, made) : null;
  }

  function costs(method) {
    const rows = method.rows.map((id) => data.rows[id]);
    const timed = rows.filter((r) => r.cost?.total);
    const stageText = (row, name) => { const v = row.cost?.[name], s = V.seconds(v); return s ? [bare(...s), finite(v.q1) ? `quartiles ${V.secondsText(v.q1)}, ${V.secondsText(v.q3)}` : range(s[0])] : null; };
    const count = (row, key, text = V.number) => (finite(row.counts?.[key]) ? [text(row.counts[key])] : null);
    const lines = [
      ["Network evaluations", (r) => count(r, "nfe")], ["Full evaluations by FLOPs", (r) => count(r, "full_equivalents")], ["Blocks run", (r) => finite(r.counts?.blocks_run) && [V.number(r.counts.blocks_run), `of ${V.number(r.counts.blocks_total)}`]],
      ["Attention pairs", (r) => finite(r.counts?.attention_pairs) && [V.number(r.counts.attention_pairs), finite(r.counts.attention_pairs_dense) ? `of ${V.number(r.counts.attention_pairs_dense)}` : ""]],
      ["Cache hits", (r) => count(r, "cache_hits")], ["FLOPs", (r) => count(r, "flops", V.flops)], ["Share of the exact run's FLOPs", (r) => r.work_share && [V.percent(r.work_share.value), range(r.work_share)]],
      ["Seconds, all stages", (r) => stageText(r, "total")], ["Text encoder", (r) => stageText(r, "text")], ["Denoising", (r) => stageText(r, "denoise")], ["Decoder", (r) => stageText(r, "vae")], ["Other", (r) => stageText(r, "other")],
      ["Speed-up", (r) => r.speed_up && [bare(r.speed_up, V.TIMES), range(r.speed_up)]], ["First call", (r) => finite(r.timing?.cold) && [V.secondsText(r.timing.cold), finite(r.timing.compile_seconds) ? `${V.secondsText(r.timing.compile_seconds)} to compile` : "nothing compiled"]],
      ["Timed runs", (r) => r.timing && [`${r.cost?.total?.n ?? V.MISSING}`, `${r.timing.warmups} warm-ups, batch ${r.timing.batch}, ${r.timing.clock}`]],
      ["Peak memory", (r) => V.memoryOf(r) && [V.bytes(V.memoryOf(r)), r.memory.peak_allocated ? "allocated on the device" : "resident set"]], ["Cache memory", (r) => finite(r.memory?.cache) && [V.bytes(r.memory.cache)]], ["Energy", (r) => finite(r.energy?.net) && [`${V.number(r.energy.net)}${V.SPACE}J`, `net of ${V.number(r.energy.idle_watts)}${V.SPACE}W idle`]],
    ];
    const body = lines.map(([name, of]) => [name, rows.map((r) => of(r) || null)]).filter(([, cells]) => cells.some(Boolean));
    const shortfalls = rows.filter((r) => r.timing?.shortfall).map((r) => el("li", {}, `${V.sourceText(r)}: ${r.timing.shortfall}.`));
    return panel("Cost", "cost", bars(timed),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Cost" }, el("table", { class: "facts-table" },
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Counts of one clip, seconds of one call"), rows.map((r) => el("th", { scope: "col" }, el("b", {}, r.task), el("span", { class: "interval" }, `${data.environments[r.environment]?.label || r.environment}${r.dtype ? `, ${r.dtype}` : ""}`))))),
        el("tbody", {}, body.map(([name, cells]) => el("tr", {}, el("th", { scope: "row" }, name), cells.map((c) => (c ? el("td", {}, el("span", { class: "main" }, c[0]), c[1] && el("span", { class: "interval" }, c[1])) : el("td", { class: "none" }, V.MISSING)))))))),
      shortfalls.length > 0 && el("ul", { class: "fine" }, shortfalls));
  }
  /** Stages as bars, the exact run above the method; each place has its own scale. */
  function bars(rows) {
    const STAGES = [["text", "Text"], ["denoise", "Denoising"], ["vae", "Decoder"], ["other", "Other"]];
    const made = rows.flatMap((row) => {
      const exact = exactAt(row), longest = Math.max(exact?.cost?.total?.value || 0, row.cost.total.value);
      const bar = (r, name) => [el("span", { class: "bar-name" }, name), el("div", { class: "bar" }, STAGES.filter(([s]) => r.cost[s]?.value).map(([s, words]) => el("span", { class: `stage-${s}`, style: `width:${(100 * r.cost[s].value) / longest}%`, "data-tip": `${words} ${V.secondsText(r.cost[s].value)}` })))];
      return [el("p", { class: "bar-title" }, V.sourceText(row)), ...(exact?.cost?.total && exact.id !== row.id ? bar(exact, "Exact") : []), ...bar(row, ownerOf(row).title)];
    });
    return made.length ? [el("div", { class: "bars" }, made), el("ul", { class: "legend" }, STAGES.map(([s, words]) => el("li", {}, el("span", { class: `swatch stage-${s}` }), words)))] : null;
  }

  function quality(row) {
    const exact = exactAt(row), control = row.matched;
    const names = Object.keys(data.series).filter((n) => row.quality?.[n]);
    const isExact = exact?.id === row.id;
    const head = ["Series", ownerOf(row).title, ...(isExact ? [] : ["Exact", "Difference to exact", "Verdict", "Holm p", "Normalised"]), ...(control ? [`Against ${V.controlTitle(row)}`] : [])];
    const cell = (v, unit, signed) => (v && v.value !== null && v.value !== undefined ? el("td", {}, el("span", { class: "main" }, bare(v, unit, signed)), el("span", { class: "interval" }, range(v, signed))) : el("td", { class: "none" }, V.MISSING));
    const scale = (v) => finite(v?.value) ? el("td", {}, el("span", { class: "main" }, bare(v)), el("span", { class: "gauge", "aria-hidden": "true" }, el("span", { style: `width:${Math.min(100, Math.max(0, v.value * 100))}%` }))) : el("td", { class: "none" }, V.MISSING);
    const line = (name) => {
      const pair = row.paired?.[name], against = control?.paired?.[name], v = row.quality[name];
      return el("tr", {}, el("th", { scope: "row", "data-tip": V.about(name) }, `${V.title(name)} ${V.arrow(name)}`, v.left_out ? el("span", { class: "interval" }, `${v.left_out} left out`) : null), cell(v, V.unit(name)),
        !isExact && [cell(exact?.quality?.[name], V.unit(name)), cell(pair?.difference, V.unit(name), true), el("td", {}, chip(pair) || el("span", { class: "none" }, pair ? "no margin" : V.MISSING)), el("td", {}, V.p(pair?.p_holm)), scale(row.normalised?.[name])],
        control && cell(against?.difference, V.unit(name), true));
    };
    const skipped = Object.entries(row.skipped || {});
    return [
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Quality" }, el("table", { class: "facts-table quality" }, el("thead", {}, el("tr", {}, head.map((h) => el("th", { scope: "col" }, h)))),
        Object.entries(GROUPS).map(([group, [title, question]]) => { const inside = names.filter((n) => data.series[n].group === group); return inside.length > 0 && el("tbody", {}, el("tr", { class: "group" }, el("th", { colspan: head.length, scope: "rowgroup" }, el("b", {}, title), ` ${question}`)), inside.map(line)); }))),
      skipped.length > 0 && el("details", {}, el("summary", {}, `Not measured: ${skipped.map(([n]) => n).join(", ")}`), el("ul", { class: "fine" }, skipped.map(([n, why]) => el("li", {}, el("b", {}, n), `: ${why}`)))),
    ];
  }

  // Prompt by prompt.
  function byKey(samples, name) {
    const column = samples?.columns?.[name];
    return column ? new Map(samples.keys.map((key, i) => [key, column[i]])) : null;
  }
  function rivals(row, name) {
    const same = Object.values(data.rows).filter((r) => r.id !== row.id && r.task === row.task && r.environment === row.environment && r.has_samples && ownerOf(r).model === ownerOf(row).model);
    const order = (r) => { const m = ownerOf(r); return m.kind === "exact" ? 0 : m.name === row.matched?.contender ? 1 : m.kind === "seed" ? 2 : m.kind === "floor" ? 3 : m.kind === "steps" ? 4 : 5; };
    return same.filter((r) => V.samplesOf(r.id)?.columns?.[name]).sort((a, b) => order(a) - order(b));
  }

  function prompts(row) {
    const samples = V.samplesOf(row.id);
    if (!samples) return null;
    const names = Object.keys(data.series).filter((n) => samples.columns[n]?.some(finite));
    if (!names.length) return null;
    const choice = { series: names.includes(state.judge) ? state.judge : names[0], against: "" };
    const picks = el("div", { class: "picks" }), plot = el("div", { class: "pareto small" }), table = el("div", { class: "scroll worst", tabindex: "0", role: "region", "aria-label": "Worst prompts" });
    const about = el("p", { class: "lede" });
    function draw() {
      const others = rivals(row, choice.series);
      const other = others.find((r) => r.id === choice.against) || others[0] || null;
      choice.against = other?.id || "";
      picks.replaceChildren(...[
        pick("Series", "prompt-series", names.map((n) => [V.title(n), n]), choice.series, (v) => { choice.series = v; choice.against = ""; draw(); }),
        others.length > 0 && pick("Against", "prompt-against", others.map((r) => [ownerOf(r).title + (ownerOf(r).knob && ownerOf(r).kind === "peer" ? `, ${ownerOf(r).knob}` : ""), r.id]), choice.against, (v) => { choice.against = v; draw(); }),
      ].filter(Boolean));
      const mine = byKey(samples, choice.series), theirs = other && byKey(V.samplesOf(other.id), choice.series);
      const better = data.series[choice.series].better;
      const dots = samples.keys.map((key, i) => ({ key, prompt: samples.prompts[i], y: mine.get(key), x: theirs?.get(key) })).filter((d) => finite(d.y) && (!theirs || finite(d.x)));
      for (const d of dots) d.loss = better === "same" ? Math.abs(d.y - (theirs ? d.x : d.y)) : (theirs ? d.x - d.y : -d.y) * (better === "lower" ? -1 : 1);
      // Fidelity is itself a distance to exact, so its worst prompts are the worst values, not the worst differences.
      const plain = data.series[choice.series].group === "fidelity";
      if (plain) for (const d of dots) d.loss = d.y * (better === "lower" ? 1 : -1);
      const sorted = [...dots].sort((a, b) => b.loss - a.loss);
      const wins = theirs && better !== "same" ? dots.filter((d) => (better === "lower" ? d.y < d.x : d.y > d.x)).length : null;
      const name = other && ownerOf(other).title;
      about.textContent = `${dots.length} prompt${dots.length === 1 ? "" : "s"}, each the mean of its clips.${wins === null ? "" : ` ${ownerOf(row).title} is better than ${name} on ${wins}, equal on ${dots.filter((d) => d.x === d.y).length}.`}`;
      plot.replaceChildren(scatter(dots, row, name, choice.series, Math.max(280, plot.clientWidth || 460)));
      table.replaceChildren(worst(sorted.slice(0, 12), row, name, choice.series, plain));
    }
    const node = panel("Prompt by prompt", "prompts", el("div", { class: "heading" }, about, picks), el("div", { class: "split" }, plot, el("div", {}, el("h3", {}, "Worst prompts first"), table)));
    return { node, draw };
  }

  function scatter(dots, row, name, series, width) {
    const size = Math.min(width, 520), left = 56, right = 14, top = 12, bottom = 48, inner = [size - left - right, size - top - bottom];
    const all = dots.flatMap((d) => (name ? [d.x, d.y] : [d.y]));
    let low = Math.min(...all), high = Math.max(...all);
    const pad = (high - low || Math.abs(high) || 1) * 0.07;
    [low, high] = [low - pad, high + pad];
    const [ticks, digits] = V.ticksLinear(low, high, 5);
    const place = new Map([...dots].sort((a, b) => a.y - b.y).map((d, i) => [d.key, dots.length > 1 ? i / (dots.length - 1) : 0.5]));
    const x = (d) => left + inner[0] * (name ? (d.x - low) / (high - low) : place.get(d.key)), y = (v) => top + inner[1] * (1 - (v - low) / (high - low));
    // Equal values would hide each other: those of one place are laid out as the seeds of a sunflower.
    const met = new Map();
    for (const d of dots) {
      const at = `${d.x} ${d.y}`, index = met.get(at) || 0;
      met.set(at, index + 1);
      [d.dx, d.dy] = [Math.cos(2.4 * index) * 4.6 * Math.sqrt(index), Math.sin(2.4 * index) * 4.6 * Math.sqrt(index)];
    }
    return svg("svg", { class: "scatter", viewBox: `0 0 ${size} ${size}`, width: size, height: size, role: "group", "data-plot": "prompts", "aria-label": `${V.title(series)} by prompt` },
      ticks.map((v) => svg("g", {}, svg("line", { class: "grid", x1: left, x2: size - right, y1: y(v), y2: y(v) }), svg("text", { class: "tick y", x: left - 8, y: y(v) }, V.fixed(v, digits)), name && svg("text", { class: "tick", x: left + inner[0] * (v - low) / (high - low), y: size - bottom + 18 }, V.fixed(v, digits)))),
      name && svg("line", { class: "equal-line", x1: left, y1: size - bottom, x2: size - right, y2: top }),
      svg("line", { class: "axis", x1: left, x2: size - right, y1: size - bottom, y2: size - bottom }),
      svg("text", { class: "axis-name", x: left + inner[0] / 2, y: size - 8 }, name ? `${name}: ${V.title(series)}` : "prompts, sorted"),
      svg("text", { class: "axis-name", transform: `translate(13 ${top + inner[1] / 2}) rotate(-90)` }, ownerOf(row).title),
      dots.map((d) => { const clip = clipOf(row, d.key); return svg("circle", { class: `prompt-dot ${V.familyClass(ownerOf(row))} ${clip ? "has-clip" : ""}`, "data-key": d.key, r: clip ? 5.4 : 4, cx: x(d) + (name ? d.dx : 0), cy: y(d.y) + (name ? d.dy : 0), "data-tip": `${d.prompt}\n${ownerOf(row).title} ${V.number(d.y)}${V.unitText(V.unit(series))}${name ? `\n${name} ${V.number(d.x)}${V.unitText(V.unit(series))}` : ""}${clip ? "\nclick to play" : ""}`, onclick: clip ? () => jump(row, clip) : null }); }));
  }

  function worst(dots, row, name, series, plain) {
    const unit = V.unit(series), task = data.tasks[row.task], value = (v) => `${V.number(v)}${V.unitText(unit)}`;
    const any = dots.some((d) => clipOf(row, d.key));
    return el("table", { class: "facts-table" }, el("thead", {}, el("tr", {}, el("th", { class: "prompt" }, "Prompt"), any && el("th", { "aria-label": "Clip" }), el("th", {}, ownerOf(row).title), name && el("th", {}, name), name && !plain && el("th", {}, "Difference"))),
      el("tbody", {}, dots.map((d) => {
        const clip = clipOf(row, d.key);
        return el("tr", { "data-key": d.key }, el("th", { scope: "row", class: "prompt" }, d.prompt), any && el("td", {}, clip && el("button", { type: "button", class: "thumb-button", "aria-label": `Play: ${d.prompt}`, onclick: () => jump(row, clip) }, V.thumbnail(row.clips[clip], task))),
          el("td", {}, value(d.y)), name && el("td", {}, value(d.x)), name && !plain && el("td", {}, V.fixed(d.y - d.x, V.decimals(d.y - d.x), true)));
      })));
  }

  // Clips.
  const exactClip = (row, sample) => exactAt(row)?.clips?.[sample] ?? Object.values(data.rows).find((r) => r.task === row.task && ownerOf(r).kind === "exact" && ownerOf(r).model === ownerOf(row).model && r.clips[sample] !== undefined)?.clips[sample];
  const clipOf = (row, key) => Object.keys(row.clips).find((sample) => sample.split(".")[0] === key && exactClip(row, sample) !== undefined);
  function jump(row, sample) {
    current?.choose(row, sample);
    document.querySelector("#method .stage")?.scrollIntoView({ block: "center" });
    document.querySelector("#method .stage .primary")?.focus({ preventScroll: true });
  }
  function clips(method) {
    const shown = method.rows.map((id) => data.rows[id]).flatMap((row) => Object.keys(row.clips).filter((sample) => exactClip(row, sample) !== undefined).map((sample) => ({ row, sample })));
    if (!shown.length) return null;
    player = V.player(data.tasks[shown[0].row.task], method.title);
    const text = (entry) => { const s = V.samplesOf(entry.row.id), at = s ? s.keys.indexOf(entry.sample.split(".")[0]) : -1; return at < 0 ? `${entry.row.task}, sample ${entry.sample}` : s.prompts[at]; };
    const caption = el("p", { class: "now", "aria-live": "polite" });
    const buttons = shown.map((entry) => el("button", { type: "button", class: "clip-button", title: text(entry), "aria-label": text(entry), onclick: () => choose(entry.row, entry.sample) }, V.thumbnail(entry.row.clips[entry.sample], data.tasks[entry.row.task])));
    function choose(row, sample) {
      const index = shown.findIndex((e) => e.row.id === row.id && e.sample === sample);
      if (index < 0) return;
      buttons.forEach((b, i) => b.setAttribute("aria-pressed", i === index));
      caption.textContent = text(shown[index]);
      player.show(exactClip(row, sample), row.clips[sample]);
    }
    current = { choose };
    return { node: el("div", { class: "viewer" }, caption, player.node, shown.length > 1 && el("div", { class: "clip-buttons", role: "group", "aria-label": "Clips" }, buttons)), begin: () => choose(shown[0].row, shown[0].sample) };
  }

  V.closeMethod = () => { player?.close(); player = current = null; };
  V.playerKeys = () => player;
  V.drawMethod = (id) => {
    V.closeMethod();
    const host = document.getElementById("method"), method = V.methods.get(id);
    if (!method) {
      host.replaceChildren(el("p", { class: "back" }, el("a", { href: "#/" }, "\u2190 All methods")), el("h1", {}, "No such method"), el("p", { class: "verdict" }, `This report has no method called ${id}.`));
      return;
    }
    const from = V.sources(V.models.get(method.model)), rows = method.rows.map((r) => data.rows[r]), measured = rows.filter((r) => Object.keys(r.quality || {}).length);
    const facts = V.facts(method, from);
    let row = facts.quality && measured.includes(facts.quality) ? facts.quality : measured[0];
    facts.quality = row;
    const siblings = data.methods.filter((m) => m.group === method.group && m.model === method.model && m.id !== method.id);
    const warnings = [...new Set(rows.flatMap((r) => r.warnings || []))];
    const shown = clips(method);
    const holder = el("div", {});
    function fill() {
      const detail = prompts(row);
      const places = measured.length > 1 ? pick("Measured on", "quality-place", measured.map((r) => [V.sourceText(r), r.id]), row.id, (v) => { row = data.rows[v]; fill(); }) : null;
      holder.replaceChildren(...[el("section", { class: "panel", id: "quality", "aria-label": "Quality" }, el("div", { class: "heading" }, el("div", {}, el("h2", {}, "Quality"), el("p", { class: "lede" }, `${V.sourceText(row)}. ${method.kind === "seed" ? "Differences are paired by prompt; the noise is another." : "Differences are paired: same prompt, same noise."}`)), places && el("div", { class: "picks" }, places)), quality(row)), detail?.node].filter(Boolean));
      detail?.draw();
    }
    host.replaceChildren(...[
      el("p", { class: "back" }, el("a", { href: "#/" }, "\u2190 All methods")),
      el("header", { class: "masthead" }, el("p", { class: "eyebrow" }, V.mark(method), [V.KINDS[method.kind], method.family, method.kind === "plan" ? method.knob : method.subtitle].filter((t, i, a) => t && a.indexOf(t) === i).join(" \u00b7 "), data.models.length > 1 && ` \u00b7 ${V.models.get(method.model).label}`), el("h1", {}, method.title), el("p", { class: "verdict" }, lead(method, facts)),
        siblings.length > 0 && el("p", { class: "siblings" }, "Same method: ", siblings.map((m) => el("a", { class: "chip", href: V.route(m.id) }, m.knob || m.title)))),
      (method.notes.length > 0 || warnings.length > 0) && el("section", { class: "warnings", "aria-label": "Notes" }, el("h2", {}, "What to know"), el("ul", {}, method.notes.map((t) => el("li", {}, t)), warnings.map((t) => el("li", {}, t)))),
      shown?.node, cards(method, facts), row && holder, costs(method),
      panel("Settings", "settings", el("div", { class: "settings-grid" }, list([["name", method.name], ...(method.package ? [["package", `${method.package} ${method.package_version}`]] : []), ...(method.techniques.length ? [["techniques", method.techniques.join(", ")]] : []), ...method.settings]))),
      panel("Repeat it", "repeat", [...new Set(rows.map((r) => r.command).filter(Boolean))].map((text) => el("div", { class: "command" }, el("pre", {}, text), el("button", { type: "button", "data-copy": true }, "Copy"))),
        [...new Set(rows.map((r) => r.environment))].map((id_) => el("details", {}, el("summary", {}, data.environments[id_]?.label || id_), list([...(data.environments[id_]?.details || []), ["fingerprint", id_]])))),
    ].filter(Boolean));
    if (row) fill();
    shown?.begin();
  };
})();
