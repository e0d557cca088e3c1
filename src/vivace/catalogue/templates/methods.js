"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const bar = by("bar"), words = by("words"), branch = by("branch"), training = by("training"), base = by("base");
  const chips = [...document.querySelectorAll(".chip")];
  const methods = [...document.querySelectorAll(".method")].map((node) => ({
    node,
    text: node.textContent.toLowerCase() + " " + node.dataset.names,
    subs: node.dataset.subs.split(" "),
    bases: node.dataset.bases.split("|"),
  }));
  const branches = [...document.querySelectorAll(".branch")], families = [...document.querySelectorAll(".family")];

  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = chips.filter((c) => c.getAttribute("aria-pressed") === "true").map((c) => c.dataset.status);
    const counts = {};
    let shown = 0;
    for (const m of methods) {
      const data = m.node.dataset;
      const passes =
        (!status.length || status.includes(data.status)) &&
        (!training.value || data.training === training.value) &&
        (!base.value || m.bases.includes(base.value)) &&
        (!branch.value || m.subs.some((s) => s === branch.value || s[0] === branch.value)) &&
        wanted.every((w) => m.text.includes(w));
      m.node.hidden = !passes;
      if (passes) {
        shown += 1;
        counts[m.subs[0]] = (counts[m.subs[0]] || 0) + 1;
      }
    }
    for (const section of branches) section.hidden = !section.querySelector(".method:not([hidden])");
    for (const section of families) section.hidden = !section.querySelector(".method:not([hidden])");
    for (const link of document.querySelectorAll("[data-branch]")) {
      const n = counts[link.dataset.branch] || 0;
      link.querySelector(".n").textContent = n;
      link.classList.toggle("none", !n);
    }
    const any = wanted.length || status.length || training.value || base.value || branch.value;
    by("count").textContent = any ? `${shown} of ${methods.length} methods` : `${methods.length} methods`;
    by("clear").hidden = !any;
    by("empty").hidden = shown > 0;
  };

  const follow = () => {
    const target = by(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const method = target.closest(".method");
    if (target.closest("[hidden]")) bar.reset();
    if (method) method.open = true;
    target.scrollIntoView();
  };

  bar.addEventListener("submit", (event) => event.preventDefault());
  bar.addEventListener("input", filter);
  bar.addEventListener("reset", () => {
    for (const chip of chips) chip.setAttribute("aria-pressed", "false");
    words.value = branch.value = training.value = base.value = "";
    filter();
  });
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      filter();
    });
  }
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      words.focus();
    } else if (event.key === "Escape" && event.target === words) {
      words.value = "";
      filter();
    }
  });
  addEventListener("hashchange", follow);
  filter();
  follow();
})();
