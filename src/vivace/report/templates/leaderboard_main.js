// Routes, keys, and what happens when something changes.
(() => {
  const { el, data } = V;
  const overview = document.getElementById("overview"), method = document.getElementById("method");
  const title = document.title;
  let returnTo = 0;

  V.update = () => {
    V.drawTable();
    V.drawPlot();
  };

  function go() {
    const match = /^#\/method\/(.+)$/.exec(location.hash);
    let id = null;
    try { id = match && decodeURIComponent(match[1]); } catch { id = match[1]; }
    if (id !== null && method.hidden) returnTo = scrollY;
    overview.hidden = id !== null;
    method.hidden = id === null;
    V.tip.hide();
    if (id !== null) {
      V.drawMethod(id);
      document.title = `${V.methods.get(id)?.title || id} | ${title}`;
      scrollTo(0, 0);
      method.focus({ preventScroll: true });
    } else {
      V.closeMethod();
      method.replaceChildren();
      document.title = title;
      V.update();
      scrollTo(0, returnTo);
    }
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy]");
    if (!button) return;
    const text = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // no clipboard from file:// here: leave it selected
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });

  document.addEventListener("keydown", (event) => {
    const player = V.playerKeys();
    if (!player || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { " ": player.toggle, ArrowLeft: () => player.step(-1), ArrowRight: () => player.step(1), Home: player.home, End: player.end };
    const owner = event.target.closest("button, select, summary, a, input, .scroll");
    if (!keys[event.key] || (owner && !owner.closest(".stage")) || event.target.matches("select, input")) return;
    if (event.key === " " && event.target.closest("button")) return; // the focused button has its own use for it
    event.preventDefault();
    keys[event.key]();
  });

  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    if (!overview.hidden) V.drawPlot();
  });
  addEventListener("hashchange", go);

  document.getElementById("machines").append(...Object.entries(data.environments).map(([id, e]) => el("details", {}, el("summary", {}, e.label), el("dl", { class: "environment" }, [...e.details, ["fingerprint", id]].map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))))));
  V.drawToolbar();
  go();
})();
