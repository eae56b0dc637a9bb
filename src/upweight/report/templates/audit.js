// Sorts, filters and opens the lines of the table of findings. Without it the page shows the same.
// Text from data is read and compared, and never becomes markup or a key of an object.
"use strict";
(() => {
  const table = document.getElementById("suspects");
  const tools = document.getElementById("tools");
  if (!table || !tools) return;

  const fold = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const lines = Array.from(table.tBodies, (body, order) => {
    const evidence = body.querySelector("summary, .why bdi");
    const text = fold(`${body.rows[0].textContent} ${evidence ? evidence.textContent : ""}`);
    return { body, order, text, details: body.querySelector("details") };
  });
  const heads = Array.from(table.tHead.rows[0].cells);
  const search = tools.querySelector("input[type=search]");
  const selects = Array.from(tools.querySelectorAll("select"));
  const count = document.getElementById("count");
  const all = document.getElementById("open-all");
  const total = lines.length;
  let sort = ""; // name of a column, with a minus sign if descending; empty: as the page has it

  const shown = () => lines.filter((line) => !line.body.hidden);

  // ---- filter -----------------------------------------------------------------------------------

  function filter() {
    const words = fold(search.value).split(/\s+/).filter(Boolean);
    const wanted = selects.filter((select) => select.value !== "");
    let left = 0;
    for (const { body, text } of lines) {
      const keep =
        words.every((word) => text.includes(word)) &&
        wanted.every((select) => body.getAttribute(`data-${select.name}`) === select.value);
      body.hidden = !keep;
      left += keep;
    }
    count.textContent = left === total ? `Showing all ${total}.` : `Showing ${left} of ${total}.`;
    table.setAttribute("data-shown", left);
    label();
  }

  // ---- sort -------------------------------------------------------------------------------------

  function compare(a, b) {
    const [x, y] = [Number(a), Number(b)];
    if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return Number.isNaN(x) ? collator.compare(a, b) : x - y;
  }

  function order() {
    const name = sort.replace(/^-/, "");
    const down = sort.startsWith("-");
    const at = heads.findIndex((head) => head.getAttribute("data-key") === name);
    heads.forEach((head, i) => {
      if (!head.hasAttribute("data-key")) return;
      head.setAttribute("aria-sort", i !== at ? "none" : down ? "descending" : "ascending");
    });
    const key = ({ body }) => {
      const text = at < 0 ? "" : body.rows[0].cells[at].textContent.trim();
      return text === "" || text === "–" ? null : text;
    };
    const keyed = lines.map((line) => ({ line, value: key(line) }));
    keyed.sort((a, b) => {
      // What has no value is last in both directions; what is equal stays as the page had it.
      if (a.value === null || b.value === null) {
        return (a.value === null) - (b.value === null) || a.line.order - b.line.order;
      }
      const less = compare(a.value, b.value);
      return (down ? -less : less) || a.line.order - b.line.order;
    });
    table.append(...keyed.map(({ line }) => line.body));
    table.setAttribute("data-sorted", sort);
  }

  // ---- details ----------------------------------------------------------------------------------

  function label() {
    const some = shown().filter((line) => line.details);
    const open = some.length > 0 && some.every((line) => line.details.open);
    all.textContent = open ? "Close all" : "Open all";
    all.disabled = some.length === 0;
  }

  function reveal(id) {
    const line = id && lines.find(({ body }) => body.id === id);
    if (!line) return false;
    if (line.body.hidden) clear();
    for (const { body } of lines) body.removeAttribute("aria-current");
    line.body.setAttribute("aria-current", "true");
    if (line.details) line.details.open = true;
    line.body.scrollIntoView({ block: "start" });
    return true;
  }

  // ---- the address: #sort=-suspicion&kind=label&q=text, or #row-17 ------------------------------

  function remember() {
    const state = new URLSearchParams();
    if (sort) state.set("sort", sort);
    if (search.value) state.set("q", search.value);
    for (const select of selects) if (select.value) state.set(select.name, select.value);
    const hash = state.toString();
    try {
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    } catch {
      // Some viewers of files forbid it: the page works, the address stays.
    }
  }

  function recall() {
    const hash = location.hash.slice(1);
    if (reveal(hash) || !hash.includes("=")) return;
    const state = new URLSearchParams(hash);
    search.value = state.get("q") ?? "";
    for (const select of selects) {
      select.value = state.get(select.name) ?? "";
      if (select.selectedIndex < 0) select.value = "";
    }
    sort = state.get("sort") ?? "";
    filter();
    order();
    if (state.get("open")) reveal(state.get("open"));
  }

  function clear() {
    search.value = "";
    for (const select of selects) select.value = "";
    sort = "";
    filter();
    order();
  }

  // ---- wiring -----------------------------------------------------------------------------------

  for (const head of heads) {
    const name = head.getAttribute("data-key");
    if (name === null) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    // Numbers begin with the largest; a third click gives the order of the page back.
    const states = head.hasAttribute("data-down") ? [`-${name}`, name, ""] : [name, `-${name}`, ""];
    button.addEventListener("click", () => {
      sort = states[(states.indexOf(sort || null) + 1) % states.length];
      order();
      remember();
    });
  }
  const changed = () => {
    filter();
    remember();
  };
  search.addEventListener("input", changed);
  for (const select of selects) select.addEventListener("change", changed);
  document.getElementById("clear").addEventListener("click", () => {
    clear();
    remember();
    search.focus();
  });
  all.addEventListener("click", () => {
    const open = all.textContent === "Open all";
    for (const { details } of shown()) if (details) details.open = open;
    label();
  });
  table.addEventListener("click", (event) => {
    if (event.target.closest("a, button, details") || String(getSelection())) return;
    const details = event.target.closest("tbody")?.querySelector("details");
    if (details) details.open = !details.open;
  });
  table.addEventListener("toggle", label, true);
  addEventListener("hashchange", recall);

  // On paper the first rows are shown with their details.
  let opened = [];
  addEventListener("beforeprint", () => {
    const first = shown().filter((line) => line.details).slice(0, 5);
    opened = first.map((line) => line.details).filter((details) => !details.open);
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });

  tools.hidden = false;
  filter();
  order();
  recall();
  document.documentElement.setAttribute("data-script", "ran");
})();
