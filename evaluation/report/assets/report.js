"use strict";
// Nothing here is needed to read a report: filters of the pictures, the choice of colours, and sorting of tables.
document.documentElement.classList.add("js");

(() => {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const names = { "": "as the system", light: "light", dark: "dark" };
  const remembered = () => { try { return localStorage.getItem("teachonce-theme") || ""; } catch { return ""; } };
  const show = (theme) => {
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    button.querySelector("span").textContent = names[theme];
    try { localStorage.setItem("teachonce-theme", theme); } catch { /* a file opened from disk may have no storage */ }
  };
  const first = remembered();
  show(first in names ? first : "");
  button.hidden = false;
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    show(order[(order.indexOf(root.dataset.theme || "") + 1) % order.length]);
  });
})();

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.querySelectorAll("[data-column]")];
  heads.forEach((head, column) => {
    if (column > 0 && !original.some((row) => row.cells[column].dataset.v !== undefined)) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      for (const other of heads) other.removeAttribute("aria-sort");
      let rows = original;
      if (column > 0 && before !== "ascending") {
        const sign = before === "descending" ? 1 : -1;
        head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.v;
        rows = [...original].sort((a, b) => {
          if (value(a) === undefined || value(b) === undefined) return (value(a) === undefined) - (value(b) === undefined);
          return sign * (value(a) - value(b));
        });
      }
      body.append(...rows);
    });
  });
}

(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const run = document.getElementById("filter-run");
  const wanted = document.getElementById("filter-class");
  const score = document.getElementById("filter-score");
  const labels = document.getElementById("filter-labels");
  const gallery = document.getElementById("gallery");
  const kinds = [...form.querySelectorAll("input[name=kind]")];
  const nameOf = kinds.map((box) => box.parentElement.querySelector("span").firstChild.textContent);
  const cards = [...gallery.querySelectorAll(".card")];
  const missed = nameOf.indexOf("missed"), difficult = nameOf.indexOf("difficult");
  const number = (count, noun) => `${count} ${noun}${count === 1 ? "" : noun === "box" ? "es" : "s"}`;

  const isShown = (mark, threshold) => {
    const kind = Number(mark.dataset.k), value = Number(mark.dataset.s);
    if (!kinds[kind].checked || (wanted.value && mark.dataset.c !== wanted.value)) return false;
    if (kind === difficult) return true;
    return kind === missed ? value < threshold : value >= threshold;
  };

  const update = () => {
    const threshold = Number(score.value);
    const written = threshold.toFixed(Number(score.dataset.decimals));
    form.querySelector("output").textContent = written;
    gallery.classList.toggle("no-labels", !labels.checked);
    gallery.style.setProperty("--card", run.value === "all" ? "40rem" : "21rem");
    const narrowed = wanted.value !== "" || kinds.some((box) => !box.checked);
    let images = 0, boxes = 0;
    for (const card of cards) {
      let here = 0;
      for (const figure of card.querySelectorAll("figure")) {
        figure.hidden = run.value !== "all" && figure.dataset.run !== run.value;
        if (figure.hidden) continue;
        const counts = nameOf.map(() => 0);
        for (const mark of figure.querySelectorAll(".mark-box")) {
          const shown = isShown(mark, threshold);
          mark.classList.toggle("off", !shown);
          if (shown) counts[mark.dataset.k] += 1;
        }
        here += counts.reduce((a, b) => a + b, 0);
        const told = counts.flatMap((count, kind) => (count ? [`${count} ${nameOf[kind]}`] : []));
        figure.querySelector(".told").textContent = told.join(", ") || "no boxes";
      }
      card.hidden = narrowed && here === 0;
      images += !card.hidden;
      boxes += here;
    }
    document.getElementById("shown").textContent =
      `${images} of ${number(cards.length, "image")}, ${number(boxes, "box")}, score at least ${written}`;
  };

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  document.getElementById("filter-errors").addEventListener("click", () => {
    kinds.forEach((box, kind) => { box.checked = !["true positive", "ignored", "difficult"].includes(nameOf[kind]); });
    update();
  });
  form.reset();
  update();
})();
