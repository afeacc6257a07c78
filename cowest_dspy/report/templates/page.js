// Pages through the lists that the report carries as JSON. Texts go in by textContent only, never as HTML.
(() => {
  "use strict";
  const PAGE = window.matchMedia("(max-width: 640px)").matches ? 10 : 20;
  const SHOWN = 300;

  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const number = (value) => value.toLocaleString("en-US");

  const details = (steps, texts, columns, id) => {
    const list = make("dl");
    for (const [label, text, kind] of steps) {
      const part = kind ? "head" : "";
      const shown = make("p", { class: kind ? `kind ${kind}` : "text" }, texts[text]);
      list.append(make("dt", { class: part }, texts[label]), make("dd", { class: part }, shown));
    }
    return make("tr", { class: "steps", id, role: "row", hidden: "" }, make("td", { role: "cell", colspan: columns }, list));
  };

  const tableRow = (cells, list, id) => make("tr", { role: "row" }, ...cells.map((cell, index) => {
    if (Array.isArray(cell)) {
      return make("td", { role: "cell", class: `result kind ${cell[1]}`, "data-head": list.columns[index] }, cell[0]);
    }
    const cut = make("span", { class: "cut" }, list.texts[cell].slice(0, SHOWN) || "-");
    if (index) return make("td", { role: "cell", "data-head": list.columns[index] }, cut);
    const button = make("button", { class: "open", type: "button", "aria-expanded": "false", "aria-controls": id }, cut);
    return make("td", { role: "cell" }, button);
  }));

  const start = (box) => {
    const list = JSON.parse(document.getElementById(`${box.id}-data`).textContent);
    const search = make("input", { type: "search", placeholder: "words, a number, a name" });
    const selects = list.filters.filter((one) => one.options.length > 1 || list.rows.length > PAGE && one.options.length)
      .map((one) => {
        const options = one.options.map(([value, label]) => make("option", { value }, label));
        const select = make("select", {}, make("option", { value: "" }, `all (${number(list.rows.length)})`), ...options);
        return { label: one.label, select };
      });
    const heads = list.columns.map((name) => make("th", { role: "columnheader", scope: "col" }, name));
    const body = make("tbody", { role: "rowgroup" });
    const count = make("span", { role: "status" });
    const [first, previous, next, last] = ["First", "Previous", "Next", "Last"].map((name) => make("button", { type: "button" }, name));
    let page = 0;
    let haystacks = null;

    // Made when somebody searches: until then a page of 10,000 traces opens without it.
    const found = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const tags = selects.map(({ select }) => select.value).filter(Boolean);
      if (words.length && !haystacks) {
        const lower = list.texts.map((text) => text.toLowerCase());
        haystacks = list.rows.map(([, , steps]) => steps.map(([, text]) => lower[text]));
      }
      return list.rows.filter(([rowTags], index) => tags.every((tag) => rowTags.includes(tag))
        && words.every((word) => haystacks[index].some((text) => text.includes(word))));
    };

    const draw = () => {
      const rows = found();
      const pages = Math.max(1, Math.ceil(rows.length / PAGE));
      page = Math.max(0, Math.min(page, pages - 1));
      const shown = rows.slice(page * PAGE, (page + 1) * PAGE);
      body.replaceChildren(...shown.flatMap(([, cells, steps], index) => {
        const id = `${box.id}-${index}`;
        return [tableRow(cells, list, id), details(steps, list.texts, list.columns.length, id)];
      }));
      const from = page * PAGE + 1;
      count.textContent = rows.length ? `${number(from)} to ${number(from + shown.length - 1)} of ${number(rows.length)}` : "nothing found";
      first.disabled = previous.disabled = page === 0;
      next.disabled = last.disabled = page === pages - 1;
    };

    const go = (to) => () => { page = to(page); draw(); };
    const restart = go(() => 0);
    search.addEventListener("input", restart);
    for (const { select } of selects) select.addEventListener("change", restart);
    first.addEventListener("click", restart);
    previous.addEventListener("click", go((at) => at - 1));
    next.addEventListener("click", go((at) => at + 1));
    last.addEventListener("click", go(() => Infinity));
    body.addEventListener("click", (event) => {
      const button = event.target.closest("button.open");
      if (!button) return;
      const row = document.getElementById(button.getAttribute("aria-controls"));
      row.hidden = !row.hidden;
      button.setAttribute("aria-expanded", String(!row.hidden));
    });
    const tools = make("div", { class: "tools", role: "search", "aria-label": box.id }, make("label", {}, "Search", search),
      ...selects.map(({ label, select }) => make("label", {}, label, select)));
    const table = make("table", { role: "table", "aria-label": box.id },
      make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), body);
    const scroll = make("div", { class: "wide", role: "region", tabindex: "0", "aria-label": `Table of ${box.id}` }, table);
    const pager = make("div", { class: "pages" }, first, previous, next, last, count);
    box.replaceChildren(tools, scroll, pager);
    draw();
  };

  document.querySelectorAll(".browser").forEach(start);

  // On paper nobody can open what is folded.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const one of folded) one.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const one of folded) one.open = false;
  });
})();
