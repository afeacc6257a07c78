// Shows one section at a time, and lists to search, sort and page through, which the page carries as JSON.
// Texts go in by textContent only, never as HTML. Without this script the page is whole, one section after the other.
(() => {
  "use strict";
  const PAGE = window.matchMedia("(max-width: 640px)").matches ? 10 : 20;
  const SHOWN = 300;
  const MOST_WORDS = 1500, LEAST_SHARED = 0.2; // as in utils/notebook.py

  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const number = (value) => value.toLocaleString("en-US");
  const address = (id) => `#${encodeURIComponent(id).replaceAll("%2F", "/")}`;

  // The text in parts: words that `other` has too as they are, the rest marked; the longest common subsequence is what both have.
  const markWords = (text, other) => {
    const [mine, theirs] = [text, other].map((one) => one.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || []);
    if (Math.max(mine.length, theirs.length) > MOST_WORDS) return [text];
    const same = (i, j) => mine[i].toLowerCase() === theirs[j].toLowerCase();
    const common = Array.from({ length: mine.length + 1 }, () => new Uint16Array(theirs.length + 1));
    for (let i = mine.length - 1; i >= 0; i -= 1) {
      for (let j = theirs.length - 1; j >= 0; j -= 1) {
        common[i][j] = same(i, j) ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
      }
    }
    const shared = new Set();
    for (let i = 0, j = 0; i < mine.length && j < theirs.length;) {
      if (same(i, j)) { shared.add(i); i += 1; j += 1; } else if (common[i + 1][j] >= common[i][j + 1]) i += 1; else j += 1;
    }
    const solid = (words) => words.filter((word) => word.trim()).length;
    if (2 * solid(mine.filter((_, place) => shared.has(place))) < LEAST_SHARED * (solid(mine) + solid(theirs))) return [text];
    return mine.map((word, place) => (shared.has(place) || !word.trim() ? word : make("ins", {}, word)));
  };

  const pairsOf = (entries) => make("dl", {}, ...entries.flatMap(([label, text, kind]) => {
    const part = kind ? "head" : "";
    const shown = make("p", { class: kind ? `kind ${kind}` : "text" }, text);
    return [make("dt", { class: part }, label), make("dd", { class: part }, shown)];
  }));

  // Of "1/t0/2", the drafts of the same example: those with "1/t0".
  const exampleOf = (id) => id.slice(0, id.lastIndexOf("/"));

  const siblings = (row, list) => {
    const column = list.columns.indexOf("Draft");
    const all = list.rows.filter(([, , , id]) => exampleOf(id) === exampleOf(row[3]));
    if (column < 0 || all.length < 2) return [];
    const textOf = (one) => list.texts[one[1][column]];
    const cards = [row, ...all.filter((one) => one !== row)].map((one) => {
      const [influence, kind] = one[1].at(-1);
      const link = make("a", { href: address(one[3]) }, `draft ${one[3].slice(one[3].lastIndexOf("/") + 1)}`);
      const words = one === row ? [textOf(row)] : markWords(textOf(one), textOf(row));
      return make("div", { class: kind }, make("p", { class: "tag" }, link, ", ", make("span", { class: `kind ${kind}` }, influence)),
        make("p", { class: "text" }, ...words));
    });
    return [make("h3", {}, "Drafts of this example"),
      make("p", { class: "soft" }, "Underlined: words that this draft lacks."), make("div", { class: "sides" }, ...cards)];
  };

  const details = (row, list, id) => {
    const [, , steps, name, prompts] = row;
    const texts = (numbers) => numbers.map(([label, text, kind]) => [list.texts[label], list.texts[text], kind]);
    const folded = prompts.map(([title, messages]) =>
      make("details", {}, make("summary", {}, list.texts[title]), pairsOf(texts(messages))));
    const link = make("p", { class: "soft" }, make("a", { href: address(name) }, "Link to this row"));
    const cell = make("td", { role: "cell", colspan: list.columns.length }, pairsOf(texts(steps)), ...folded, ...siblings(row, list), link);
    return make("tr", { class: "steps", id, role: "row" }, cell);
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

  // Up (sign 1) or down (-1): numbers by size; texts behind them either way, with the numbers in them by size.
  const collator = new Intl.Collator("en", { numeric: true });
  const compare = (one, other, sign) => {
    const [a, b] = [one, other].map((text) => (text.trim() ? Number(text) : NaN));
    return Number.isNaN(a) - Number.isNaN(b) || sign * (Number.isNaN(a) ? collator.compare(one, other) : a - b);
  };

  // Fills the box with its list; gives what opens the row of an id, and returns that row's element.
  const start = (box) => {
    const list = JSON.parse(document.getElementById(`${box.id}-data`).textContent);
    const search = make("input", { type: "search", placeholder: "words, a number, a name" });
    const selects = list.filters.filter((one) => one.options.length > 1 || list.rows.length > PAGE && one.options.length)
      .map((one) => {
        const options = one.options.map(([value, label]) => make("option", { value }, label));
        const select = make("select", {}, make("option", { value: "" }, `all (${number(list.rows.length)})`), ...options);
        return { label: one.label, select };
      });
    const sorts = list.columns.map((name) => make("button", { class: "sort", type: "button" }, name));
    const heads = sorts.map((button) => make("th", { role: "columnheader", scope: "col" }, button));
    const body = make("tbody", { role: "rowgroup" });
    const count = make("span", { role: "status" });
    const [first, previous, next, last] = ["First", "Previous", "Next", "Last"].map((name) => make("button", { type: "button" }, name));
    let page = 0, haystacks = null, shown = [], column = -1, sign = 1;

    // Made when somebody searches: until then a page of 10,000 traces opens without it.
    const found = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const tags = selects.map(({ select }) => select.value).filter(Boolean);
      if (words.length && !haystacks) {
        const lower = list.texts.map((text) => text.toLowerCase());
        haystacks = list.rows.map(([, , steps]) => steps.map(([, text]) => lower[text]));
      }
      const rows = list.rows.filter(([rowTags], index) => tags.every((tag) => rowTags.includes(tag))
        && words.every((word) => haystacks[index].some((text) => text.includes(word))));
      const textOf = ([, cells]) => (Array.isArray(cells[column]) ? cells[column][0] : list.texts[cells[column]]);
      return column < 0 ? rows : rows.sort((one, other) => compare(textOf(one), textOf(other), sign));
    };

    const draw = () => {
      const rows = found();
      const pages = Math.max(1, Math.ceil(rows.length / PAGE));
      page = Math.max(0, Math.min(page, pages - 1));
      shown = rows.slice(page * PAGE, (page + 1) * PAGE);
      body.replaceChildren(...shown.map(([, cells], index) => tableRow(cells, list, `${box.id}-${index}`)));
      const from = page * PAGE + 1;
      count.textContent = rows.length ? `${number(from)} to ${number(from + shown.length - 1)} of ${number(rows.length)}` : "nothing found";
      first.disabled = previous.disabled = page === 0;
      next.disabled = last.disabled = page === pages - 1;
      heads.forEach((head, index) => head.setAttribute("aria-sort", index !== column ? "none" : sign > 0 ? "ascending" : "descending"));
    };

    const toggle = (button) => {
      const id = button.getAttribute("aria-controls");
      const open = document.getElementById(id);
      if (open) open.remove();
      else button.closest("tr").after(details(shown[Number(id.slice(box.id.length + 1))], list, id));
      button.setAttribute("aria-expanded", String(!open));
    };

    const go = (to) => () => { page = to(page); draw(); };
    const restart = go(() => 0);
    search.addEventListener("input", restart);
    for (const { select } of selects) select.addEventListener("change", restart);
    // Up, down, and as in the run.
    sorts.forEach((button, index) => button.addEventListener("click", () => {
      [column, sign] = column !== index ? [index, 1] : sign > 0 ? [index, -1] : [-1, 1];
      restart();
    }));
    first.addEventListener("click", restart);
    previous.addEventListener("click", go((at) => at - 1));
    next.addEventListener("click", go((at) => at + 1));
    last.addEventListener("click", go(() => Infinity));
    body.addEventListener("click", (event) => {
      const button = event.target.closest("button.open");
      if (button) toggle(button);
    });
    const tools = make("div", { class: "tools", role: "search", "aria-label": box.id }, make("label", {}, "Search", search),
      ...selects.map(({ label, select }) => make("label", {}, label, select)));
    const table = make("table", { class: "cards", role: "table", "aria-label": box.id },
      make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), body);
    const scroll = make("div", { class: "wide", role: "region", tabindex: "0", "aria-label": `Table of ${box.id}` }, table);
    const pager = make("div", { class: "pages" }, first, previous, next, last, count);
    box.replaceChildren(tools, scroll, pager);
    draw();

    return (id) => {
      const row = list.rows.find(([, , , name]) => name === id);
      if (!row) return null;
      if (!found().includes(row)) {
        search.value = "";
        for (const { select } of selects) select.value = "";
      }
      const place = found().indexOf(row);
      page = Math.floor(place / PAGE);
      draw();
      const button = body.querySelector(`[aria-controls="${box.id}-${place % PAGE}"]`);
      toggle(button);
      return button.closest("tr");
    };
  };

  const lists = [...document.querySelectorAll(".browser")].map(start);

  // A section that is not shown is found by the browser's own search, and printed.
  const sections = [...document.querySelectorAll("main > section")];
  const nav = document.querySelector("nav");
  const show = (section) => {
    for (const one of sections) {
      if (one === section) one.removeAttribute("hidden");
      else one.setAttribute("hidden", "until-found");
    }
    for (const link of nav.querySelectorAll("a")) {
      const here = link.hash === `#${section.id}`;
      if (here) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
      if (here) nav.scrollLeft = link.offsetLeft - (nav.clientWidth - link.offsetWidth) / 2;
    }
  };
  const follow = () => {
    let name = "";
    try { name = decodeURIComponent(location.hash.slice(1)); } catch { /* no address of ours */ }
    const target = lists.map((open) => open(name)).find(Boolean) || document.getElementById(name);
    const section = target && target.closest("main > section");
    show(section || name && sections.find((one) => !one.hidden) || sections[0]);
    if (section) target.scrollIntoView();
  };
  for (const section of sections) section.addEventListener("beforematch", () => show(section));
  window.addEventListener("hashchange", follow);
  follow();

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
