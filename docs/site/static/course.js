// The meaning of a term beside it, under the pointer and with the keyboard. Without this script the browser shows the
// title of the link.
const tip = document.createElement("div");
tip.id = "course-tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);
let shown = null;

function hide() {
  shown?.removeAttribute("aria-describedby");
  shown = null;
  tip.hidden = true;
}

function show(term) {
  hide();
  shown = term;
  tip.textContent = term.dataset.tip;
  tip.hidden = false;
  term.setAttribute("aria-describedby", tip.id);
  const place = term.getClientRects()[0];
  const left = Math.min(place.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = place.bottom + tip.offsetHeight + 8 < window.innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? place.bottom + 4 : place.top - tip.offsetHeight - 4}px`;
}

for (const term of document.querySelectorAll("a.course-term")) {
  term.dataset.tip = term.title;
  term.removeAttribute("title");
  term.addEventListener("mouseenter", () => show(term));
  term.addEventListener("focus", () => show(term));
  term.addEventListener("blur", hide);
  term.addEventListener("mouseleave", (event) => event.relatedTarget !== tip && hide());
}
tip.addEventListener("mouseleave", hide);
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
document.addEventListener("scroll", hide, { passive: true });

// What scrolls sideways can be scrolled with the keyboard too.
function reachable() {
  for (const box of document.querySelectorAll("main .pst-scrollable-table-container, main pre, main .output.text_html, main .course-scroll")) {
    if (box.scrollWidth > box.clientWidth) {
      box.tabIndex = 0;
    }
  }
}
window.addEventListener("load", reachable);
window.addEventListener("resize", reachable);

// On a phone a table of sentences would have columns of two words. Such a table shows each row as a block, with the
// heads of its columns as labels. The roles keep it a table for screen readers.
const ROLES = { TABLE: "table", THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TH: "columnheader", TD: "cell" };
let width = 0;

function squeezed(table) {
  const scrolls = table.parentElement.scrollWidth > table.parentElement.clientWidth;
  return [...table.tBodies[0].rows].some((row) => {
    const cells = [...row.cells];
    const narrow = row.offsetHeight > 200 && cells.every((cell) => cell.offsetWidth < 200);
    return narrow || (scrolls && cells.some((cell) => cell.textContent.trim().length > 40));
  });
}

function stack() {
  if (width === window.innerWidth) {
    return;
  }
  width = window.innerWidth;
  const tables = [...document.querySelectorAll("main .pst-scrollable-table-container > table")].filter((one) => one.tHead);
  tables.forEach((table) => table.classList.remove("course-stacked"));
  const narrow = tables.filter((table) => width < 768 && squeezed(table));
  for (const table of narrow) {
    const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent);
    for (const part of [table, ...table.querySelectorAll("thead, tbody, tr, th, td")]) {
      part.setAttribute("role", ROLES[part.tagName]);
    }
    for (const row of table.tBodies[0].rows) {
      [...row.cells].forEach((cell, place) => {
        cell.dataset.label = heads[place];
        cell.toggleAttribute("data-empty", !cell.textContent.trim() && !cell.querySelector("img"));
      });
    }
    table.classList.add("course-stacked");
  }
  if (narrow.length && location.hash) {
    document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  }
}
stack();
window.addEventListener("resize", stack);
