// What the stage pages and the page of all runs share: tables that sort and can be had as CSV, contents that follow the reader.
// Without scripts, everything is there to be read.

const text = cell => cell.innerText.trim();
const value = cell => cell.dataset.value ?? text(cell);
const number = words => (words === "" ? NaN : Number(words.replace(/ ±.*|[,%+]/g, "")));

function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

// A click on a heading sorts by its column, one more the other way round; cells without a value stay at the end.
function makeSortable(table) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  for (const heading of headings) {
    const words = text(heading);
    if (!words) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending", at = heading.cellIndex;
      const order = (a, b) => (value(a.cells[at]) === "") - (value(b.cells[at]) === "")
        || (up ? 1 : -1) * compare(value(a.cells[at]), value(b.cells[at]));
      const rows = [...body.rows].sort(order);
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...rows);
    });
  }
}

function asCsv(table) {
  const quote = words => (/[",\n]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words);
  const wide = cell => [...table.tBodies[0].rows].some(row => row.cells[cell.cellIndex]?.dataset.low !== undefined);
  const heading = cell => [text(cell), ...(wide(cell) ? [`${text(cell)} low`, `${text(cell)} high`] : [])];
  const values = cell => [value(cell), ...(cell.dataset.low === undefined ? [] : [cell.dataset.low, cell.dataset.high])];
  const lines = [...(table.tHead?.rows ?? [])].map(row => [...row.cells].flatMap(heading));
  for (const body of table.tBodies) for (const row of body.rows) lines.push([...row.cells].flatMap(values));
  return lines.map(line => line.map(quote).join(",")).join("\n") + "\n";
}

function offerCsv(table, name) {
  const link = Object.assign(document.createElement("a"), { className: "csv", textContent: "CSV", download: `${name}.csv`, href: "#" });
  link.setAttribute("aria-label", `Download this table as ${name}.csv`);
  link.addEventListener("click", () => { link.href = URL.createObjectURL(new Blob([asCsv(table)], { type: "text/csv" })); });
  (table.closest(".matrix, .scroll") ?? table).after(link);
}

function improveTables() {
  const names = {};
  for (const table of document.querySelectorAll("main table")) {
    const headings = [...document.querySelectorAll("h1[id], h2[id]")].filter(
      heading => heading.compareDocumentPosition(table) & Node.DOCUMENT_POSITION_FOLLOWING);
    const place = (headings.at(-1)?.id ?? "table").replace(/^parts-/, "").toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_|_$/g, "");
    names[place] = (names[place] ?? 0) + 1;
    offerCsv(table, names[place] > 1 ? `${place}_${names[place]}` : place);
    if (table.tHead?.rows.length === 1 && table.tBodies[0]?.rows.length > 1 && !table.closest(".matrix")) makeSortable(table);
  }
}

// The contents mark the section that is being read: the last one whose heading has passed the upper part of the window.
function followReader() {
  const links = [...document.querySelectorAll(".contents a")];
  const headings = links.map(link => document.getElementById(decodeURIComponent(link.hash.slice(1))));
  const mark = () => {
    const end = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 2;
    const passed = headings.filter(heading => heading.getBoundingClientRect().top < window.innerHeight / 3).length;
    const current = end ? links.length - 1 : passed - 1;
    links.forEach((link, i) => {
      if (i !== current) return link.removeAttribute("aria-current");
      link.setAttribute("aria-current", "location");
      link.closest("nav").scrollTo({ left: link.offsetLeft - link.closest("nav").offsetLeft - 16 }); // a narrow page has them in one line
    });
  };
  if (!links.length) return;
  document.addEventListener("scroll", mark, { passive: true });
  window.addEventListener("resize", mark);
  mark();
}

// What is wider than its box can be reached and moved by keyboard.
function reachScrollers() {
  const reach = () => {
    for (const box of document.querySelectorAll("main :is(.scroll, .highlight, .jp-OutputArea-child, .jp-CodeMirrorEditor, pre)")) {
      if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  for (const event of ["toggle", "change"]) document.addEventListener(event, reach, true); // folded parts have no width
  window.addEventListener("resize", reach);
  reach();
}

// On paper nothing can be unfolded: parameters and versions are open there.
window.addEventListener("beforeprint", () => document.querySelectorAll("footer details").forEach(part => { part.open = true; }));

improveTables();
followReader();
reachScrollers();
