// Pages through the lists that the report carries as JSON. Texts go in by textContent only, never as HTML.
(() => {
  "use strict";
  const PAGE = 10;

  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };

  const details = (row, columns, id) => {
    const list = make("dl");
    for (const [label, text, kind] of row.steps) {
      const part = kind ? "head" : "";
      const shown = make("p", { class: kind ? `kind ${kind}` : "text" }, text);
      list.append(make("dt", { class: part }, label), make("dd", { class: part }, shown));
    }
    return make("tr", { class: "steps", id, hidden: "" }, make("td", { colspan: columns }, list));
  };

  const tableRow = (row, id) => {
    const cells = row.cells.map(([text, kind], index) => {
      if (kind) return make("td", { class: `kind ${kind}` }, text);
      const cut = make("span", { class: "cut" }, text || "-");
      if (index) return make("td", {}, cut);
      const button = make("button", { class: "open", type: "button", "aria-expanded": "false", "aria-controls": id }, cut);
      return make("td", {}, button);
    });
    return make("tr", {}, ...cells);
  };

  const start = (box) => {
    const list = JSON.parse(document.getElementById(`${box.id}-data`).textContent);
    const search = make("input", { type: "search", placeholder: "words, a number, a name" });
    const selects = list.filters.filter((one) => one.options.length).map((one) => {
      const options = one.options.map(([value, label]) => make("option", { value }, label));
      const select = make("select", {}, make("option", { value: "" }, `all (${list.rows.length})`), ...options);
      return { label: one.label, select };
    });
    const head = make("tr", {}, ...list.columns.map((name) => make("th", { class: "wrap", scope: "col" }, name)));
    const body = make("tbody");
    const count = make("span", { role: "status" });
    const previous = make("button", { type: "button" }, "Previous");
    const next = make("button", { type: "button" }, "Next");
    const haystacks = list.rows.map((row) => row.steps.map(([, text]) => text).join("\n").toLowerCase());
    let page = 0;

    const draw = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const tags = selects.map(({ select }) => select.value).filter(Boolean);
      const found = list.rows.filter((row, index) =>
        tags.every((tag) => row.tags.includes(tag)) && words.every((word) => haystacks[index].includes(word)));
      page = Math.max(0, Math.min(page, Math.ceil(found.length / PAGE) - 1));
      const shown = found.slice(page * PAGE, (page + 1) * PAGE);
      body.replaceChildren(...shown.flatMap((row, index) => {
        const id = `${box.id}-${index}`;
        return [tableRow(row, id), details(row, list.columns.length, id)];
      }));
      const first = page * PAGE + 1;
      count.textContent = found.length ? `${first} to ${first + shown.length - 1} of ${found.length}` : "nothing found";
      previous.disabled = page === 0;
      next.disabled = first + shown.length > found.length;
    };

    const restart = () => { page = 0; draw(); };
    search.addEventListener("input", restart);
    for (const { select } of selects) select.addEventListener("change", restart);
    previous.addEventListener("click", () => { page -= 1; draw(); });
    next.addEventListener("click", () => { page += 1; draw(); });
    body.addEventListener("click", (event) => {
      const button = event.target.closest("button.open");
      if (!button) return;
      const row = document.getElementById(button.getAttribute("aria-controls"));
      row.hidden = !row.hidden;
      button.setAttribute("aria-expanded", String(!row.hidden));
    });
    const tools = make("div", { class: "tools" }, make("label", {}, "Search", search),
      ...selects.map(({ label, select }) => make("label", {}, label, select)));
    box.replaceChildren(tools, make("div", { class: "wide" }, make("table", {}, make("thead", {}, head), body)),
      make("div", { class: "pages" }, previous, next, count));
    draw();
  };

  document.querySelectorAll(".browser").forEach(start);
})();
